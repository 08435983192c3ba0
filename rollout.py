"""Co-generation: two models, two prompts, two key-value caches, one text.

At every step t each of the two models samples its own candidate for the next token, under its own prompt x and after the
same text y_<t. The handoff (tandem.py) decides who is active, and keeps that model's candidate (West et al., 2025):

    y_t^senior ~ pi_senior( . | x_senior, y_<t ; T)        y_t = y_t^senior if the senior is active (after a possible toss)
    y_t^junior ~ pi_junior( . | x_junior, y_<t ; T)              y_t^junior otherwise

    symbol                  variable
    x_senior, x_junior      senior_prompts, junior_prompts: left-padded (ids, mask), (B, P) each; P may differ
    y                       completion_ids (B, C); the end token belongs to the completion, padding follows it
    who wrote y_t           senior_mask (B, C), recorded at the moment of sampling and never inferred afterwards
    the other candidate     discarded_ids (B, C); toss_mask (B, C) says whether a coin was tossed before y_t
    T                       temperature

The file begins with the algorithm for a single rollout, without a cache and without a batch. After it comes the same for a
batch: preallocated key-value caches, finished rows that leave the batch, and one forward pass for both models where the
junior is the senior's own base. A test checks that the two agree, token by token.

All random numbers are drawn in advance: one per row, step and model for sampling, and one per row and step for the coins.
So, up to rounding, a row's text does not depend on which other rows are in the batch, and the senior samples with the same
numbers in its solo rollouts (p = 1) and in joint ones (0 < p < 1). There is no top-k or top-p sampling here, because the loss computes
log-probabilities under the full softmax.
"""

import codecs
import itertools
import re
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from tandem import BoundaryTables, Handoff, opens_word

# Shapes: B rollouts, P prompt length (with padding), C completion length, V vocabulary size.


@dataclass
class Pair:
    """The two models and what they share: a vocabulary of V tokens. lab/models.py loads and checks them."""

    # The senior is trained. The junior is frozen, and may be any callable with the interface of a causal language model.
    senior: torch.nn.Module
    junior: torch.nn.Module
    # One vocabulary, but perhaps two chat templates.
    senior_tokenizer: object
    junior_tokenizer: object
    # Tokens that end a completion, whichever model writes them.
    end_ids: list[int]
    # The bytes that each token writes (tandem.token_bytes), and the tables that are built from them (tandem.build_tables).
    pieces: list[bytes]
    tables: BoundaryTables


class Step(NamedTuple):
    """How one token of a joint rollout came about, as text. Rollouts.steps makes it; samples.jsonl keeps it as a list."""

    author: str
    # What the token adds to the text: nothing if it is the end token, or if a character is still incomplete after it.
    text: str
    # The two candidates, of which the author's was written. Bytes that are not valid text on their own are escaped, as \xc3.
    senior: str
    junior: str
    # Whether a coin was tossed before the token. If so, it named the author.
    tossed: bool
    # The senior's probability of the written token, whichever model wrote it, at the sampling temperature.
    probability: float


@dataclass
class Rollouts:
    """A batch of B completions together with both prompts. In the masks of prompts and completions, 1 is a token and 0 is padding."""

    # The senior's prompts and the junior's, padded on the left.
    prompt_ids: torch.Tensor  # (B, P)
    prompt_mask: torch.Tensor  # (B, P)
    junior_prompt_ids: torch.Tensor  # (B, P'); P' may differ from P
    junior_prompt_mask: torch.Tensor  # (B, P')
    completion_ids: torch.Tensor  # (B, C), the end token included, padded on the right
    completion_mask: torch.Tensor  # (B, C)
    # (B, C), 1 where the senior wrote the token.
    senior_mask: torch.Tensor
    # (B, C), the candidate of the model that did not write. It is the written token itself if only one model took part.
    discarded_ids: torch.Tensor
    # (B, C), 1 where a coin was tossed before the token. It named the author.
    toss_mask: torch.Tensor
    # (B, C), the senior's log-probability of every written token, the junior's tokens included, at the sampling temperature.
    # All 0 if the senior was never run (p = 0). They have no gradient and are not used by the loss.
    logprobs: torch.Tensor
    # The B completions as text, without special tokens.
    texts: list[str]

    def __len__(self) -> int:
        return len(self.completion_ids)

    def to(self, device: torch.device | str) -> "Rollouts":
        tensors = {field.name: getattr(self, field.name).to(device) for field in fields(self) if field.name != "texts"}
        return Rollouts(**tensors, texts=self.texts)

    def as_read_by_junior(self) -> "Rollouts":
        """The same completions after the junior's prompts, for the junior to score."""
        return replace(self, prompt_ids=self.junior_prompt_ids, prompt_mask=self.junior_prompt_mask)

    def handoffs(self) -> torch.Tensor:
        """How often the author changes in each rollout, (B,)."""
        changes = self.senior_mask[:, 1:] != self.senior_mask[:, :-1]
        return (changes & self.completion_mask[:, 1:].bool()).sum(1)

    def author_spans(self, pieces: list[bytes]) -> list[list[tuple[str, str]]]:
        """Who wrote what, per rollout: [("senior", "Natalia sold"), ("junior", " 48"), ...].

        The bytes of neighbouring tokens by one author are joined before they are decoded, because a token alone need not
        be valid text (pieces: tandem.token_bytes).
        """
        all_spans = []
        for ids, by_senior, real in zip(self.completion_ids, self.senior_mask, self.completion_mask.bool()):
            tokens = zip(by_senior[real].tolist(), ids[real].tolist())
            # One group per run of tokens by the same author.
            groups = itertools.groupby(tokens, key=lambda token: token[0])
            texts = [(author, b"".join(pieces[token] for _, token in group).decode(errors="replace")) for author, group in groups]
            all_spans.append([("senior" if author else "junior", text) for author, text in texts if text])
        return all_spans

    def steps(self, row: int, pieces: list[bytes]) -> list[Step]:
        """One rollout token by token, with both models' candidates. The texts of the steps add up to texts[row]."""
        columns = (self.completion_ids, self.senior_mask, self.discarded_ids, self.toss_mask, self.logprobs.exp())
        real = self.completion_mask[row].bool()
        tokens = list(zip(*(column[row][real].tolist() for column in columns)))
        # A character may span several tokens. The decoder holds its bytes back until the last of them has arrived.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        steps = []
        for t, (written, by_senior, discarded, tossed, probability) in enumerate(tokens, 1):
            text = decoder.decode(pieces[written], final=t == len(tokens))
            samples = [pieces[token].decode(errors="backslashreplace") for token in (written, discarded)]
            senior, junior = samples if by_senior else samples[::-1]
            steps.append(Step("senior" if by_senior else "junior", text, senior, junior, bool(tossed), round(probability, 4)))
        return steps


def sample(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample from softmax(logits / T) with given random numbers, by inverting the cumulative distribution.

    logits (B, V), noise (B,) uniform in [0, 1)  ->  ids (B,), log-probabilities of all tokens (B, V). Temperature 0 is
    greedy decoding.

    >>> logits = torch.tensor([[0.25, 0.75]]).log()
    >>> [sample(logits, torch.tensor([u]), 1.0)[0].item() for u in (0.0, 0.2, 0.3, 0.9)]
    [0, 0, 1, 1]
    """
    # In half precision small probabilities would vanish in the cumulative sum, and those tokens could never be drawn.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return logits.argmax(-1), logits.log_softmax(-1)
    logprobs = (logits / temperature).log_softmax(-1)  # (B, V)
    cumulative = logprobs.exp().cumsum(-1)  # (B, V)
    # The last entry is 1 only up to rounding, so the random number is scaled to it.
    threshold = noise.to(cumulative.dtype)[:, None] * cumulative[:, -1:]  # (B, 1)
    # The first token whose cumulative probability exceeds the threshold; "right" skips tokens of probability 0.
    ids = torch.searchsorted(cumulative, threshold, right=True)[:, 0]  # (B,)
    return ids.clamp(max=logits.shape[1] - 1), logprobs


def random_numbers(batch: int, max_new_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(noise (2, C, B), coins (C, B)), uniform in [0, 1): for sampling by the two models, and for the coins.

    Two generators, with the seeds 2 * seed and 2 * seed + 1, so that the random numbers for sampling are the same whatever p is.
    (torch's CPU generator keeps 32 bits of its seed, so 2 * seed + 1 must stay below 2**32.)
    """
    for_tokens, for_coins = (torch.Generator().manual_seed(2 * seed + i) for i in (0, 1))
    noise = torch.rand(2, max_new_tokens, batch, generator=for_tokens)
    return noise, torch.rand(max_new_tokens, batch, generator=for_coins)


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm: one rollout under the word schedule, no cache, no batch


@torch.no_grad()
def reference_rollout(
    pair: Pair, senior_prompt: list[int], junior_prompt: list[int], noise: torch.Tensor, coins: torch.Tensor, p: float, temperature: float
) -> list[tuple[int, str]]:
    """Write one completion: a list of (token id, author). noise (2, C) and coins (C,) are one row's random numbers."""
    models = {"senior": pair.senior, "junior": pair.junior}
    prompts = {"senior": senior_prompt, "junior": junior_prompt}
    written: list[tuple[int, str]] = []
    text, active, num_tosses = b"", None, 0
    for t in range(len(coins)):
        # 1. Each model reads its own prompt and the shared text, and samples a candidate.
        samples = {}
        for i, name in enumerate(models):
            ids = torch.tensor([prompts[name] + [token for token, _ in written]])  # (1, P + t)
            logits = models[name](input_ids=ids).logits[:, -1]  # (1, V)
            samples[name] = sample(logits, noise[i, t : t + 1], temperature)[0].item()
        # 2. If the active model's candidate opens a word, a coin names the writer.
        before = text.decode(errors="replace")
        if active is None or opens_word(before, pair.pieces[samples[active]].decode(errors="replace")):
            active = "senior" if coins[num_tosses] < p else "junior"
            num_tosses += 1
        # 3. The writer's candidate is written; both models read it in the next step.
        written.append((samples[active], active))
        text += pair.pieces[samples[active]]
        if samples[active] in pair.end_ids:
            break
    return written


# ----------------------------------------------------------------------------------------------------------------------
# The same, for a batch with caches and for any schedule


@torch.no_grad()
def rollout(
    pair: Pair, senior_prompts, junior_prompts, noise: torch.Tensor, coins: torch.Tensor, *, schedule="word", p=0.5, temperature=0.7
) -> Rollouts:
    """Let senior and junior write B completions of at most C tokens together.

    *_prompts: left-padded (ids, mask), (B, P) each; P may differ. noise (2, C, B) and coins (C, B): see random_numbers.
    p: the probability that a coin names the senior. At p = 1 the junior is never run, at p = 0 the senior never is. The
    models must not use dropout (lab/models.py turns it off). Raises ValueError if the numbers of prompts differ, and
    FloatingPointError if a model's logits are not finite, which would otherwise only make it look weak.
    """
    batch, max_new_tokens, device = len(senior_prompts[0]), len(coins), senior_prompts[0].device
    if len(junior_prompts[0]) != batch:
        raise ValueError(f"{batch} prompts for the senior, {len(junior_prompts[0])} for the junior: give one each")
    noise, coins = noise.to(device), coins.to(device)
    handoff = Handoff(pair.tables, schedule, p, coins)
    buffer = RolloutBuffer(batch, max_new_tokens, pair.end_ids, device)
    decoders, roles = make_decoders(pair, senior_prompts, junior_prompts, max_new_tokens, p)

    for t in range(max_new_tokens):
        # 1. Every model that takes part samples a candidate. A row keeps its own random numbers when others leave the batch.
        logits_by_role = [logits for decoder in decoders for logits in decoder.logits]  # (B, V) per role
        samples = [sample(logits, noise[role, t, buffer.rows], temperature) for role, logits in zip(roles, logits_by_role)]
        buffer.note_broken(t, roles, samples)
        # 2. The handoff keeps one of the two. If only one model takes part, its sample stands for both: at p = 0 senior_ids are the
        # junior's ids.
        (senior_ids, senior_logprobs), (junior_ids, _) = samples[0], samples[-1]
        ids, by_senior = handoff.choose(senior_ids, junior_ids)
        # 3. Tokens and authors are recorded. A finished row goes on sampling until it is dropped; its tokens are masked here.
        buffer.append(t, ids, by_senior, senior_logprobs if SENIOR in roles else None)
        # Also recorded, for readers only: the other candidate, and whether the token is the first since a toss.
        buffer.append_trace(t, torch.where(by_senior, junior_ids, senior_ids), handoff.since_toss == 1)
        # 4. Every few steps, finished rows are dropped from the batch, if there are enough of them (see RolloutBuffer).
        if t % buffer.CHECK_EVERY == buffer.CHECK_EVERY - 1:
            buffer.finish_answered(t, pair.pieces)
        index = buffer.rows_to_keep(t)
        if index is not None:
            if len(index) == 0:
                break
            ids = ids[index]
            for state in (buffer, handoff, *decoders):
                state.select_rows(index)
        # 5. Every model reads the written token, whichever model wrote it. After the last one there is nothing to predict.
        if t + 1 < max_new_tokens:
            for decoder in decoders:
                decoder.step(ids)
    return buffer.finish(senior_prompts, junior_prompts, pair.pieces)


def rollout_in_chunks(
    pair: Pair, senior_prompts, junior_prompts, noise: torch.Tensor, coins: torch.Tensor, *, max_rows: int, truncate_at: str, **options
) -> Rollouts:
    """`rollout` with at most `max_rows` rollouts in memory at a time, and the text from `truncate_at` on removed.

    options: schedule, p and temperature. The size of the chunks changes results by rounding only.
    """
    chunks = []
    for rows in torch.arange(len(senior_prompts[0])).split(max_rows):
        prompts = [trim_left(ids[rows], mask[rows]) for ids, mask in (senior_prompts, junior_prompts)]
        chunks.append(rollout(pair, *prompts, noise[:, :, rows], coins[:, rows], **options))
    return truncate(join(chunks), truncate_at, pair)


# Roles, as indices into the random numbers.
SENIOR, JUNIOR = 0, 1


def make_decoders(pair: Pair, senior_prompts, junior_prompts, max_new_tokens: int, p: float) -> tuple[list["CachedDecoder"], list[int]]:
    """The decoders needed for this p, and the roles whose logits they give, in order."""
    # A model that never writes need not read either.
    if p == 1:
        return [CachedDecoder(pair.senior, *senior_prompts, max_new_tokens)], [SENIOR]
    if p == 0:
        return [CachedDecoder(pair.junior, *junior_prompts, max_new_tokens)], [JUNIOR]
    if hasattr(pair.junior, "beside_senior"):
        # The junior is the senior's base with the adapter off (SharedJunior in lab/models.py). One forward pass over 2B rows
        # serves both: the adapter is on for the first B rows, the senior's, and off for the others.
        width = max(senior_prompts[0].shape[1], junior_prompts[0].shape[1])
        padded = [[functional.pad(x, (width - x.shape[1], 0)) for x in prompts] for prompts in (senior_prompts, junior_prompts)]
        ids, mask = (torch.cat(parts) for parts in zip(*padded))  # (2B, P) each
        return [CachedDecoder(pair.junior.beside_senior, ids, mask, max_new_tokens, num_roles=2)], [SENIOR, JUNIOR]
    senior = CachedDecoder(pair.senior, *senior_prompts, max_new_tokens)
    return [senior, CachedDecoder(pair.junior, *junior_prompts, max_new_tokens)], [SENIOR, JUNIOR]


class CachedDecoder:
    """One model's view of the shared text: its prompts, its key-value cache, its logits for the next token.

    With num_roles = 2 the model serves senior and junior in one pass, with twice the rows (the senior's first).
    """

    def __init__(self, model, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, max_new_tokens: int, num_roles: int = 1):
        rows, width = prompt_ids.shape
        self.model, self.num_roles, self.length = model, num_roles, 0
        shared = common_prefix(prompt_ids, prompt_mask, num_roles)
        if shared >= MIN_SHARED:
            prompt_ids, prompt_mask = prefix_first(prompt_ids, prompt_mask, shared, num_roles)
        self.cache = Cache(layer_class_to_replicate=partial(PreallocatedLayer, width + max_new_tokens))
        # Only prompts contain padding, so the mask is 1 at all later positions. What a finished row reads makes no difference.
        self.mask = torch.cat([prompt_mask, prompt_mask.new_ones(rows, max_new_tokens)], 1)  # (num_roles * B, P + C)
        # The position of the next token. Padding does not count; otherwise a row would depend on the longest prompt of the batch.
        self.position = prompt_mask.sum(1, keepdim=True)  # (num_roles * B, 1)
        # Only the logits at the last position are needed. With the integer 1 as logits_to_keep, the models would take a slice
        # that is not contiguous, and PyTorch would then copy the output layer once per row.
        self.last_position = torch.tensor([-1], device=prompt_ids.device)
        # Prefill: the whole prompts in one pass. (The positions of padding, -1 before the clamp, are masked.)
        position_ids = (prompt_mask.cumsum(1) - 1).clamp(min=0)
        if shared >= MIN_SHARED:
            # The solved examples with which all prompts begin are read once per role, and their keys and values are copied.
            batch, full_mask = rows // num_roles, self.mask
            self.mask = full_mask[::batch]
            self._forward(prompt_ids[::batch, :shared], position_ids[::batch, :shared])
            self.cache.batch_select_indices(torch.arange(num_roles, device=prompt_ids.device).repeat_interleave(batch))
            self.mask = full_mask
            prompt_ids, position_ids = prompt_ids[:, shared:], position_ids[:, shared:]
        self._forward(prompt_ids, position_ids)

    def step(self, ids: torch.Tensor) -> None:
        """Append one written token (B,) to what the model has read."""
        self._forward(ids.repeat(self.num_roles)[:, None], self.position)
        self.position = self.position + 1

    def _forward(self, ids: torch.Tensor, position_ids: torch.Tensor) -> None:
        self.length += ids.shape[1]
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask[:, : self.length],
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=self.last_position,
        )
        self.logits = out.logits[:, -1].chunk(self.num_roles)  # (B, V) per role

    def select_rows(self, index: torch.Tensor) -> None:
        batch = len(self.mask) // self.num_roles
        # Row i of role r is row i + r * batch of the decoder.
        index = torch.cat([index + role * batch for role in range(self.num_roles)])
        self.mask, self.position = self.mask[index], self.position[index]
        self.cache.batch_select_indices(index)


# A shorter common beginning is not worth a pass of its own.
MIN_SHARED = 64


def common_prefix(ids: torch.Tensor, mask: torch.Tensor, num_roles: int) -> int:
    """How many tokens all prompts of a role have in common at their beginning; of two roles, the smaller number. At most P - 1."""
    lengths = []
    for role_ids, role_mask in zip(ids.chunk(num_roles), mask.chunk(num_roles)):
        prompts = [row[real.bool()].tolist() for row, real in zip(role_ids, role_mask)]
        first, last = min(prompts), max(prompts)
        # Every prompt lies between these two in alphabetical order, so they share what all of them share.
        lengths.append(sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last[:-1]))))
    return min(lengths)


def prefix_first(ids: torch.Tensor, mask: torch.Tensor, shared: int, num_roles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `shared` tokens of every prompt, then its padding, then the rest of it, (B, P) as before."""
    padding = (mask == 0).sum(1, keepdim=True)  # (B, 1)
    column = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, P)
    # Column c of the result comes from column c + padding in the shared part, and from c - shared in the padding.
    source = torch.where(column < shared, column + padding, torch.where(column < shared + padding, column - shared, column))
    return ids.gather(1, source), mask.gather(1, source)


class RolloutBuffer:
    """The completions while they are being written: B rows of C columns, filled column by column."""

    # Checking for finished rows forces the CPU to wait for the GPU, so it happens only every 4 steps.
    CHECK_EVERY = 4
    # Compaction copies the key-value cache, so it waits until 20 % of the remaining rows have finished.
    COMPACT_AT = 0.8

    def __init__(self, batch: int, max_new_tokens: int, end_ids: list[int], device: torch.device):
        self.end_ids = torch.tensor(end_ids, device=device)
        # Padding could be any id: masks are recorded, never guessed from ids.
        self.ids = self.end_ids[0].repeat(batch, max_new_tokens)  # (B, C)
        self.mask, self.senior_mask = torch.zeros_like(self.ids), torch.zeros_like(self.ids)  # (B, C)
        self.discarded_ids, self.toss_mask = self.ids.clone(), torch.zeros_like(self.ids)  # (B, C)
        # float64 holds any model's output, including that of the tests' models in double precision.
        self.logprobs = torch.zeros(batch, max_new_tokens, dtype=torch.float64, device=device)  # (B, C)
        # Per role, the first step at which its logits were not finite.
        self.first_broken = torch.full((2,), max_new_tokens, device=device)
        # The b rollouts that are still in the batch, and which of them have no end token yet.
        self.rows = torch.arange(batch, device=device)  # (b,)
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)  # (b,)

    def note_broken(self, t: int, roles: list[int], samples: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Note the first step at which a model's logits were not finite; `finish` raises. Checking here would cost a wait per step."""
        for role, (_, logprobs) in zip(roles, samples):
            # A single NaN or +inf among the logits makes the log-probabilities of its whole row NaN.
            broken = logprobs[:, 0].isnan().any() & (self.first_broken[role] > t)
            self.first_broken[role] = torch.where(broken, t, self.first_broken[role])

    def append(self, t: int, ids: torch.Tensor, by_senior: torch.Tensor, senior_logprobs: torch.Tensor | None) -> None:
        """Fill column t of the b rows in the batch: ids (b,), authors (b,), the senior's log-probabilities (b, V)."""
        self.ids[self.rows, t] = torch.where(self.unfinished, ids, self.end_ids[0])
        self.mask[self.rows, t] = self.unfinished.long()
        self.senior_mask[self.rows, t] = (self.unfinished & by_senior).long()
        if senior_logprobs is not None:
            written = senior_logprobs.gather(1, ids[:, None])[:, 0].double()
            self.logprobs[self.rows, t] = torch.where(self.unfinished, written, 0.0)
        # The end token itself was recorded above with its author; only what would follow it is padding.
        self.unfinished = self.unfinished & ~torch.isin(ids, self.end_ids)

    def append_trace(self, t: int, discarded_ids: torch.Tensor, tossed: torch.Tensor) -> None:
        """Fill column t with the candidates that were not written, (b,), and whether a coin was tossed, (b,)."""
        self.discarded_ids[self.rows, t] = discarded_ids
        self.toss_mask[self.rows, t] = tossed.long()

    def finish_answered(self, t: int, pieces: list[bytes]) -> None:
        """Finish the rows that have completed their answer line up to step t; `truncate` removes what follows it."""
        for i, (ids, unfinished) in enumerate(zip(self.ids[self.rows, : t + 1].tolist(), self.unfinished.tolist())):
            if unfinished and ANSWERED.search(b"".join(pieces[token] for token in ids)):
                self.unfinished[i] = False

    def rows_to_keep(self, t: int) -> torch.Tensor | None:
        """Indices of the unfinished rows if it is time to compact the batch after step t, else None."""
        if t % self.CHECK_EVERY != self.CHECK_EVERY - 1:
            return None
        index = self.unfinished.nonzero()[:, 0]
        return index if len(index) <= self.COMPACT_AT * len(self.rows) else None

    def select_rows(self, index: torch.Tensor) -> None:
        self.rows, self.unfinished = self.rows[index], self.unfinished[index]

    def finish(self, senior_prompts, junior_prompts, pieces: list[bytes]) -> Rollouts:
        for name, step in zip(("senior", "junior"), self.first_broken.tolist()):
            if step < self.ids.shape[1]:
                raise FloatingPointError(f"the {name}'s logits are not finite at completion token {step + 1}")
        # Drop the columns that no rollout has reached.
        length = int(self.mask.sum(1).max())
        filled = (self.ids, self.mask, self.senior_mask, self.discarded_ids, self.toss_mask * self.mask, self.logprobs)
        columns = [x[:, :length] for x in filled]
        return Rollouts(*senior_prompts, *junior_prompts, *columns, decode(columns[0], columns[1], pieces))


class PreallocatedLayer(DynamicLayer):
    """The key-value cache of one layer, allocated once. The stock DynamicCache concatenates, and so copies, at every step.

    It overrides the two methods of transformers' DynamicLayer that decoding uses and, like it, exposes the filled part as
    `keys` and `values`.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0  # in tokens

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new tokens, (B, heads, new, width), and return those of all tokens so far."""
        if self.length == 0:
            self.lazy_initialization(keys, values)
            self.buffers = [x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (keys, values)]
        start, self.length = self.length, self.length + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:, :, start : self.length] = new
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        # Only the filled part is copied.
        for i, old in enumerate(self.buffers):
            self.buffers[i] = old.new_empty(len(indices), *old.shape[1:])
            self.buffers[i][:, :, : self.length] = old[indices, :, : self.length]
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


# ----------------------------------------------------------------------------------------------------------------------
# Working with rollouts


def trim_left(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded (ids, mask) without the columns that are padding in every row."""
    first = int(mask.any(0).long().argmax())
    return ids[:, first:], mask[:, first:]


def decode(ids: torch.Tensor, mask: torch.Tensor, pieces: list[bytes]) -> list[str]:
    """The text of each row, from the bytes of its tokens. Special tokens write nothing."""
    written = [b"".join(pieces[token] for token in row[real.bool()].tolist()) for row, real in zip(ids, mask)]
    return [text.decode(errors="replace") for text in written]


def join(parts: list[Rollouts]) -> Rollouts:
    """One batch out of several. Prompts are padded on the left to the longest of all, completions on the right."""

    def concatenate(name: str, left: bool) -> torch.Tensor:
        tensors = [getattr(part, name) for part in parts]
        width = max(tensor.shape[1] for tensor in tensors)
        gaps = [width - tensor.shape[1] for tensor in tensors]
        return torch.cat([functional.pad(x, (gap, 0) if left else (0, gap)) for x, gap in zip(tensors, gaps)])

    tensors = {name: concatenate(name, left="prompt" in name) for name in vars(parts[0]) if name != "texts"}
    return Rollouts(**tensors, texts=[text for part in parts for text in part.texts])


# A completion ends with the line that holds "####" and a number, as in evaluation harnesses.
ANSWERED = re.compile(rb"####[^\n]*[0-9][^\n]*\n")


def truncate(rollouts: Rollouts, stop: str, pair: Pair) -> Rollouts:
    """End every completion before the text `stop`: the token in which it begins, and all after it, become padding.

    A model that was shown solved examples may continue after its answer by inventing another question. The verifier does
    not see that text, which is masked out of the loss and of all counts of tokens, so that running on is not reinforced.
    (Nor is it discouraged, since the loss of such a completion contains no end token.)
    """
    mask = rollouts.completion_mask.clone()  # (B, C)
    for row in range(len(rollouts)):
        pieces = [pair.pieces[token] for token in rollouts.completion_ids[row][mask[row].bool()].tolist()]
        start = b"".join(pieces).find(stop.encode())
        ends = list(itertools.accumulate(len(piece) for piece in pieces))
        if start >= 0:
            # Keep the tokens that end at or before the first byte of `stop`.
            mask[row, sum(end <= start for end in ends) :] = 0
        answered = ANSWERED.search(b"".join(pieces))
        if answered:
            # Keep the tokens up to the one that writes the line break.
            mask[row, sum(end < answered.end() for end in ends) + 1 :] = 0
    texts = decode(rollouts.completion_ids, mask, pair.pieces)
    masked = {name: getattr(rollouts, name) * mask for name in ("senior_mask", "toss_mask", "logprobs")}
    return replace(rollouts, completion_mask=mask, **masked, texts=texts)
