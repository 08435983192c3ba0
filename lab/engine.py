"""Speed and memory, out of the way of the lesson: the same numbers as the plain versions.

    Decoder              what both models read of a rollout, and their logits for its next token
    completion_logprobs  the log-probabilities of reinforce.py, without ever holding all logits
    micro_batches        a batch cut into parts that fit into memory

Rollouts. Each model has its own prompts, padding, positions and key-value cache. Four things make
decoding fast: caches are allocated once; prompts that begin alike are read once up to where they
differ; finished rollouts leave the batch; and where the junior is the senior's base with the
adapter off, one forward pass over 2B rows serves both models.

The update. The output layer runs only on completion tokens. Where it is frozen, it runs in chunks,
and the gradient with respect to its input is computed in the forward pass: no logits are stored.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from inspect import signature

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

# Shapes: B rollouts, P prompt length (with padding), C completion length, V vocabulary size,
# H hidden width, N completion tokens of the batch without padding.

# ------------------------------------------------------------------------------------------------
# Rollouts

MIN_SHARED = 64  # tokens; a shorter common beginning is not worth a pass of its own
COMPACT_AT = 0.8  # compaction copies the caches, so it waits until a fifth of the rows has finished
# What models call their cache: newer versions of transformers have renamed it.
IS_NEW = "cache" in signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if IS_NEW else "past_key_values"


def pad(rows: list[list[int]], side: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of token lists, padded on one side ("left" or "right") to (B, longest)."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    both = ids, [torch.ones_like(row) for row in ids]
    return tuple(pad_sequence(x, batch_first=True, padding_side=side).to(device) for x in both)


class Decoder:
    """B rollouts as both models read them.

    `logits` are those of senior and junior for the next token, (b, V) each, for the b rollouts that
    are still in the batch. At p = 1 the junior is never run, and at p = 0 the senior is not: the
    logits of the single writer then stand for both.
    """

    def __init__(self, pair, senior_prompts, junior_prompts, max_new_tokens: int, p: float, device):
        needed = [(pair.senior, [senior_prompts])] if p > 0 else []
        needed += [(pair.junior, [junior_prompts])] if p < 1 else []
        if len(needed) == 2 and pair.both is not None:
            needed = [(pair.both, [senior_prompts, junior_prompts])]
        self.models = [CachedModel(*asked, max_new_tokens, device) for asked in needed]

    @property
    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        by_role = [logits for model in self.models for logits in model.logits]
        return by_role[0], by_role[-1]

    def step(self, ids: list[int]) -> None:
        """Every model reads the token that was written in each row, whichever model wrote it."""
        for model in self.models:
            model.read(torch.tensor(ids * model.num_roles, device=model.mask.device)[:, None])

    def compact(self, finished: list[bool]) -> list[int] | None:
        """Drop finished rows if there are enough of them. Returns the indices kept."""
        kept = [i for i, done in enumerate(finished) if not done]
        if len(kept) > COMPACT_AT * len(finished):
            return None
        for model in self.models:
            model.select_rows(kept)
        return kept


class CachedModel:
    """One model with its key-value cache. It serves one role or, with twice the rows, both."""

    def __init__(self, model, prompts_by_role: list[list[list[int]]], max_new_tokens: int, device):
        self.model, self.num_roles, self.length = model, len(prompts_by_role), 0
        prompts = [prompt for of_role in prompts_by_role for prompt in of_role]  # num_roles * B
        ids, mask = pad(prompts, "left", device)  # (num_roles * B, P)
        self.mask = torch.cat([mask, mask.new_ones(len(prompts), max_new_tokens)], 1)
        # Padding does not count as a position: a row must not depend on the longest prompt.
        self.position_ids = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache = Cache(layer_class_to_replicate=partial(PreallocatedLayer, self.mask.shape[1]))
        # Only the logits at the last position are needed. With an integer instead of a tensor,
        # the models would take a slice for which PyTorch copies the output layer once per row.
        self.last = torch.tensor([-1], device=device)
        # What the prompts of a role have in common at their beginning, less than any prompt has.
        common = [os.path.commonprefix([one[:-1] for one in role]) for role in prompts_by_role]
        shared = min(map(len, common))
        # (A common beginning is itself read with max_new_tokens = 0, as a whole.)
        if shared >= MIN_SHARED and max_new_tokens > 0:
            self.start_from(CachedModel(model, [[one[:shared]] for one in common], 0, device), mask)
        self.read(ids[:, self.length :])

    def start_from(self, beginning: "CachedModel", mask: torch.Tensor) -> None:
        """Copy keys and values of the common beginning, which was read once per role.

        They go behind the padding of each row. (In front of it, padding would count as distance in
        models with a sliding window.) mask: (num_roles * B, P), that of the prompts.
        """
        self.length, batch = beginning.length, len(mask) // self.num_roles
        # Column c of a row with k columns of padding holds token c - k.
        padding = (mask == 0).sum(1)[:, None, None, None]  # (num_roles * B, 1, 1, 1)
        # (num_roles * B, 1, length, 1)
        source = (torch.arange(self.length, device=mask.device)[:, None] - padding).clamp(min=0)
        for i, layer in enumerate(beginning.cache.layers):
            # (num_roles * B, heads, length, width) each
            copies = (x.repeat_interleave(batch, 0) for x in (layer.keys, layer.values))
            self.cache.update(*(x.take_along_dim(source, 2) for x in copies), i)

    def read(self, ids: torch.Tensor) -> None:
        """Append tokens to every row."""
        start, self.length = self.length, self.length + ids.shape[1]
        inputs = dict(input_ids=ids, attention_mask=self.mask[:, : self.length])
        inputs |= dict(position_ids=self.position_ids[:, start : self.length])
        inputs |= {"logits_to_keep": self.last, "use_cache": True, CACHE: self.cache}
        self.logits = self.model(**inputs).logits[:, -1].chunk(self.num_roles)  # (B, V) per role

    def select_rows(self, kept: list[int]) -> None:
        # Row i of role r is row i + r * B here.
        rows = torch.arange(len(self.mask), device=self.mask.device).view(self.num_roles, -1)
        index = rows[:, kept].flatten()
        self.mask, self.position_ids = self.mask[index], self.position_ids[index]
        self.cache.batch_select_indices(index)


class PreallocatedLayer(DynamicLayer):
    """The key-value cache of one layer. DynamicLayer concatenates, and so copies, at every step.

    Its buffers have room for `capacity` tokens per row. After compaction fewer rows are in use.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs):
        """Append keys and values, (B, heads, new, width), and return those of all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            sizes = [(*x.shape[:2], self.capacity, x.shape[3]) for x in (keys, values)]
            self.buffers = [keys.new_empty(size) for size in sizes]
        rows, start = len(keys), self.get_seq_length()
        end = start + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:rows, :, start:end] = new
        self.keys, self.values = (buffer[:rows, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for buffer, old in zip(self.buffers, (self.keys, self.values)):
            # The right-hand side is a copy, so rows may be written over.
            buffer[: len(indices), :, : old.shape[2]] = old[indices]


def in_chunks(write: Callable, count: int, max_rows: int):
    """join(write(rows) for slices of at most max_rows of `count`). Halves max_rows if memory ends.

    The size of the chunks changes results by rounding only.
    """
    try:
        return join([write(slice(i, i + max_rows)) for i in range(0, count, max_rows)])
    except RuntimeError as error:
        # (accelerate's find_executable_batch_size would collect garbage at every call.)
        if max_rows == 1 or not should_reduce_batch_size(error):
            raise
    return in_chunks(write, count, (min(max_rows, count) + 1) // 2)


# ------------------------------------------------------------------------------------------------
# The update

LOGITS_AT_ONCE = 2**24  # logits per chunk: 64 MB per copy in float32


def completion_logprobs(model, rollouts, temperature: float) -> torch.Tensor:
    """What reinforce.plain_logprobs computes: (B, C), zero at padding, differentiable."""
    ids, mask, position_ids = rollouts.model_inputs()  # (B, P+C) each
    # Under LoRA the causal language model is inside a PeftModel, and its base_model is all but
    # the output layer.
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
    # The logits at position P+t-1 predict completion token t.
    hidden = causal_lm.base_model(**inputs)[0][:, rollouts.prompt_ids.shape[1] - 1 : -1]
    real = rollouts.completion_mask.bool()  # (B, C)
    states, targets = hidden[real], rollouts.completion_ids[real]  # (N, H), (N,)
    head = causal_lm.get_output_embeddings()
    if head.weight.requires_grad:
        # Only where lab/tiny.py pretrains a base, whose vocabulary is small.
        logits = head(states).to(torch.promote_types(states.dtype, torch.float32))  # (N, V)
        flat = (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]  # (N,)
    else:
        flat = FrozenOutputLayer.apply(head, states, targets, temperature)  # (N,)
    return torch.zeros(real.shape, dtype=flat.dtype, device=flat.device).masked_scatter(real, flat)


class FrozenOutputLayer(torch.autograd.Function):
    """log softmax(W h / T)[y] for N states h (N, H) and tokens y (N,), with a frozen W (V, H).

    The gradient with respect to h is W^T (onehot(y) - softmax(W h / T)) / T. All that it needs is
    there in the forward pass, so it is computed then, a chunk of states at a time, and N * H
    numbers are kept instead of N * V.
    """

    @staticmethod
    def forward(ctx, head, states: torch.Tensor, targets: torch.Tensor, temperature: float):
        chunk = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        logprobs, gradients = [], []
        for h, y in zip(states.split(chunk), targets[:, None].split(chunk)):
            logits = head(h).to(torch.promote_types(h.dtype, torch.float32)).div_(temperature)
            all_logprobs = logits.log_softmax(-1)  # (n, V)
            logprobs.append(all_logprobs.gather(1, y)[:, 0])  # (n,)
            if ctx.needs_input_grad[1]:
                # onehot(y) - softmax, in place: all_logprobs is not needed any more.
                difference = all_logprobs.exp_().neg_().scatter_(1, y, 1.0, reduce="add")  # (n, V)
                gradients.append(difference.to(h.dtype) @ head.weight / temperature)  # (n, H)
        ctx.save_for_backward(*gradients)
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        gradients = torch.cat(ctx.saved_tensors)  # (N, H)
        return None, upstream[:, None].to(gradients.dtype) * gradients, None, None


def micro_batches(rollouts, weights: torch.Tensor, max_tokens: int, keep_all: bool = False) -> list:
    """Cut a batch into (rollouts, weights) parts of at most `max_tokens` tokens with padding.

    A longer rollout is a part of its own. Rollouts whose weights are all zero have no gradient and
    are left out, unless keep_all says that the loss has another term (the KL penalty). The
    denominator of the loss is that of the whole batch, so it is fixed before this split.
    """
    rows = ((weights != 0).any(1) | keep_all).nonzero()[:, 0].cpu()
    masks = rollouts.prompt_mask, rollouts.completion_mask
    prompts, completions = (mask.sum(1).cpu() for mask in masks)
    parts: list[list[int]] = [[]]
    # Sorted, because parts of similar length waste less on padding.
    for row in rows[completions[rows].argsort()].tolist():
        wider = [*parts[-1], row]
        num_tokens = len(wider) * (prompts[wider].max() + completions[wider].max())
        if parts[-1] and num_tokens > max_tokens:
            parts.append([row])
        else:
            parts[-1] = wider
    selected = [(part, select(rollouts, part)) for part in parts if part]
    return [(few, weights[part, : few.completion_ids.shape[1]]) for part, few in selected]


def select(rollouts, rows: list[int]):
    """The rollouts `rows`, without the columns that are padding in all of them."""
    chosen = {"texts": [rollouts.texts[row] for row in rows]}
    for name in vars(rollouts).keys() - chosen:
        mask = "completion_mask" if name == "senior_mask" else name.replace("ids", "mask")
        columns = getattr(rollouts, mask)[rows].any(0)
        chosen[name] = getattr(rollouts, name)[rows][:, columns]
    return replace(rollouts, **chosen)


def join(parts: list):
    """One batch out of several: prompts are padded on the left again, completions on the right."""
    joined = {"texts": [text for part in parts for text in part.texts]}
    for name in vars(parts[0]).keys() - joined:
        rows = [row for part in parts for row in getattr(part, name)]
        side = "left" if "prompt" in name else "right"
        joined[name] = pad_sequence(rows, batch_first=True, padding_side=side)
    return replace(parts[0], **joined)
