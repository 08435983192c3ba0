"""Estimates the peak memory of a run before it starts, and chooses the largest batches that fit.

    peak = weights + adapter + batch + max(rollout, update)

    term      method              what is counted
    weights   Plan.weights()      4-bit linear layers: half a byte per parameter and one byte of scale per 64 parameters. All
                                  other parameters at 2 bytes each in bfloat16 and 4 in float32
    adapter   Plan.adapter()      LoRA's A and B in float32, their gradients, and AdamW's two moments (with --eight-bit-adam
                                  one byte each)
    batch     Plan.whole_batch()  what is kept of every rollout of an update or evaluation: ids, masks, random numbers
    rollout   Plan.rollout(...)   the key-value caches of senior and junior, and the larger of prefill and sampling
    update    Plan.update(...)    the activations of every layer (with --checkpointing the input of every layer and the
                                  activations of the one that is being recomputed), and the logits of one chunk

Example: two checkpoints of Llama-2-7B in 4 bits with rank 16, 8-bit AdamW and checkpointing have 7.2 GiB of weights and
381 MiB of adapter and optimiser. A budget of 24 GiB leaves room for 31 rollouts of 200 + 256 tokens at one time (14.7 GiB),
a fifth of a batch of 152. The update, with 8192 tokens per pass, needs 4.6 GiB, so the planned peak is 22.2 GiB.

The sizes of weights and adapter are exact: the model is built on the meta device, which holds shapes and no numbers. What
a layer keeps for its gradient is counted for the Llama family and is an estimate for others. Nothing is measured here
(`python -m lab.benchmark --only memory` puts plan and measured peak side by side), and memory outside the tensors is
covered only by a fixed reserve on a GPU.

On a CPU the budget is what psutil calls available: what can be had without swapping. (os.sysconf knows the size of the
machine only, not what other programs use of it, and not on Windows.) The limit of a container is not seen: give --memory.
"""

import argparse
import ctypes
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil  # comes with peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lab import models, parallel
from lab import problems as tasks
from reinforce import LOGITS_AT_ONCE

GIB = 2**30
RESERVE = 0.75 * GIB  # kept free on a CUDA device for cuBLAS and for what the allocator cannot use


def fit_to_memory(args: argparse.Namespace, senior: str, junior: str, runs: list[argparse.Namespace], tokenizers: list) -> tuple[int, int]:
    """Print the memory plan and return (rollout_batch, micro_tokens): those of the flags, cut to what fits.

    senior, junior: the two checkpoints. runs: the flags of every run, for the longest prompt and the largest batch of all. The
    budget is --memory, or else the free memory of the GPU or of the machine, of which every one of --jobs gets its share.
    Raises ValueError if nothing fits or if there are more processes than rollouts, and what load_problems raises.
    """
    on_gpu, processes = args.device.startswith("cuda"), parallel.world_size()
    batches, evaluations = {run.batch for run in runs or [args]}, {run.eval_problems for run in runs or [args]}
    if min(batches | evaluations) < processes:
        few = f"--batch {min(batches)} and --eval-problems {min(evaluations)} do not give each of the {processes} processes a rollout"
        raise ValueError(f"{few}: raise them, or start fewer processes with --nproc-per-node")
    prompt, new = longest_prompt(runs, tokenizers), args.max_new_tokens
    configs = {name: models.load(AutoConfig, name).get_text_config() for name in (senior, junior)}
    for name, config in configs.items():
        # Beyond its context a model fails or, with dynamic position embeddings, silently decodes something else.
        context = getattr(config, "max_position_embeddings", None) or math.inf
        if prompt + new > context:
            reason = f"{prompt} tokens of prompt and --max-new-tokens {new} exceed its context of {context}"
            raise ValueError(f"{name}: {reason}. Lower --max-new-tokens or --shots, or choose another model")
    # No process ever holds more rollouts than its share of a batch or of an evaluation, nor updates on more than the batch.
    whole = max(batches | evaluations)
    share = math.ceil(whole / processes)
    wanted = min(args.rollout_batch, share), min(args.micro_tokens, max(batches) * (prompt + new))
    try:
        shapes = [shape_of(config) for config in configs.values()]
    except Exception as error:
        # An unusual configuration fails in many ways. Whether the model can be used is decided when it is loaded.
        print(f"memory plan: none for {senior} ({type(error).__name__}: {error}); --rollout-batch and --micro-tokens stay as they are")
        return wanted
    # A specialist is fine-tuned with the 32-bit AdamW, before the optimiser of the run exists.
    eight_bit_adam = args.eight_bit_adam and args.specialist_steps == 0
    options = dict(four_bit=args.four_bit, half_precision=args.bfloat16, rank=args.rank, checkpointing=args.checkpointing)
    plan = Plan(shapes, **options, eight_bit_adam=eight_bit_adam, prompt=prompt, new=new, batch=whole)
    # All processes must cut a batch alike, so all of them plan for the one that has the least memory.
    budget = min(parallel.gather(args.memory * GIB if args.memory else free_memory(on_gpu) / args.jobs)) - (RESERVE if on_gpu else 0)
    fitting = plan.fit(budget, *wanted)
    print(plan.report(*fitting))
    if fitting != wanted:
        print(f"to fit, {fitting[0]} rollouts at a time instead of {wanted[0]} and {fitting[1]} tokens per pass instead of {wanted[1]}")
    return fitting


def free_memory(on_gpu: bool) -> float:
    """The bytes that this process can have: what is free on its GPU, or its share of what is available on the machine."""
    if on_gpu:
        return torch.cuda.mem_get_info()[0]
    # torchrun says how many processes share the machine.
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def release_freed() -> None:
    """Give memory that was freed back to the operating system (Linux with glibc; elsewhere this does nothing).

    glibc keeps freed blocks of up to 32 MiB for later allocations, and key-value caches consist of such blocks. As their sizes
    differ from batch to batch, the old blocks often do not fit. Between batches this halves the memory of a run or more; its
    peak, while a batch is written, falls by little (results/README.md, section 8).
    """
    if sys.platform == "linux":
        # Other C libraries, such as musl, have no malloc_trim.
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def longest_prompt(runs: list[argparse.Namespace], tokenizers: list) -> int:
    """The length in tokens of the longest prompt of any run."""
    longest = 0
    # Runs that differ in other flags have the same prompts.
    for args in {(run.senior_language, run.junior_language, run.seed, run.validation): run for run in runs}.values():
        train, held_out = tasks.load_problems(args)
        for tokenizer, prompts in zip(tokenizers, tasks.prompts_of_pair(train + held_out, args, tokenizers[1])):
            longest = max(longest, models.encode_prompts(tokenizer, prompts, "cpu")[0].shape[1])
    return longest


# ----------------------------------------------------------------------------------------------------------------------
# What a checkpoint is made of


@dataclass(frozen=True)
class Shape:
    """The numbers of one checkpoint that decide how much memory it needs."""

    linear: int  # parameters of all linear layers except the output layer
    other: int  # parameters of embeddings, norms and output layer
    lora: int  # parameters per unit of rank of a LoRA adapter on all those linear layers
    layers: int
    hidden: int
    feed_forward: int  # width of the feed-forward part
    kv: int  # numbers in the keys and values of one token in one layer
    largest: int  # parameters of the largest linear layer
    vocab_size: int


def shape_of(config) -> Shape:
    """The shape of a checkpoint, from its transformers configuration alone."""
    with torch.device("meta"):
        # Without the option transformers asks whether code that comes with the checkpoint may be run.
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # Some versions of transformers do not tie weights on the meta device.
    model.tie_weights()
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    linear_weights = [module.weight for module in model.modules() if module is not head and isinstance(module, kinds)]
    linear = sum(weight.numel() for weight in linear_weights)
    total = sum(parameter.numel() for parameter in model.parameters())  # tied weights count once
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        linear=linear,
        other=total - linear,
        # A is (rank, in) and B is (out, rank).
        lora=sum(sum(weight.shape) for weight in linear_weights),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        feed_forward=getattr(config, "intermediate_size", 4 * config.hidden_size),
        kv=2 * (getattr(config, "num_key_value_heads", None) or heads) * head_width,
        largest=max(weight.numel() for weight in linear_weights),
        vocab_size=config.vocab_size,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose. The methods take `rollout_batch`, rollouts at a time, and `micro_tokens`, tokens per pass of the update."""

    shapes: list[Shape]  # of the senior and, unless both share one base, of the junior
    four_bit: bool
    half_precision: bool  # bfloat16 weights and activations rather than float32
    rank: int
    checkpointing: bool
    eight_bit_adam: bool
    prompt: int  # length in tokens of the longest prompt
    new: int  # and of the longest completion
    batch: int = 0  # rollouts per update or evaluation, of which a few are in the models at a time

    @property
    def bytes_per_number(self) -> int:
        return 2 if self.half_precision else 4

    def weights(self) -> float:
        per_linear_parameter = 0.5 + 1 / 64 if self.four_bit else self.bytes_per_number
        return sum(shape.linear * per_linear_parameter + shape.other * self.bytes_per_number for shape in self.shapes)

    def adapter(self) -> float:
        weight, gradient, moments = 4, 4, 2 if self.eight_bit_adam else 8
        return self.shapes[0].lora * self.rank * (weight + gradient + moments)

    def whole_batch(self) -> float:
        # Per token of both prompts, ids and mask; per token of a completion, ids, mask, author and log-probability, of 8
        # bytes each, and three random numbers of 4. Completions and numbers are there twice while parts are cut or joined.
        return self.batch * (self.prompt * 2 * (8 + 8) + self.new * 2 * (4 * 8 + 3 * 4))

    def rollout(self, rollout_batch: int) -> float:
        senior, junior, size = self.shapes[0], self.shapes[-1], self.bytes_per_number
        caches = rollout_batch * (self.prompt + self.new) * size * (senior.layers * senior.kv + junior.layers * junior.kv)
        # Prefill, inside one layer: the residual and its norm, and three activations of the feed-forward part. A shared
        # base reads the prompts of both models in one pass.
        inside = size * 3 * (senior.hidden + senior.feed_forward) + (4 * senior.feed_forward if self.half_precision else 0)
        prefill = rollout_batch * (2 if len(self.shapes) == 1 else 1) * self.prompt * inside
        # Sampling: the logits of both models; and in float32 two log-softmaxes, one exponential and one cumulative sum.
        sampling = rollout_batch * senior.vocab_size * (2 * size + 4 * 4)
        return caches + max(prefill, sampling) + self._dequantised()

    def update(self, micro_tokens: int) -> float:
        shape, size = self.shapes[0], self.bytes_per_number
        length = self.prompt + self.new
        tokens = max(micro_tokens, length)  # a pass holds at least one rollout
        # Per token and layer: both norms' inputs and outputs, queries, attention output; keys and values; gate, up, silu and
        # product of the feed-forward part.
        activations = 4 * (6 * shape.hidden + shape.kv + 4 * shape.feed_forward)
        if self.half_precision:
            # LoRA and the norms compute in float32: a copy of the input of every linear layer and of two norms.
            activations = 2 * (2 * shape.hidden + shape.kv + 3 * shape.feed_forward) + 4 * (8 * shape.hidden + shape.feed_forward)
        # The gradients that are alive at one time in the backward pass of a layer.
        gradients = size * 2 * (shape.hidden + shape.feed_forward)
        # The output layer sees completion tokens only: logits and their log-softmax in float32.
        num_logits = min(tokens * self.new / length * shape.vocab_size, LOGITS_AT_ONCE)
        logits = num_logits * (2 * 4 + (2 if self.half_precision else 0))
        if self.checkpointing:
            return shape.layers * tokens * shape.hidden * size + max(tokens * (activations + gradients) + self._dequantised(), logits)
        return shape.layers * tokens * activations + max(tokens * gradients + self._dequantised(), logits)

    def _dequantised(self) -> float:
        """One 4-bit layer at a time is expanded for its matrix product."""
        return self.shapes[0].largest * self.bytes_per_number if self.four_bit else 0

    def peak(self, rollout_batch: int, micro_tokens: int) -> float:
        working = max(self.rollout(rollout_batch), self.update(micro_tokens))
        return self.weights() + self.adapter() + self.whole_batch() + working

    def fit(self, budget: float, rollout_batch: int, micro_tokens: int) -> tuple[int, int]:
        """Split rollout_batch and micro_tokens into the fewest equal parts that fit into `budget` bytes.

        Raises ValueError if a single rollout at a time does not fit either.
        """
        rest = budget - self.weights() - self.adapter() - self.whole_batch()
        rollout_batch = largest_part(rollout_batch, 1, lambda part: self.rollout(part) <= rest)
        # A pass of the update holds at least one rollout.
        one_rollout = min(micro_tokens, self.prompt + self.new)
        micro_tokens = largest_part(micro_tokens, one_rollout, lambda part: self.update(part) <= rest)
        if self.peak(rollout_batch, micro_tokens) > budget:
            smaller = "--rank, --max-new-tokens, --shots, --batch or --eval-problems"
            remedies = f"--four-bit, --checkpointing, --eight-bit-adam, a smaller {smaller}, or smaller models"
            excess = f"This is more than the budget of {format_bytes(budget)} even with one rollout at a time"
            raise ValueError(f"{self.report(rollout_batch, micro_tokens)}. {excess}. Remedies: {remedies}")
        return rollout_batch, micro_tokens

    def report(self, rollout_batch: int, micro_tokens: int) -> str:
        """The plan in one line."""
        parts = [
            self.weights(),
            self.adapter(),
            self.whole_batch(),
            self.rollout(rollout_batch),
            self.update(micro_tokens),
            self.peak(rollout_batch, micro_tokens),
        ]
        weights, adapter, batch, rollout, update, peak = map(format_bytes, parts)
        rollouts = f"{rollout_batch} rollout{'' if rollout_batch == 1 else 's'} of {self.prompt} + {self.new} tokens {rollout}"
        updates = f"an update of {micro_tokens} tokens per pass {update}"
        return f"memory plan: weights {weights}, adapter and optimiser {adapter}, whole batch {batch}, {rollouts} or {updates}; peak {peak}"


def largest_part(whole: int, least: int, fits: Callable[[int], bool]) -> int:
    """The size of a part if `whole` is cut into the fewest even parts that fit, or `least` if no larger part does.

    >>> largest_part(152, 1, lambda part: part <= 40)
    38
    """
    parts = (math.ceil(whole / count) for count in range(1, whole + 1))
    return max(least, next(part for part in parts if part <= least or fits(part)))


def format_bytes(number: float) -> str:
    """In GiB or MiB.

    >>> format_bytes(1.5 * 2**30), format_bytes(381 * 2**20)
    ('1.5 GiB', '381 MiB')
    """
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
