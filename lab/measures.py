"""The measures of Tandem RL (Jiao et al., 2026): can the junior follow, and what has changed?

Every measure is a list with one number per held-out problem, so that intervals can be taken over
problems and seeds. One row per evaluation is written to measures.jsonl:

    solo           1 if the senior alone is right, else 0
    handoff        1 if both are right together, alternating at the end of every sentence, the
                   senior first, with one budget of tokens. (The paper alternates at the end of
                   paragraphs; here every line of a solution counts as a sentence.)
    word           the same with a coin before every word
    continued_25   1 if the junior is right when it continues the senior's solution, cut off after
                   25 % of its tokens (also 50 and 75)
    legibility     the junior's mean cross-entropy on the senior's solution, in nats per token
    drift          the mean divergence KL(senior || junior) per token of the senior's solution
    right_of_8     how many of 8 solutions of the senior are right, for pass@k; only before and
                   after training

Handoff robustness is the mean of `handoff`, and retention is that mean divided by the mean of
`solo`. legibility and drift are taken on the same solutions as `solo`, senior and junior each under
its own prompt.
The statistics that tables and figures need stand at the end of the file.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from lab import engine
from lab import problems as tasks
from metrics import distance_from_junior
from reinforce import full_logprobs
from reward import is_correct
from rollout import Pair, Rollouts, random_numbers, rollout

SAMPLES = 8  # solutions per problem for pass@k


def measure(
    solo: Rollouts, update: int, problems: list, args: Namespace, pair: Pair, generate: Callable
) -> dict:
    """One row of measures.jsonl. solo: the senior's solutions; generate: that of run_gsm8k.py."""
    write = partial(generate, args=args, pair=pair, seed=10**9 + args.seed)
    row: dict = {"update": update, "solo": right(solo.texts, problems)}
    taking_turns = write(problems, p=0.5, schedule="sentence", alternate=True)
    row["handoff"] = right(taking_turns.texts, problems)
    row["word"] = right(write(problems, p=0.5, schedule="word").texts, problems)
    for percent in (25, 50, 75):
        texts = continue_solutions(solo, percent / 100, args, pair)
        row[f"continued_{percent}"] = right(texts, problems)
    row |= compare(solo, pair, args.temperature)
    if update in (0, args.updates):
        # Seeds of their own, so that the first solution is not that of `solo` again.
        write = partial(generate, args=args, pair=pair, seed=15 * 10**8 + args.seed)
        again = right(write(problems * SAMPLES, p=1.0).texts, problems * SAMPLES)
        row[f"right_of_{SAMPLES}"] = torch.tensor(again).view(SAMPLES, -1).sum(0).tolist()
    return row


def right(texts: list[str], problems: list) -> list[int]:
    return [int(is_correct(text, problem.gold)) for text, problem in zip(texts, problems)]


@torch.no_grad()
def compare(solo: Rollouts, pair: Pair, temperature: float) -> dict[str, list[float]]:
    """legibility and drift of every solution: both models read it, and are compared."""
    found: dict[str, list[float]] = {"legibility": [], "drift": []}
    max_rows = max(1, engine.LOGITS_AT_ONCE // (solo.completion_ids.shape[1] * len(pair.pieces)))
    for rows in torch.arange(len(solo)).split(max_rows):
        few = engine.select(solo, rows.tolist())
        senior = full_logprobs(pair.senior, few, temperature=1.0)  # (b, C, V)
        junior = full_logprobs(pair.junior, few.as_read_by_junior(), temperature=1.0)  # (b, C, V)
        ids, mask = few.completion_ids, few.completion_mask
        for name, values in distance_from_junior(senior, junior, ids, mask, temperature).items():
            found[name] += [round(value, 5) for value in values.tolist()]
    return found


def continue_solutions(solo: Rollouts, share: float, args: Namespace, pair: Pair) -> list[str]:
    """The texts that result if the junior goes on after the leading `share` of each solution."""
    asked = _rows(solo.junior_prompt_ids, solo.junior_prompt_mask)
    wholes = _rows(solo.completion_ids, solo.completion_mask)
    kept = [whole[: int(share * len(whole))] for whole in wholes]
    # To the junior, its prompt and what the senior has written are one prompt.
    prompts = [prompt + beginning for prompt, beginning in zip(asked, kept)]
    noise, coins = random_numbers(len(solo), args.max_new_tokens, seed=10**9 + args.seed)

    def write(rows: slice) -> Rollouts:
        numbers = noise[:, :, rows].to(args.device), coins[:, rows]
        options = dict(p=0.0, temperature=args.temperature, stop=tasks.STOP)
        return rollout(pair, prompts[rows], prompts[rows], *numbers, **options)

    written = engine.in_chunks(write, len(solo), args.rollout_batch)
    texts = []
    for beginning, rest in zip(kept, _rows(written.completion_ids, written.completion_mask)):
        # The junior has the tokens that the senior has left of the common budget.
        tokens = beginning + rest[: args.max_new_tokens - len(beginning)]
        texts.append(b"".join(pair.pieces[token] for token in tokens).decode(errors="replace"))
    return texts


def _rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[real.bool()].tolist() for row, real in zip(ids, mask)]


# ------------------------------------------------------------------------------------------------
# Statistics of these measures


def pass_at_k(right: int, n: int, k: int) -> float:
    """Unbiased estimate of pass@k, the probability that one of k solutions is right.

    From `right` of n solutions: 1 minus the probability that k of the n, drawn without replacement,
    are all wrong (Chen et al., 2021).

    >>> pass_at_k(2, n=4, k=1), pass_at_k(2, n=4, k=2), pass_at_k(2, n=4, k=3)
    (0.5, 0.8333333333333334, 1.0)
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def bootstrap_interval(values: np.ndarray, statistic: Callable = np.sum) -> tuple[float, float]:
    """A 95 % bootstrap interval over seeds and problems (Efron, 1979), deterministic.

    values: (S, N, K), K measures on each of N problems for each of S seeds. Each resample draws S
    seeds with replacement, and N problems of each; the measures of a problem stay together.
    `statistic` maps the K means (K,) to a number; the default suits K = 1. The interval runs from
    the 2.5 % to the 97.5 % quantile of these numbers. With few seeds its coverage is not exactly
    95 %: too narrow if seeds differ a lot, too wide if they hardly do, because the sampling of
    problems enters twice.

    >>> bootstrap_interval(np.ones((3, 4, 1)))
    (1.0, 1.0)
    """
    rng, (seeds, problems, _) = np.random.default_rng(0), values.shape
    drawn = []
    for _ in range(2000):
        rows = rng.integers(seeds, size=(seeds, 1))
        columns = rng.integers(problems, size=(seeds, problems))
        drawn.append(statistic(values[rows, columns].mean((0, 1))))
    return tuple(np.quantile(drawn, (0.025, 0.975)).tolist())


# The 97.5 % quantiles of Student's t distribution with 1 to 9 degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def seed_interval(by_seed: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval for the mean of a number that was measured once per seed.

    The differences between seeds include the sampling of problems, so it covers both (Student,
    1908). Raises ValueError for fewer than 2 or more than 10 seeds.

    >>> [round(bound, 2) for bound in seed_interval([1.0, 2.0, 3.0])]
    [-0.48, 4.48]
    """
    n = len(by_seed)
    if not 2 <= n <= len(T_QUANTILES) + 1:
        raise ValueError(f"an interval over seeds needs 2 to {len(T_QUANTILES) + 1}, got {n}")
    mean, deviation = float(np.mean(by_seed)), float(np.std(by_seed, ddof=1))
    half_width = T_QUANTILES[n - 2] * deviation / math.sqrt(n)
    return mean - half_width, mean + half_width
