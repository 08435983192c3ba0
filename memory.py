"""What a run will take of a device's memory, before it starts, and the largest chunks that fit.

    peak = weights + adapter and optimiser + max(rollout, update)

    weights     4-bit linear layers: half a byte a number, and one more byte for every 64; all else in the model's type
    adapter     LoRA's A and B in float32, their gradients, and AdamW's two moments
    rollout     keys and values of each row and layer, for senior and junior, and what sampling holds for a vocabulary
    update      with checkpointing what enters each layer, one layer's activations, and one chunk of logits

The counts of numbers are exact: the model is built on the meta device, which holds shapes and no numbers. What a layer
keeps for its gradient is counted for the Llama family, and an estimate for others.

Not here: measuring (benchmark.py), the memory of the Python process and of CUDA's own libraries (about 0.5 GB: see RESERVE).
"""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from reinforce import LOGITS_AT_ONCE

GB = 2**30
RESERVE = 0.75 * GB  # of a CUDA device: its context, cuBLAS, and what the allocator cannot use


@dataclass(frozen=True)
class Shape:
    """The numbers of one checkpoint that decide its memory."""

    linear: int  # parameters of the layers' linear maps
    other: int  # parameters of embeddings, norms, output layer
    lora: int  # parameters of a LoRA adapter on all of those linear maps, for each unit of rank
    layers: int
    hidden: int
    wide: int  # width of the feed-forward part
    kv: int  # numbers of keys and values of one token in one layer
    largest: int  # parameters of the largest linear map
    vocab_size: int


def shape_of(name: str) -> Shape:
    """Read the shape of a checkpoint from its configuration: no weights are loaded."""
    config = AutoConfig.from_pretrained(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    maps = [m.weight for m in model.modules() if m is not head and type(m).__name__ in ("Linear", "Conv1D")]
    numbers = sum(parameter.numel() for parameter in model.parameters())  # tied weights count once
    linear = sum(weight.numel() for weight in maps)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        linear=linear,
        other=numbers - linear,
        lora=sum(sum(weight.shape) for weight in maps),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        wide=getattr(config, "intermediate_size", 4 * config.hidden_size),
        kv=2 * (getattr(config, "num_key_value_heads", None) or heads) * width,
        largest=max(weight.numel() for weight in maps),
        vocab_size=config.vocab_size,
    )


def plan(
    senior: Shape, junior: Shape | None, *, four_bit: bool, half: bool, rank: int, rows: int, tokens: int, length: int, checkpointing: bool
) -> dict[str, float]:
    """Bytes by purpose. junior: None where the base is shared. rows: rollouts written at one time; tokens: those of a
    forward pass of the update; length: of prompt and completion; half: 2 bytes a number rather than 4."""
    size = 2 if half else 4
    linear = 0.5 + 1 / 64 if four_bit else size  # double quantisation: a byte for every block of 64
    weights = sum(shape.linear * linear + shape.other * size for shape in (senior, junior) if shape)
    adapter = senior.lora * rank * 4 * 4  # values, gradients, two moments
    caches = rows * length * sum(shape.layers * shape.kv * size for shape in (senior, junior or senior))
    sampling = 2 * rows * senior.vocab_size * (size + 3 * 4)  # logits, and in float32: scaled, log-softmax, cumulated
    kept = senior.hidden * size  # of a token, what enters a layer
    # Within a layer, for the gradient: two norms with a float32 copy each, queries to outputs, three of the feed-forward part.
    inside = size * (7 * senior.hidden + senior.kv + 4 * senior.wide) + 4 * 3 * senior.hidden
    layers = senior.layers * kept + 2 * inside if checkpointing else senior.layers * inside
    chunk = min(tokens * senior.vocab_size, LOGITS_AT_ONCE)
    update = tokens * layers + chunk * (2 * size + 3 * 4) + senior.largest * size * four_bit
    return {
        "weights": weights,
        "adapter and optimiser": adapter,
        "rollout: caches": caches,
        "rollout: sampling": sampling,
        "update": update,
        "peak": weights + adapter + max(caches + sampling, update),
    }
