"""Co-generation: two models, two prompts, two key-value caches, one text.

At every step t each model m in {senior, junior} samples its own candidate for the next token, under its own prompt x_m
and after the same text y_<t. The handoff (tandem.py) keeps one of the two (West et al., 2025):

    y_t^m ~ pi_m( . | x_m, y_<t ; T)           y_t = y_t^senior if the senior is active, else y_t^junior

    symbol                  variable
    x_senior, x_junior      senior_prompts, junior_prompts: left-padded (ids, mask), (B, P) each, with different P
    y                       completion_ids (B, C); the end token belongs to the completion, padding follows it
    who wrote y_t           senior_mask (B, C), recorded at the moment of sampling and never inferred afterwards
    T                       temperature

The file begins with the algorithm for a single rollout, without a cache and without a batch. After it comes the same for a
batch: preallocated key-value caches, finished rows that leave the batch, and one forward pass for both models where the
junior is the senior's own base. A test holds the two equal, token by token.

Random numbers are drawn before the first token: one per row, step and model for sampling, one per row and toss for the
coins. A row's text therefore does not depend on which other rows are in the batch, and with p = 1 it is exactly what the
senior writes alone. There is no top-k or top-p sampling here: the log-probabilities in the loss would be wrong.
"""

import itertools
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from tandem import BoundaryTables, Handoff, opens_word

# Shapes: B rollouts, P prompt length (with padding), C completion length, V vocabulary size.


@dataclass
class Pair:
    """The two models and what they share. Both have the same vocabulary of V tokens (lab/models.py loads and checks them)."""

    senior: torch.nn.Module  # trained
    junior: torch.nn.Module  # frozen; any callable with the interface of a causal language model
    senior_tokenizer: object  # one vocabulary, but perhaps two chat templates
    junior_tokenizer: object
    end_ids: list[int]  # tokens with which either model ends a text
    pieces: list[bytes]  # the bytes that each token writes (tandem.token_bytes)
    tables: BoundaryTables  # the same as boolean tables (tandem.build_tables)


@dataclass
class Rollouts:
    """A batch of B completions together with the senior's prompts. Masks hold 1 for real tokens and 0 for padding."""

    prompt_ids: torch.Tensor  # (B, P), padded on the left
    prompt_mask: torch.Tensor  # (B, P)
    completion_ids: torch.Tensor  # (B, C), the end token included, padded on the right
    completion_mask: torch.Tensor  # (B, C)
    senior_mask: torch.Tensor  # (B, C), 1 where the senior wrote the token
    logprobs: torch.Tensor  # (B, C), the senior's log-probabilities at the sampling temperature; 0 where it was never run
    texts: list[str]  # the B completions as text, without special tokens

    def __len__(self) -> int:
        return len(self.completion_ids)

    def to(self, device: torch.device | str) -> "Rollouts":
        tensors = {field.name: getattr(self, field.name).to(device) for field in fields(self) if field.name != "texts"}
        return Rollouts(**tensors, texts=self.texts)

    def handoffs(self) -> torch.Tensor:
        """How often the author changes in each rollout, (B,)."""
        changes = self.senior_mask[:, 1:] != self.senior_mask[:, :-1]
        return (changes & self.completion_mask[:, 1:].bool()).sum(1)

    def author_spans(self, pieces: list[bytes]) -> list[list[tuple[str, str]]]:
        """Who wrote what, per rollout: [("senior", "Natalia sold"), ("junior", " 48"), ...].

        The bytes of neighbouring tokens by one author are joined before they are decoded, because a token alone need not
        be valid text (pieces: tandem.token_bytes).
        """
        spans = []
        for ids, by_senior, real in zip(self.completion_ids, self.senior_mask, self.completion_mask.bool()):
            text_by_author: list[tuple[str, bytes]] = []
            for token, is_senior in zip(ids[real].tolist(), by_senior[real].tolist()):
                author, before = ("senior" if is_senior else "junior"), b""
                if text_by_author and text_by_author[-1][0] == author:
                    before = text_by_author.pop()[1]
                text_by_author.append((author, before + pieces[token]))
            spans.append([(author, text.decode(errors="replace")) for author, text in text_by_author if text])
        return spans


def sample(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample from softmax(logits / T) with given random numbers, by inverting the cumulative distribution.

    logits (B, V), noise (B,) uniform in [0, 1)  ->  ids (B,), log-probabilities of all tokens (B, V). Temperature 0 is
    greedy decoding.

    >>> logits = torch.tensor([[0.25, 0.75]]).log()
    >>> [sample(logits, torch.tensor([u]), 1.0)[0].item() for u in (0.0, 0.2, 0.3, 0.9)]
    [0, 0, 1, 1]
    """
    # Half precision is not enough: sums over a large vocabulary would lose whole tokens.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return logits.argmax(-1), logits.log_softmax(-1)
    logprobs = (logits / temperature).log_softmax(-1)  # (B, V)
    cumulative = logprobs.exp().cumsum(-1)  # (B, V)
    # The last entry is 1 only up to rounding, so the random number is scaled to it.
    threshold = noise.to(cumulative.dtype)[:, None] * cumulative[:, -1:]  # (B, 1)
    ids = torch.searchsorted(cumulative, threshold, right=True)[:, 0]  # (B,)
    return ids.clamp(max=logits.shape[1] - 1), logprobs


def random_numbers(batch: int, max_new_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(noise (2, C, B), coins (C, B)), uniform in [0, 1): for sampling by the two models, and for the coins.

    Two generators, so that the candidates of a step are the same whatever p is. (torch's CPU generator keeps 32 bits of a
    seed, so seed and seed + 2**32 give the same numbers.)
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
    pair: Pair,
    senior_prompts: tuple[torch.Tensor, torch.Tensor],
    junior_prompts: tuple[torch.Tensor, torch.Tensor],
    noise: torch.Tensor,
    coins: torch.Tensor,
    *,
    schedule: str = "word",
    p: float = 0.5,
    temperature: float = 0.7,
    max_rows: int | None = None,
    stop: str | None = None,
) -> Rollouts:
    """Let senior and junior write B completions of at most C tokens together.

    *_prompts: left-padded (ids, mask), (B, P) each; P may differ. noise (2, C, B) and coins (C, B): see random_numbers.
    p: the probability that a coin names the senior. At p = 1 the junior is never run, at p = 0 the senior never is.
    max_rows: how many rollouts are in memory at a time (default: all B). This changes results by rounding only.
    stop: a completion ends before this text (see truncate). Raises ValueError for prompts of different number.
    """
    if len(senior_prompts[0]) != len(junior_prompts[0]):
        raise ValueError(f"{len(senior_prompts[0])} prompts for the senior, {len(junior_prompts[0])} for the junior: give one each")
    chunks = []
    for rows in torch.arange(len(senior_prompts[0])).split(max_rows or len(senior_prompts[0])):
        prompts = [trim_left(ids[rows], mask[rows]) for ids, mask in (senior_prompts, junior_prompts)]
        chunks.append(_rollout_chunk(pair, *prompts, noise[:, :, rows], coins[:, rows], schedule, p, temperature))
    rollouts = join(chunks)
    return rollouts if stop is None else truncate(rollouts, stop, pair)


def _rollout_chunk(
    pair: Pair, senior_prompts, junior_prompts, noise: torch.Tensor, coins: torch.Tensor, schedule: str, p: float, temperature: float
) -> Rollouts:
    """The B rollouts of one chunk, all in memory at once. Shapes as in `rollout`."""
    device, max_new_tokens = senior_prompts[0].device, len(coins)
    noise, coins = noise.to(device), coins.to(device)
    handoff = Handoff(pair.tables, schedule, p, coins)
    buffer = RolloutBuffer(len(senior_prompts[0]), max_new_tokens, pair.end_ids, device)
    decoders, roles = make_decoders(pair, senior_prompts, junior_prompts, max_new_tokens, p)

    for t in range(max_new_tokens):
        # 1. Every model that takes part samples a candidate. With a single writer, its sample is passed for both.
        logits = [part for decoder in decoders for part in decoder.logits]  # (B, V) per role
        samples = [sample(part, noise[role, t, buffer.rows], temperature) for role, part in zip(roles, logits)]
        (senior_ids, senior_logprobs), (junior_ids, _) = samples[0], samples[-1]
        # 2. The handoff keeps one of the two, and its author is recorded.
        ids, by_senior = handoff.choose(senior_ids, junior_ids)
        buffer.append(t, ids, by_senior, senior_logprobs if SENIOR in roles else None)
        # 3. Finished rows leave the batch from time to time.
        index = buffer.unfinished_rows(t)
        if index is not None:
            if len(index) == 0:
                break
            ids = ids[index]
            for part in (buffer, handoff, *decoders):
                part.select_rows(index)
        # 4. Every model reads the token that was written, whoever wrote it.
        if t + 1 < max_new_tokens:
            for decoder in decoders:
                decoder.step(ids)
    return buffer.rollouts(senior_prompts, pair.senior_tokenizer)


SENIOR, JUNIOR = 0, 1  # roles, as indices into noise


def make_decoders(pair: Pair, senior_prompts, junior_prompts, max_new_tokens: int, p: float) -> tuple[list["CachedDecoder"], list[int]]:
    """The decoders that p calls for, and the roles whose logits they give, in order."""
    if p == 1:
        return [CachedDecoder(pair.senior, *senior_prompts, max_new_tokens)], [SENIOR]
    if p == 0:
        return [CachedDecoder(pair.junior, *junior_prompts, max_new_tokens)], [JUNIOR]
    if hasattr(pair.junior, "beside_senior"):
        # One copy of the weights: a single forward pass over the rows of both models, the senior's first.
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
        self.cache = Cache(layer_class_to_replicate=partial(PreallocatedLayer, width + max_new_tokens))
        self.mask = torch.cat([prompt_mask, prompt_mask.new_ones(rows, max_new_tokens)], 1)  # (num_roles * B, P + C)
        self.position = prompt_mask.sum(1, keepdim=True)  # (num_roles * B, 1), of the next token: padding takes no position
        # Prefill: all prompt tokens in one pass.
        self._forward(prompt_ids, (prompt_mask.cumsum(1) - 1).clamp(min=0))

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
            logits_to_keep=1,
        )
        self.logits = out.logits[:, -1].chunk(self.num_roles)  # (B, V) per role

    def select_rows(self, index: torch.Tensor) -> None:
        batch = len(self.mask) // self.num_roles
        index = torch.cat([index + role * batch for role in range(self.num_roles)])
        self.mask, self.position = self.mask[index], self.position[index]
        self.cache.batch_select_indices(index)


class RolloutBuffer:
    """The completions while they are being written: B rows of C columns, filled column by column."""

    CHECK_EVERY = 4  # looking for finished rows forces a GPU synchronisation, so it happens every 4 steps
    COMPACT_AT = 0.8  # compaction copies the key-value cache, so it waits until 20 % of the batch has finished

    def __init__(self, batch: int, max_new_tokens: int, end_ids: list[int], device: torch.device):
        self.end_ids = torch.tensor(end_ids, device=device)
        # Padding could be any id: masks are recorded, never guessed from ids.
        self.ids = self.end_ids[0].repeat(batch, max_new_tokens)  # (B, C)
        self.mask, self.senior_mask = torch.zeros_like(self.ids), torch.zeros_like(self.ids)  # (B, C)
        self.logprobs = torch.zeros(batch, max_new_tokens, dtype=torch.float64, device=device)  # (B, C)
        self.rows = torch.arange(batch, device=device)  # (b,) the rollouts that are still in the batch
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)  # (b,) of these, those without an end token

    def append(self, t: int, ids: torch.Tensor, by_senior: torch.Tensor, senior_logprobs: torch.Tensor | None) -> None:
        """Write column t of the b rows in the batch: ids (b,), authors (b,), the senior's log-probabilities (b, V)."""
        self.ids[self.rows, t] = torch.where(self.unfinished, ids, self.end_ids[0])
        self.mask[self.rows, t] = self.unfinished.long()
        self.senior_mask[self.rows, t] = (self.unfinished & by_senior).long()
        if senior_logprobs is not None:
            written = senior_logprobs.gather(1, ids[:, None])[:, 0].double()
            self.logprobs[self.rows, t] = torch.where(self.unfinished, written, 0.0)
        # The end token itself has been recorded above; only what would follow it is padding.
        self.unfinished = self.unfinished & ~torch.isin(ids, self.end_ids)

    def unfinished_rows(self, t: int) -> torch.Tensor | None:
        """The rows to keep (b',) if finished rows are to leave the batch after step t, else None. Empty if all are finished."""
        if t % self.CHECK_EVERY != self.CHECK_EVERY - 1:
            return None
        index = self.unfinished.nonzero()[:, 0]
        return index if len(index) <= self.COMPACT_AT * len(self.rows) else None

    def select_rows(self, index: torch.Tensor) -> None:
        self.rows, self.unfinished = self.rows[index], self.unfinished[index]

    def rollouts(self, prompts: tuple[torch.Tensor, torch.Tensor], tokenizer) -> Rollouts:
        length = int(self.mask.sum(1).max())
        columns = [x[:, :length] for x in (self.ids, self.mask, self.senior_mask, self.logprobs)]
        return Rollouts(*prompts, *columns, decode(columns[0], columns[1], tokenizer))


class PreallocatedLayer(DynamicLayer):
    """The key-value cache of one layer, allocated once. The stock DynamicCache concatenates, and so copies, at every step."""

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


def decode(ids: torch.Tensor, mask: torch.Tensor, tokenizer) -> list[str]:
    return [tokenizer.decode(row[real.bool()], skip_special_tokens=True) for row, real in zip(ids, mask)]


def join(parts: list[Rollouts]) -> Rollouts:
    """Concatenate batches. Prompts are padded on the left to the longest, completions on the right."""

    def concatenate(name: str, left: bool) -> torch.Tensor:
        tensors = [getattr(part, name) for part in parts]
        width = max(tensor.shape[1] for tensor in tensors)
        gaps = [width - tensor.shape[1] for tensor in tensors]
        return torch.cat([functional.pad(x, (gap, 0) if left else (0, gap)) for x, gap in zip(tensors, gaps)])

    tensors = {name: concatenate(name, left=name.startswith("prompt")) for name in vars(parts[0]) if name != "texts"}
    return Rollouts(**tensors, texts=[text for part in parts for text in part.texts])


def truncate(rollouts: Rollouts, stop: str, pair: Pair) -> Rollouts:
    """End every completion before the text `stop`: the token in which it begins, and all after it, become padding.

    A model that was shown solved examples may go on with a question of its own after its answer. That is neither read by
    the verifier nor learned from: it leaves the masks of the loss, and with them the counts of tokens.
    """
    mask = rollouts.completion_mask.clone()  # (B, C)
    for row in range(len(rollouts)):
        pieces = [pair.pieces[token] for token in rollouts.completion_ids[row][mask[row].bool()].tolist()]
        start = b"".join(pieces).find(stop.encode())
        if start >= 0:
            # Keep the tokens that end at or before the first byte of `stop`.
            ends = itertools.accumulate(len(piece) for piece in pieces)
            mask[row, sum(end <= start for end in ends) :] = 0
    texts = decode(rollouts.completion_ids, mask, pair.senior_tokenizer)
    return replace(rollouts, completion_mask=mask, senior_mask=rollouts.senior_mask * mask, logprobs=rollouts.logprobs * mask, texts=texts)
