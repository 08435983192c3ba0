"""Co-generation: two models, two prompts, one text.

At every step t each of the two models samples its own candidate for the next token, under its own
prompt x and after the same text y_<t. The handoff (tandem.py) decides who is active, and keeps that
model's candidate (West et al., 2025):

    y_t^senior ~ pi_senior( . | x_senior, y_<t ; T)     y_t = y_t^senior if the senior is active
    y_t^junior ~ pi_junior( . | x_junior, y_<t ; T)           y_t^junior otherwise

    symbol                variable
    x_senior, x_junior    senior_prompts, junior_prompts: token ids, which may differ in length
    y                     completion_ids (B, C); the end token belongs to the completion
    who wrote y_t         senior_mask (B, C), recorded when it is sampled and never inferred later
    T                     temperature

Below stand `sample`, the algorithm for one rollout, without cache and batch, and the same for a
batch; a test checks that both write the same tokens. What makes it fast is in lab/engine.py.

All random numbers are drawn in advance: one per row, step and model for sampling, and for each row
a list of coins, which its tosses use up in order. So, up to rounding, a row's text does not depend
on the other rows of the batch, and the senior samples with the same numbers whether it writes alone
(p = 1) or with the junior. There is no top-k or top-p: the loss uses log-probabilities
under the full softmax.
"""

from dataclasses import dataclass, replace
from re import Pattern

import torch

from lab.engine import Decoder, pad
from tandem import Handoff, decode, next_token

# Shapes: B rollouts, P prompt length (with padding), C completion length, V vocabulary size.


@dataclass
class Pair:
    """Two models that share a vocabulary of V tokens. lab/models.py loads and checks them."""

    senior: torch.nn.Module  # trained
    junior: torch.nn.Module  # frozen; any callable with the interface of a causal language model
    senior_tokenizer: object  # one vocabulary, but perhaps two chat templates
    junior_tokenizer: object
    end_ids: list[int]  # tokens that end a completion, whichever model writes them
    pieces: list[bytes]  # the bytes that each token writes
    both: object = None  # one forward pass for both models, if the junior is the senior's base


def sample(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sample from softmax(logits / T) with given random numbers, by inverting the cumulative sum.

    logits (B, V), noise (B,) uniform in [0, 1) -> ids (B,). Temperature 0 is greedy decoding.
    Raises FloatingPointError if a logit is NaN or +inf: a broken model would merely look weak.

    >>> logits = torch.tensor([[0.25, 0.75]]).log()
    >>> [sample(logits, torch.tensor([u]), 1.0).item() for u in (0.0, 0.2, 0.3, 0.9)]
    [0, 0, 1, 1]
    """
    # In half precision small probabilities would vanish in the cumulative sum.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, V)
    if not logits.amax(-1).isfinite().all():
        raise FloatingPointError("the logits of a model are not finite: check its weights")
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)  # (B, V)
    # The last entry is 1 only up to rounding, so the random number is scaled to it.
    threshold = noise.to(cumulative.dtype)[:, None] * cumulative[:, -1:]  # (B, 1)
    # The first token whose cumulative probability exceeds the threshold; "right" skips tokens of
    # probability 0.
    ids = torch.searchsorted(cumulative, threshold, right=True)[:, 0]  # (B,)
    # The product above may be rounded up to the last entry, which no entry exceeds.
    return ids.clamp(max=logits.shape[1] - 1)


def random_numbers(batch: int, max_new_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(noise (2, C, B), coins (C, B)), uniform in [0, 1): for sampling, and for the coins.

    Two generators, with the seeds 2 * seed and 2 * seed + 1. Neither depends on p. (torch keeps 32
    bits of a seed: 2 * seed + 1 must be below 2**32.)
    """
    for_tokens, for_coins = (torch.Generator().manual_seed(2 * seed + i) for i in (0, 1))
    noise = torch.rand(2, max_new_tokens, batch, generator=for_tokens)
    return noise, torch.rand(max_new_tokens, batch, generator=for_coins)


# ------------------------------------------------------------------------------------------------
# The algorithm: one rollout under the word schedule


@torch.no_grad()
def reference_rollout(
    pair: Pair, senior_prompt: list[int], junior_prompt: list[int], noise, coins, p, temperature
) -> list[tuple[int, str]]:
    """Write one completion: a list of (token id, author). noise (2, C) and coins (C,)."""
    models = {"senior": pair.senior, "junior": pair.junior}
    prompts = {"senior": senior_prompt, "junior": junior_prompt}
    written: list[tuple[int, str]] = []
    # The outcomes of the coins, of which each toss uses the next one.
    names = iter(["senior" if coin < p else "junior" for coin in coins])
    text, active = b"", None
    for t in range(len(coins)):
        # 1. Each model reads its own prompt and the shared text, and samples a candidate.
        samples = {}
        for i, name in enumerate(models):
            ids = torch.tensor([prompts[name] + [token for token, _ in written]])  # (1, P + t)
            logits = models[name](input_ids=ids).logits[:, -1]  # (1, V)
            samples[name] = sample(logits, noise[i, t : t + 1], temperature).item()
        # 2. If the active model's candidate opens a word, a coin names the writer.
        candidates = [decode(pair.pieces[samples[name]]) for name in models]
        _, active = next_token(decode(text), active, *candidates, names)
        # 3. The writer's candidate is written; both models read it in the next step.
        written.append((samples[active], active))
        text += pair.pieces[samples[active]]
        if samples[active] in pair.end_ids:
            break
    return written


# ------------------------------------------------------------------------------------------------
# The same for a batch, and for any schedule


@dataclass
class Rollouts:
    """B completions with both prompts. Padding is 0 in every mask, and tokens are 1 but for the
    junior's in senior_mask."""

    prompt_ids: torch.Tensor  # (B, P), the senior's prompts, padded on the left
    prompt_mask: torch.Tensor  # (B, P)
    junior_prompt_ids: torch.Tensor  # (B, P'); P' may differ from P
    junior_prompt_mask: torch.Tensor  # (B, P')
    completion_ids: torch.Tensor  # (B, C), the end token included, padded on the right
    completion_mask: torch.Tensor  # (B, C)
    senior_mask: torch.Tensor  # (B, C), 1 where the senior wrote the token
    texts: list[str]  # the B completions, without special tokens

    def __len__(self) -> int:
        return len(self.completion_ids)

    def model_inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompts and completions as one sequence: ids, mask and position ids, (B, P+C) each."""
        ids = torch.cat([self.prompt_ids, self.completion_ids], 1)
        mask = torch.cat([self.prompt_mask, self.completion_mask], 1)
        # Padding does not advance the position, exactly as during sampling.
        return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)

    def as_read_by_junior(self) -> "Rollouts":
        """The same completions after the junior's prompts, for the junior to score."""
        return replace(self, prompt_ids=self.junior_prompt_ids, prompt_mask=self.junior_prompt_mask)


@torch.no_grad()
def rollout(
    pair: Pair,
    senior_prompts: list[list[int]],
    junior_prompts: list[list[int]],
    noise: torch.Tensor,
    coins: torch.Tensor,
    *,
    schedule: str = "word",
    p: float = 0.5,
    temperature: float = 0.7,
    stop: Pattern[bytes] | None = None,
    trace: list | None = None,
) -> Rollouts:
    """Let senior and junior write B completions of at most C tokens together.

    *_prompts: B lists of token ids each. noise (2, C, B) and coins (C, B): see random_numbers.
    p: the probability that a coin names the senior. At p = 1 the junior is never run, at p = 0 the
    senior never is. stop: a completion ends with the token that makes its text match, for instance
    the line break after the answer. trace: a list to which each step appends (rows, the senior's
    candidates, the junior's, whether a coin was tossed before the token), for lab/viewer.py.
    Raises ValueError if the numbers of prompts differ.
    """
    max_new_tokens, batch = coins.shape
    if not len(senior_prompts) == len(junior_prompts) == batch:
        counts = f"{len(senior_prompts)} and {len(junior_prompts)} prompts"
        raise ValueError(f"{counts} for {batch} rollouts: give one prompt per model and rollout")
    # handoff: text and active model of each row. decoder: both models, with their prompts read.
    handoff = Handoff(pair.pieces, schedule, p, coins)
    decoder = Decoder(pair, senior_prompts, junior_prompts, max_new_tokens, p, noise.device)
    # What is written, by row of the whole batch. `rows` are those that are still being written.
    rows = list(range(batch))
    ids: list[list[int]] = [[] for _ in rows]
    authors: list[list[int]] = [[] for _ in rows]
    finished = [False] * batch

    for t in range(max_new_tokens):
        # 1. Each model samples a candidate for every row. If only one model runs (p = 0 or 1), its
        # sample serves as both candidates.
        senior_logits, junior_logits = decoder.logits  # (b, V) each
        if p > 0:
            senior_ids = junior_ids = sample(senior_logits, noise[0, t, rows], temperature).tolist()
        if p < 1:
            junior_ids = sample(junior_logits, noise[1, t, rows], temperature).tolist()
        if p == 0:
            senior_ids = junior_ids
        # 2. The handoff keeps one of the two.
        by_senior = handoff.choose(rows, senior_ids, junior_ids)
        written = [s if senior else j for s, j, senior in zip(senior_ids, junior_ids, by_senior)]
        # 3. Tokens and authors are recorded. A finished row goes on, unrecorded, until it leaves.
        for row, token, senior in zip(rows, written, by_senior):
            if not finished[row]:
                ids[row].append(token)
                authors[row].append(int(senior))
                done = stop is not None and stop.search(handoff.text[row]) is not None
                finished[row] = done or token in pair.end_ids
        # What the page of rollouts shows of the step (lab/viewer.py).
        if trace is not None:
            # After a toss, the written token is the only one since that toss.
            tossed = [len(handoff.recent[row]) == 1 for row in rows]
            trace.append((rows, senior_ids, junior_ids, tossed))
        if all(finished):
            break
        # 4. Finished rows leave the batch when there are enough of them.
        kept = decoder.compact([finished[row] for row in rows])
        if kept is not None:
            rows, written = [rows[i] for i in kept], [written[i] for i in kept]
        # 5. Both models read the written token, whoever wrote it.
        if t + 1 < max_new_tokens:
            decoder.step(written)

    # The end token has no text. A character that was cut off by the last token becomes U+FFFD.
    texts = [b"".join(pair.pieces[token] for token in row).decode(errors="replace") for row in ids]
    device = noise.device
    prompts = *pad(senior_prompts, "left", device), *pad(junior_prompts, "left", device)
    return Rollouts(*prompts, *pad(ids, "right", device), pad(authors, "right", device)[0], texts)
