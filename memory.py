"""What a run will take of a device's memory, before it starts, and the largest chunks that fit.

    peak = weights + adapter + max(rollout, update)

    weights   4-bit linear layers: half a byte a number, and a scale of about a byte for every 64; all else as it is
    adapter   LoRA's A and B in float32, their gradients, AdamW's two moments (a byte a number each with --eight-bit-adam)
    rollout   keys and values of each row and layer, for senior and junior; the pass over the prompts; sampling
    update    what is kept for the gradient (with --checkpointing what enters each layer, and one layer's inside), logits

The sizes of weights and adapter are exact: the model is built on the meta device, which holds shapes and no numbers.
What a layer keeps is counted for the Llama family; for others it is an estimate. A plan costs nothing, and a run that
does not fit is refused before its weights are loaded.

Not here: measuring (benchmark.py --only memory puts plan and measured peak side by side), memory outside the tensors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from reinforce import LOGITS_AT_ONCE

GIB = 2**30
RESERVE = 0.75 * GIB  # of a CUDA device: cuBLAS, and what its allocator cannot use


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


def shape_of(config) -> Shape:
    """The shape of a checkpoint, from its transformers configuration alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()  # some versions leave it out on this device
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


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose, for a pair of shapes. junior: None where the base is shared."""

    senior: Shape
    junior: Shape | None
    four_bit: bool
    half: bool  # 2 bytes a number, as on an accelerator, rather than 4
    rank: int
    checkpointing: bool
    eight_bit_adam: bool

    @property
    def size(self) -> int:
        return 2 if self.half else 4

    def weights(self) -> float:
        linear = 0.5 + 1 / 64 if self.four_bit else self.size
        return sum(shape.linear * linear + shape.other * self.size for shape in (self.senior, self.junior) if shape)

    def adapter(self) -> float:
        return self.senior.lora * self.rank * (4 + 4 + (2 if self.eight_bit_adam else 8))

    def rollout(self, rows: int, prompt: int, new: int) -> float:
        """`rows` rollouts at one time, with prompts of `prompt` tokens and completions of at most `new`."""
        caches = rows * (prompt + new) * sum(shape.layers * shape.kv * self.size for shape in (self.senior, self.junior or self.senior))
        # A pass over the prompts, of both at once on a shared base: the residual, its norm, and the feed-forward part's three.
        inside = self.size * (3 * self.senior.hidden + 3 * self.senior.wide) + 4 * self.senior.wide * self.half
        reading = rows * (1 if self.junior else 2) * prompt * inside
        # Logits of both; in float32 the log-softmax of both, and of one its exponential and the sums of that.
        sampling = rows * self.senior.vocab_size * (2 * self.size + 4 * 4)
        return caches + max(reading, sampling) + self._dequantised()

    def update(self, tokens: int, prompt: int, new: int) -> float:
        """A forward and backward pass over `tokens` tokens, padding included, of rollouts of this length."""
        shape, size = self.senior, self.size
        tokens = max(tokens, prompt + new)  # a pass holds at least one rollout
        if self.half:  # LoRA computes in float32, and so do norms: a copy of the input of each linear map, and of two norms
            inside = 2 * (2 * shape.hidden + shape.kv + 3 * shape.wide) + 4 * (8 * shape.hidden + shape.wide)
        else:
            inside = 4 * (6 * shape.hidden + shape.kv + 4 * shape.wide)
        gradients = size * (2 * shape.hidden + 2 * shape.wide)
        # Logits and their log-softmax in float32, of completion tokens only.
        logits = min(tokens * new / (prompt + new) * shape.vocab_size, LOGITS_AT_ONCE) * (2 * 4 + 2 * self.half)
        if self.checkpointing:
            return shape.layers * tokens * shape.hidden * size + max(tokens * (inside + gradients) + self._dequantised(), logits)
        return shape.layers * tokens * inside + max(tokens * gradients + self._dequantised(), logits)

    def _dequantised(self) -> float:
        return self.senior.largest * self.size * self.four_bit

    def peak(self, rows: int, tokens: int, prompt: int, new: int) -> float:
        return self.weights() + self.adapter() + max(self.rollout(rows, prompt, new), self.update(tokens, prompt, new))

    def fit(self, budget: float, rows: int, tokens: int, prompt: int, new: int) -> tuple[int, int]:
        """(rows, tokens) of the fewest chunks of even size that keep to `budget` bytes; a pass holds at least one rollout.

        Raises ValueError where even the smallest do not fit.
        """
        rest = budget - self.weights() - self.adapter()
        rows = largest_share(rows, 1, lambda rows: self.rollout(rows, prompt, new) <= rest)
        tokens = largest_share(tokens, min(tokens, prompt + new), lambda tokens: self.update(tokens, prompt, new) <= rest)
        if max(self.rollout(rows, prompt, new), self.update(tokens, prompt, new)) > rest:
            raise ValueError(
                f"{self.report(rows, tokens, prompt, new)}, which is more than {amount(budget)} even with one rollout at a time. "
                "Remedies: --four-bit, --checkpointing, --eight-bit-adam, fewer --max-new-tokens or --shots, a lower --rank, smaller models"
            )
        return rows, tokens

    def report(self, rows: int, tokens: int, prompt: int, new: int) -> str:
        peak = self.peak(rows, tokens, prompt, new)
        return (
            f"memory: weights {amount(self.weights())}, adapter and optimiser {amount(self.adapter())}, "
            f"{rows} rollouts of {prompt} + {new} tokens {amount(self.rollout(rows, prompt, new))} "
            f"or update of {tokens} tokens a pass {amount(self.update(tokens, prompt, new))}; peak {amount(peak)}"
        )


def largest_share(whole: int, least: int, fits: Callable[[int], bool]) -> int:
    """What `whole` is cut into, by the fewest cuts into even parts after which one fits, or `least` where none does."""
    shares = (math.ceil(whole / cuts) for cuts in range(1, whole + 1))
    return max(least, next(share for share in shares if share <= least or fits(share)))


def amount(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
