"""Speed and memory, out of the way of the lesson: the same numbers as the plain versions.

    Decoder              what both models read of a rollout, and their logits for its next token
    completion_logprobs  the log-probabilities of reinforce.py, without ever holding all logits
    micro_batches        a batch cut into parts that fit into memory

Rollouts. Each model has its own prompts, padding, positions and key-value cache. Four things make
decoding fast: caches are allocated once; prompts that begin alike are read once up to where they
differ; finished rollouts leave the batch; and where the junior is the senior's base with the
adapter off, one forward pass over 2B rows serves both models.

The update. The output layer runs only on completion tokens, in chunks. Where it is frozen, the
gradient with respect to its input is computed in the forward pass, so that no logits are stored.
"""

import itertools
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
CHECK_EVERY = 4  # steps between two looks for finished rollouts
# What models call their cache: newer versions of transformers have renamed it.
IS_NEW = "cache" in signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if IS_NEW else "past_key_values"
COMPACT_AT = 0.8  # compaction copies the caches, so it waits until a fifth of the rows has finished


def pad(rows: list[list[int]], side: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of token lists, padded on one side ("left" or "right") to (B, longest)."""
    padded = partial(pad_sequence, batch_first=True, padding_side=side)
    ids = padded([torch.tensor(row, dtype=torch.long) for row in rows])
    mask = padded([torch.ones(len(row), dtype=torch.long) for row in rows])
    return ids.to(device), mask.to(device)


class Decoder:
    """B rollouts as both models read them.

    `logits` are those of senior and junior for the next token, (b, V) each, for the b rollouts that
    are still in the batch. At p = 1 the junior is never run, and at p = 0 the senior is not: the
    logits of the single writer then stand for both.
    """

    def __init__(self, pair, senior_prompts, junior_prompts, max_new_tokens: int, p: float, device):
        # (model, prompts of the roles that it serves, whether it is needed)
        both = [(pair.both, [senior_prompts, junior_prompts], True)]
        each = [(pair.senior, [senior_prompts], p > 0), (pair.junior, [junior_prompts], p < 1)]
        wanted = both if pair.both is not None and 0 < p < 1 else each
        options = max_new_tokens, device
        self.models = [CachedModel(model, asked, *options) for model, asked, runs in wanted if runs]

    @property
    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        by_role = [logits for model in self.models for logits in model.logits]
        return by_role[0], by_role[-1]

    def step(self, ids: list[int]) -> None:
        """Every model reads the token that was written in each row, whichever model wrote it."""
        for model in self.models:
            model.step(ids)

    def compact(self, t: int, finished: list[bool]) -> list[int] | None:
        """Drop finished rows after step t if there are enough of them. Returns the indices kept."""
        kept = [i for i, done in enumerate(finished) if not done]
        if t % CHECK_EVERY != CHECK_EVERY - 1 or len(kept) > COMPACT_AT * len(finished):
            return None
        for model in self.models:
            model.select_rows(kept)
        return kept


class CachedModel:
    """One model with its key-value cache. It serves one role or, with twice the rows, both."""

    def __init__(self, model, prompts_by_role: list[list[list[int]]], max_new_tokens: int, device):
        self.model, self.num_roles, self.length = model, len(prompts_by_role), 0
        prompts = [prompt for of_role in prompts_by_role for prompt in of_role]
        ids, mask = pad(prompts, "left", device)  # (num_roles * B, P)
        shared = min(common_prefix(of_role) for of_role in prompts_by_role)
        if shared >= MIN_SHARED:
            ids, mask = prefix_first(ids, mask, shared)
        rows, width = ids.shape
        layer = partial(PreallocatedLayer, width + max_new_tokens)
        self.cache = Cache(layer_class_to_replicate=layer)
        # Only prompts contain padding, so the mask is 1 at all later positions.
        self.mask = torch.cat([mask, mask.new_ones(rows, max_new_tokens)], 1)
        # Padding does not count as a position: a row must not depend on the longest prompt.
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        self.position = mask.sum(1, keepdim=True)  # (rows, 1), of the next token
        # Only the logits at the last position are needed. With an integer instead of a tensor,
        # the models would take a slice for which PyTorch copies the output layer once per row.
        self.last = torch.tensor([-1], device=device)
        if shared >= MIN_SHARED:
            # The beginning is read once per role, and its keys and values are copied to all rows.
            batch, full = rows // self.num_roles, self.mask
            self.mask = full[::batch]
            self._forward(ids[::batch, :shared], position_ids[::batch, :shared])
            index = torch.arange(self.num_roles, device=device).repeat_interleave(batch)
            self.cache.batch_select_indices(index)
            self.mask, ids, position_ids = full, ids[:, shared:], position_ids[:, shared:]
        self._forward(ids, position_ids)

    def step(self, ids: list[int]) -> None:
        ids = torch.tensor(ids * self.num_roles, device=self.mask.device)[:, None]
        self._forward(ids, self.position)
        self.position = self.position + 1

    def _forward(self, ids: torch.Tensor, position_ids: torch.Tensor) -> None:
        self.length += ids.shape[1]
        inputs = dict(input_ids=ids, position_ids=position_ids)
        inputs |= dict(attention_mask=self.mask[:, : self.length], logits_to_keep=self.last)
        with torch.no_grad():
            out = self.model(**inputs, **{CACHE: self.cache}, use_cache=True)
        self.logits = out.logits[:, -1].chunk(self.num_roles)  # (B, V) per role

    def select_rows(self, kept: list[int]) -> None:
        batch = len(self.mask) // self.num_roles
        # Row i of role r is row i + r * batch here.
        index = [i + role * batch for role in range(self.num_roles) for i in kept]
        index = torch.tensor(index, dtype=torch.long, device=self.mask.device)
        self.mask, self.position = self.mask[index], self.position[index]
        self.cache.batch_select_indices(index)


def in_chunks(write: Callable, count: int, max_rows: int):
    """join(write(rows) for slices of at most max_rows of `count`). Halves max_rows if memory ends.

    The size of the chunks changes results by rounding only.
    """
    size = min(max_rows, count)
    while True:
        try:
            return join([write(slice(i, i + size)) for i in range(0, count, size)])
        except RuntimeError as error:
            # (accelerate's find_executable_batch_size would collect garbage at every call.)
            if size == 1 or not should_reduce_batch_size(error):
                raise
            size = (size + 1) // 2


def common_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts have in common at their beginning, less than any prompt has."""
    # In alphabetical order every prompt lies between these two, so what they share all share.
    pairs = zip(min(prompts)[:-1], max(prompts)[:-1])
    return len(list(itertools.takewhile(lambda two: two[0] == two[1], pairs)))


def prefix_first(ids: torch.Tensor, mask: torch.Tensor, shared: int):
    """Left-padded (ids, mask) with the padding moved to behind the first `shared` tokens."""
    padding = (mask == 0).sum(1, keepdim=True)  # (B, 1)
    column = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, P)
    source = torch.where(column < shared + padding, column - shared, column)
    source = torch.where(column < shared, column + padding, source)
    return ids.gather(1, source), mask.gather(1, source)


class PreallocatedLayer(DynamicLayer):
    """The key-value cache of one layer. DynamicLayer concatenates, and so copies, at every step."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0  # in tokens

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs):
        """Append keys and values, (B, heads, new, width), and return those of all tokens so far."""
        if self.length == 0:
            self.lazy_initialization(keys, values)
            sizes = [(*x.shape[:2], self.capacity, x.shape[3]) for x in (keys, values)]
            self.buffers = [x.new_empty(size) for x, size in zip((keys, values), sizes)]
        start, self.length = self.length, self.length + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:, :, start : self.length] = new
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for i, old in enumerate(self.buffers):
            self.buffers[i] = old.new_empty(len(indices), *old.shape[1:])
            self.buffers[i][:, :, : self.length] = old[indices, :, : self.length]
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


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
                difference = all_logprobs.exp_().neg_()  # (n, V)
                difference.scatter_add_(1, y, torch.ones_like(y, dtype=difference.dtype))
                gradients.append(difference.to(h.dtype) @ head.weight / temperature)  # (n, H)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        (gradients,) = ctx.saved_tensors  # (N, H)
        return None, upstream[:, None].to(gradients.dtype) * gradients, None, None


def micro_batches(rollouts, weights: torch.Tensor, max_tokens: int, keep_all: bool = False) -> list:
    """Cut a batch into (rollouts, weights) parts of at most `max_tokens` tokens with padding.

    A longer rollout is a part of its own. Rollouts whose weights are all zero have no gradient and
    are left out, unless keep_all says that the loss has another term (the KL penalty). The
    denominator of the loss is that of the whole batch, so it is fixed before this split.
    """
    rows = ((weights != 0).any(1) | keep_all).nonzero()[:, 0]
    # Sorted, because parts of similar length waste less on padding.
    rows = rows[rollouts.completion_mask[rows].sum(1).argsort()]
    prompts, completions = (
        mask[rows].sum(1).tolist() for mask in (rollouts.prompt_mask, rollouts.completion_mask)
    )
    parts: list[list[int]] = []
    widest = (0, 0)  # the longest prompt and completion of the part that is being filled
    for row, *lengths in zip(rows.tolist(), prompts, completions):
        wider = tuple(map(max, widest, lengths))
        if parts and (len(parts[-1]) + 1) * sum(wider) <= max_tokens:
            parts[-1].append(row)
            widest = wider
        else:
            parts.append([row])
            widest = tuple(lengths)
    selected = [(part, select(rollouts, part)) for part in parts]
    return [(few, weights[part, : few.completion_ids.shape[1]]) for part, few in selected]


def select(rollouts, rows: list[int]):
    """The rollouts `rows`, without the columns that are padding in all of them."""
    chosen = {"texts": [rollouts.texts[row] for row in rows]}
    new = int(rollouts.completion_mask[rows].sum(1).max())
    for name in ("completion_ids", "completion_mask", "senior_mask"):
        chosen[name] = getattr(rollouts, name)[rows, :new]
    for prefix in ("prompt", "junior_prompt"):
        mask = getattr(rollouts, f"{prefix}_mask")[rows]
        first = int(mask.any(0).long().argmax())
        chosen[f"{prefix}_mask"] = mask[:, first:]
        chosen[f"{prefix}_ids"] = getattr(rollouts, f"{prefix}_ids")[rows, first:]
    return replace(rollouts, **chosen)


def join(parts: list):
    """One batch out of several: prompts are padded on the left again, completions on the right."""
    joined = {"texts": [text for part in parts for text in part.texts]}
    for name in vars(parts[0]).keys() - joined:
        rows = [row for part in parts for row in getattr(part, name)]
        side = "left" if "prompt" in name else "right"
        joined[name] = pad_sequence(rows, batch_first=True, padding_side=side)
    return replace(parts[0], **joined)
