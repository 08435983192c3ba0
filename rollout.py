"""Co-generation: two models, two prompts, two key-value caches, one text.

At every step each model reads the token that was written last, whoever wrote it, and samples its own candidate for
the next one under its own prompt. The handoff (tandem.py) keeps one of the two:

    y_t = y_t^senior  if the senior is active, else  y_t^junior,    y_t^m ~ pi_m( . | x_m, y_<t ; T)

    prompt x_senior, x_junior   prompt_ids, one Reader each       written text y   completion_ids
    who wrote y_t               senior_mask                       temperature T    temperature

(West et al., 2025.) Whoever wrote a token is recorded when it is sampled, and its id goes to the loss
untouched: text is for the verifier and for people.

All random numbers are drawn before the first token, one a row and a step, and a token is found by inverting the
cumulative distribution. A row's text then depends only on its own numbers, not on which other rows have ended and left
the batch (up to the rounding of batched arithmetic), and with p = 1 it is what the senior writes alone.

Not here: nucleus or top-k sampling (they would make the log-probabilities of the loss wrong), several devices.
"""

from dataclasses import dataclass, fields
from functools import partial

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from tandem import Boundaries, Handoff

# Letters: B rollouts, P prompt, C completion, V vocabulary.
CHECK_EVERY = 4  # steps between looks at which rows have ended: a look makes an accelerator wait
KEEP = 0.8  # they leave when they are a fifth of the batch: leaving copies the cache of those that stay


@dataclass
class Rollouts:
    """A batch of completions, with the senior's prompts. Masks are 1 for real tokens and recorded at sampling."""

    prompt_ids: torch.Tensor  # (B, P) left-padded
    prompt_mask: torch.Tensor  # (B, P)
    completion_ids: torch.Tensor  # (B, C) the end token included, then padding
    completion_mask: torch.Tensor  # (B, C)
    senior_mask: torch.Tensor  # (B, C) 1 where the senior wrote the token
    logprobs: torch.Tensor  # (B, C) the senior's, at the sampling temperature; zeros where the senior never ran
    texts: list[str]  # B completions without special tokens

    def __len__(self) -> int:
        return len(self.completion_ids)

    def to(self, device: torch.device | str) -> "Rollouts":
        tensors = [getattr(self, field.name) for field in fields(self)[:-1]]
        return Rollouts(*(tensor.to(device) for tensor in tensors), self.texts)

    def handoffs(self) -> torch.Tensor:
        """(B,) how often the author changes."""
        changes = self.senior_mask[:, 1:] != self.senior_mask[:, :-1]
        return (changes & self.completion_mask[:, 1:].bool()).sum(1)


class RoomyLayer(DynamicLayer):
    """One layer's keys and values in a room of its final size. The stock cache copies all of them at each token."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.filled = room, 0  # in tokens

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in the keys and values of new tokens, (B, heads, new, width), and return those of all tokens."""
        if self.filled == 0:
            self.lazy_initialization(keys, values)
            self.rooms = [x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (keys, values)]
        start, self.filled = self.filled, self.filled + keys.shape[2]
        for room, new in zip(self.rooms, (keys, values)):
            room[:, :, start : self.filled] = new
        self.keys, self.values = (room[:, :, : self.filled] for room in self.rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in a smaller room."""
        for i, old in enumerate(self.rooms):
            self.rooms[i] = old.new_empty(len(indices), *old.shape[1:])
            self.rooms[i][:, :, : self.filled] = old[indices, :, : self.filled]
        self.keys, self.values = (room[:, :, : self.filled] for room in self.rooms)


class Reader:
    """A view of the shared text: prompts, a key-value cache, the logits for the next token.

    With two voices it reads for senior and junior at once: twice the rows, the senior's above the junior's.
    """

    def __init__(self, model, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, max_new_tokens: int, voices: int = 1):
        rows, width = prompt_ids.shape
        self.model, self.voices, self.length = model, voices, 0
        self.cache = Cache(layer_class_to_replicate=partial(RoomyLayer, width + max_new_tokens))
        self.mask = torch.cat([prompt_mask, prompt_mask.new_ones(rows, max_new_tokens)], 1)  # (voices*B, P+C)
        self.position = prompt_mask.sum(1, keepdim=True)  # (voices*B, 1) of the next token: padding has none
        self._read(prompt_ids, (prompt_mask.cumsum(1) - 1).clamp(min=0))

    def read(self, ids: torch.Tensor) -> None:
        """Append one written token (B,) to what each voice has seen."""
        self._read(ids.repeat(self.voices)[:, None], self.position)
        self.position = self.position + 1

    def _read(self, ids: torch.Tensor, position_ids: torch.Tensor) -> None:
        self.length += ids.shape[1]
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask[:, : self.length],
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = out.logits[:, -1].chunk(self.voices)  # (B, V) each

    def keep(self, index: torch.Tensor) -> None:
        rows = len(self.mask) // self.voices
        index = torch.cat([index + voice * rows for voice in range(self.voices)])
        self.mask, self.position = self.mask[index], self.position[index]
        self.cache.batch_select_indices(index)


def sample(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample from softmax(logits / temperature). (B, V), (B,) in [0, 1) -> ids (B,), log-probabilities (B, V).

    Temperature 0 is greedy. At least float32 throughout: half-precision sums over a vocabulary lose whole tokens.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return logits.argmax(-1), logits.log_softmax(-1)
    logprobs = (logits / temperature).log_softmax(-1)
    cumulative = logprobs.exp().cumsum(-1)  # (B, V)
    threshold = noise.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return ids.clamp(max=logits.shape[1] - 1), logprobs


class Page:
    """What has been written: B rows of C columns, filled in step by step, each token with its author."""

    def __init__(self, batch: int, max_new_tokens: int, end_ids: list[int], device: torch.device):
        self.ends = torch.tensor(end_ids, device=device)
        self.ids = self.ends[0].repeat(batch, max_new_tokens)  # padding: any id would do, for the mask is recorded
        self.mask, self.by_senior = torch.zeros_like(self.ids), torch.zeros_like(self.ids)
        self.logprobs = torch.zeros(batch, max_new_tokens, dtype=torch.float64, device=device)
        self.rows = torch.arange(batch, device=device)  # the rollouts that are still being written ...
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)  # ... less those that ended since the last look

    def write(self, t: int, ids: torch.Tensor, by_senior: torch.Tensor, logprobs: torch.Tensor | None) -> None:
        """Column t of the rows still being written: ids and authors (b,), the senior's log-probabilities (b, V)."""
        self.ids[self.rows, t] = torch.where(self.alive, ids, self.ends[0])
        self.mask[self.rows, t] = self.alive.long()
        self.by_senior[self.rows, t] = (self.alive & by_senior).long()
        if logprobs is not None:
            written = logprobs.gather(1, ids[:, None])[:, 0].double()
            self.logprobs[self.rows, t] = torch.where(self.alive, written, 0.0)
        self.alive = self.alive & ~torch.isin(ids, self.ends)

    def keep(self, index: torch.Tensor) -> None:
        self.rows, self.alive = self.rows[index], self.alive[index]

    def rollouts(self, prompts: tuple[torch.Tensor, torch.Tensor], tokenizer) -> Rollouts:
        length = int(self.mask.sum(1).max())
        ids, mask, by_senior, logprobs = (x[:, :length] for x in (self.ids, self.mask, self.by_senior, self.logprobs))
        texts = [tokenizer.decode(row[real.bool()], skip_special_tokens=True) for row, real in zip(ids, mask)]
        return Rollouts(*prompts, ids, mask, by_senior, logprobs, texts)


def random_numbers(batch: int, max_new_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(noise (2, C, B), coins (C, B)), uniform in [0, 1): what the two models sample with, and the coins of the handoff.

    Two streams, so that the same tokens are drawn whatever p is; a row's numbers are its own, whatever batch it is
    written in. (torch's CPU generator keeps 32 bits of a seed: seed and seed + 2**32 would be one stream.)
    """
    tokens, coins = (torch.Generator().manual_seed(2 * seed + i) for i in (0, 1))
    noise = torch.rand(2, max_new_tokens, batch, generator=tokens)
    return noise, torch.rand(max_new_tokens, batch, generator=coins)


@torch.no_grad()
def rollout(
    senior,
    junior,
    senior_prompts: tuple[torch.Tensor, torch.Tensor],
    junior_prompts: tuple[torch.Tensor, torch.Tensor],
    tokenizer,
    end_ids: list[int],
    boundaries: Boundaries,
    noise: torch.Tensor,
    coins: torch.Tensor,
    *,
    schedule: str = "word",
    p: float = 0.5,
    temperature: float = 0.7,
) -> Rollouts:
    """Let senior and junior write B completions of at most C tokens together.

    senior, junior: causal language models over one vocabulary. *_prompts: left-padded (ids, mask), (B, P) each; P may
    differ. end_ids: the tokens that end a completion. noise (2, C, B), coins (C, B): see random_numbers. p: probability
    that a coin names the senior; at 1 the junior is never run, at 0 the senior never. Raises ValueError for prompts of
    different number or an unknown schedule.
    """
    batch, device = len(senior_prompts[0]), senior_prompts[0].device
    if len(junior_prompts[0]) != batch:
        raise ValueError(f"{batch} prompts for the senior, {len(junior_prompts[0])} for the junior: give one each")
    noise, coins, max_new_tokens = noise.to(device), coins.to(device), len(coins)
    handoff = Handoff(boundaries, schedule, p, coins)
    writers = [0, 1] if 0 < p < 1 else [0] if p == 1 else [1]  # senior, junior
    if p == 1:
        readers = [Reader(senior, *senior_prompts, max_new_tokens)]
    elif p == 0:
        readers = [Reader(junior, *junior_prompts, max_new_tokens)]
    elif getattr(junior, "senior", None) is senior:  # one copy of the weights: one forward pass for both
        readers = [Reader(junior.beside_senior, *_stack(senior_prompts, junior_prompts), max_new_tokens, voices=2)]
    else:
        readers = [Reader(senior, *senior_prompts, max_new_tokens), Reader(junior, *junior_prompts, max_new_tokens)]
    page = Page(batch, max_new_tokens, end_ids, device)
    _write_together(readers, writers, handoff, page, noise, temperature)
    return page.rollouts(senior_prompts, tokenizer)


def _stack(*prompts: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts (ids, mask) below each other, at one width."""
    width = max(ids.shape[1] for ids, _ in prompts)
    return tuple(torch.cat([functional.pad(x, (width - x.shape[1], 0)) for x in kind]) for kind in zip(*prompts))


def _write_together(
    readers: list[Reader], writers: list[int], handoff: Handoff, page: Page, noise: torch.Tensor, temperature: float
) -> None:
    """The loop: both sample, the handoff chooses, both read what was chosen. One who writes alone stands in for the other."""
    steps = noise.shape[1]
    for t in range(steps):
        logits = [part for reader in readers for part in reader.logits]  # (B, V) of each writer
        drawn = [sample(part, noise[m, t, page.rows], temperature) for m, part in zip(writers, logits)]
        (senior_ids, logprobs), (junior_ids, _) = drawn[0], drawn[-1]
        ids, by_senior = handoff.choose(senior_ids, junior_ids)
        page.write(t, ids, by_senior, logprobs if 0 in writers else None)

        if t % CHECK_EVERY == CHECK_EVERY - 1:
            index = page.alive.nonzero()[:, 0]
            if len(index) == 0:
                return
            if len(index) <= KEEP * len(page.rows):  # finished rows leave the batch, some at a time: it copies the cache
                ids = ids[index]
                for part in (page, handoff, *readers):
                    part.keep(index)
        if t + 1 < steps:
            for reader in readers:
                reader.read(ids)


def stretches(ids: list[int], by_senior: list[int], pieces: list[bytes]) -> list[tuple[str, str]]:
    """Who wrote what: [("senior", "Natalia sold"), ("junior", " 48"), ...] for one completion without padding.

    Joins the bytes of neighbouring tokens by one author (pieces: tandem.token_bytes), because a token alone need not
    be text.
    """
    runs: list[tuple[str, bytes]] = []
    for token, senior in zip(ids, by_senior):
        author = "senior" if senior else "junior"
        if runs and runs[-1][0] == author:
            runs[-1] = (author, runs[-1][1] + pieces[token])
        else:
            runs.append((author, pieces[token]))
    return [(author, text.decode(errors="replace")) for author, text in runs if text]


def join(parts: list[Rollouts]) -> Rollouts:
    """One batch out of several: prompts are padded on the left, completions on the right."""
    prompt = max(part.prompt_ids.shape[1] for part in parts)
    length = max(part.completion_ids.shape[1] for part in parts)

    def stack(name: str, width: int, left: bool) -> torch.Tensor:
        tensors = [getattr(part, name) for part in parts]
        gaps = [width - tensor.shape[1] for tensor in tensors]
        return torch.cat([functional.pad(x, (gap, 0) if left else (0, gap)) for x, gap in zip(tensors, gaps)])

    prompts = [stack(name, prompt, left=True) for name in ("prompt_ids", "prompt_mask")]
    completions = ("completion_ids", "completion_mask", "senior_mask", "logprobs")
    return Rollouts(*prompts, *(stack(name, length, left=False) for name in completions), sum((part.texts for part in parts), []))
