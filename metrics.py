"""What is measured: accuracy, jargon, language, handoffs, the distance from the junior; and how uncertain a number is.

    accuracy     share of solutions that are correct (reward.is_correct)
    jargon       share of solutions with "<<" or ">>". The paper counts calculator annotations (West et al., 2025); half an
                 annotation counts here too, because a handoff can cut one in two
    languages    share of solutions by their most likely language, among the languages passed in (library py3langid)
    tokens       in an evaluation, the mean length of a completion; in a training batch, the total number of tokens
    handoffs     changes of author per rollout, and how many of them fall inside an expression such as 48/2=<<48/2=24>>24.
                 Training batches also count a change before the end token, which has no text

    legibility   the junior's cross-entropy on the senior's solutions: the higher, the less legible
    drift        how far the senior's distribution is from the junior's
    pass@k       probability that at least one of k solutions is right

A solution that mixes two languages is counted under the likelier one. Everything here works on text, masks and
log-probabilities. Neither senior nor junior is run here.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from reinforce import kl_estimate
from reward import is_correct

if TYPE_CHECKING:
    from rollout import Rollouts

# ----------------------------------------------------------------------------------------------------------------------
# Metrics of a single solution


# An annotation, or half of one that a handoff has cut in two. To study another jargon, change this and `annotated_solutions`
# in lab/specialist.py, which teaches it.
JARGON = re.compile(r"<<[^\n]*?>>|<<|>>")


def has_jargon(text: str) -> bool:
    """Whether a solution contains a calculator annotation, or half of one.

    >>> has_jargon("48/2 = <<48/2=24>>24"), has_jargon("48/2 = 24"), has_jargon("48/2 = <<48/")
    (True, False, True)
    """
    return JARGON.search(text) is not None


# Every metric maps (solution, gold answer) to a number, and an evaluation reports its mean. To add a metric, name it here.
# It is then recorded with every evaluation in metrics.jsonl and has a column in the tables of lab/figures.py.
METRICS: dict[str, Callable[[str, str], float]] = {
    "accuracy": is_correct,
    "jargon": lambda solution, gold: has_jargon(solution),
}

# Annotations, punctuation, digits and underscores. The straight apostrophe stays, because words contain it.
NOT_WORDS = re.compile(r"<<[^\n]*?>>|[^\w\s']|[\d_]")


def language_of(text: str, languages: Sequence[str]) -> str:
    """The most likely of `languages` (ISO 639-1 codes) for the words of a text, or "none" if it has no words.

    Numbers, punctuation and annotations are removed first, because they belong to no language. Raises ValueError for a
    code that py3langid does not know (it would silently leave that language out of its ranking).
    """
    # Open in paper: how languages are identified. We use py3langid.
    import py3langid  # imported here because it loads a model, which takes a second

    words = " ".join(NOT_WORDS.sub(" ", text).split())
    ranked = [code for code, _ in py3langid.rank(words) if code in languages]  # likeliest first
    if set(ranked) != set(languages):
        raise ValueError(f"py3langid does not know {sorted(set(languages) - set(ranked))}: use ISO 639-1 codes such as 'en'")
    return ranked[0] if words else "none"


def summarise(texts: Sequence[str], golds: Sequence[str], lengths: Sequence[int], languages: Sequence[str]) -> dict:
    """The evaluation of n solutions, in the form written to metrics.jsonl: n, mean of each metric, languages, mean length."""
    n = len(texts)
    means = {name: sum(metric(text, gold) for text, gold in zip(texts, golds)) / n for name, metric in METRICS.items()}
    counts = Counter(language_of(text, languages) for text in texts)
    shares = {language: count / n for language, count in sorted(counts.items())}
    # The outcome on every problem, so that two arms can be compared problem by problem.
    outcomes = {name: [float(metric(text, gold)) for text, gold in zip(texts, golds)] for name, metric in METRICS.items()}
    outcomes["language"] = [language_of(text, languages) for text in texts]
    return {"n": n, **means, "languages": shares, "tokens": sum(lengths) / n, "outcomes": outcomes}


# ----------------------------------------------------------------------------------------------------------------------
# Handoffs

# An operand is a number with its brackets, currency or percent sign: "48", "(1,000", "$5.50", "20%)".
OPERAND = r"[($]*[0-9]+(?:[.,][0-9]+)*[)%]*"
# Operands joined by operators and annotation marks, possibly cut off after an operator: "12-5=<<12-5=7>>7", "48 / 2 =".
EXPRESSION = re.compile(rf"(?:<<)?{OPERAND}(?:\s?[-+*/×÷=<>]+\s?{OPERAND})+(?:\s?[=<>]+)?")


def count_handoffs(rollouts: Sequence[Sequence[tuple[str, str]]]) -> dict:
    """Mean number of handoffs per rollout: all of them, and those inside an expression, inside a word and inside a number.

    Each rollout is a list of (author, text) spans, as returned by Rollouts.author_spans. According to the paper, the
    pressure against jargon comes from handoffs inside an expression: the junior has to finish arithmetic in a notation that
    it was never taught. A handoff is inside a word if the characters on both sides of it are letters, and inside a number
    if they are digits. A handoff inside a number of an expression counts as both.

    >>> count_handoffs([[("senior", "She has 48/"), ("junior", "2=24"), ("senior", " cl"), ("junior", "ips")]])
    {'handoffs': 3.0, 'handoffs_inside': 1.0, 'handoffs_in_words': 1.0, 'handoffs_in_numbers': 0.0}
    """
    total = inside = in_words = in_numbers = 0
    for spans in rollouts:
        whole = "".join(text for _, text in spans)
        expressions = [match.span() for match in EXPRESSION.finditer(whole)]
        position = 0
        for _, text in spans[:-1]:
            # There is a handoff at the end of every span but the last. The edges of an expression do not count as inside.
            position += len(text)
            total += 1
            inside += any(start < position < end for start, end in expressions)
            around = whole[max(0, position - 1) : position + 1]  # the character before and the one after
            in_words += len(around) == 2 and around.isalpha()
            in_numbers += len(around) == 2 and around.isdecimal()
    counts = {"handoffs": total, "handoffs_inside": inside, "handoffs_in_words": in_words, "handoffs_in_numbers": in_numbers}
    return {name: count / len(rollouts) for name, count in counts.items()}


def batch_statistics(rollouts: "Rollouts", rewards: torch.Tensor) -> dict:
    """What a row of metrics.jsonl says about a training batch. rewards: (B,).

    logprob_right and logprob_wrong are the senior's mean log-probabilities in nats per token, whoever wrote the token, of
    rollouts with full reward and of all others. A negative c pushes the latter down, and nothing bounds it from below.
    """
    num_tokens = int(rollouts.completion_mask.sum())

    def mean_logprob(chosen: torch.Tensor) -> float | None:
        # Log-probabilities are zero at padding.
        return (rollouts.logprobs[chosen].sum() / rollouts.completion_mask[chosen].sum()).item() if chosen.any() else None

    return {
        "reward": rewards.mean().item(),
        "senior_share": int(rollouts.senior_mask.sum()) / num_tokens,
        "handoffs": rollouts.handoffs().float().mean().item(),
        "tokens": num_tokens,
        "jargon": sum(map(has_jargon, rollouts.texts)) / len(rollouts),
        "logprob_right": mean_logprob(rewards == 1),
        "logprob_wrong": mean_logprob(rewards != 1),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Tandem RL: how far the senior is from its junior, and pass@k


def distance_from_junior(
    senior: torch.Tensor, junior: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, temperature: float
) -> dict[str, torch.Tensor]:
    """How far the models differ on solutions that the senior wrote: three means over the tokens of a solution, (B,), in nats.

    senior, junior: log-probabilities of the whole vocabulary before every token, at temperature 1, (B, C, V). ids, mask:
    (B, C). temperature: that of sampling, at which the two distributions are compared.

        legibility   -log junior(y_t), at temperature 1                   the junior's cross-entropy
        drift        sum_v senior(v) * (log senior(v) - log junior(v))    KL(senior || junior), exact over the vocabulary
        drift_k3     its estimate from y_t alone (reinforce.py, equation 6)
    """

    def of_written(logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.gather(2, ids[:, :, None])[:, :, 0]  # (B, C)

    # Open in paper: how the distance from the junior was measured.
    # Log-probabilities are logits up to a constant, so they can be divided by the temperature instead.
    s, j = ((logprobs / temperature).log_softmax(-1) for logprobs in (senior, junior))  # (B, C, V) each
    per_token = {
        "legibility": -of_written(junior),
        "drift": (s.exp() * (s - j)).sum(-1),
        "drift_k3": kl_estimate(of_written(s), of_written(j), mask),
    }
    # An empty solution has the value 0.
    return {name: (values * mask).sum(1) / mask.sum(1).clamp(min=1) for name, values in per_token.items()}


def pass_at_k(right: int, n: int, k: int) -> float:
    """Unbiased estimate of pass@k, the probability that one of k solutions is right, from `right` of n (Chen et al., 2021).

    That is 1 minus the probability that k of the n, drawn without replacement, are all wrong. Raises ValueError unless
    0 <= right <= n and 1 <= k <= n.

    >>> pass_at_k(2, n=4, k=1), pass_at_k(2, n=4, k=2), pass_at_k(2, n=4, k=3)
    (0.5, 0.8333333333333334, 1.0)
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} from {right} right of {n}: need 0 <= right <= n and 1 <= k <= n")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


# ----------------------------------------------------------------------------------------------------------------------
# Uncertainty


def bootstrap_interval(values: np.ndarray, statistic: Callable[[np.ndarray], float] = np.sum, resamples: int = 2000) -> tuple[float, float]:
    """A 95 % bootstrap interval that accounts for the differences between seeds and for the sampling of problems.

    values: (S, N, K): K measures on each of N problems for each of S seeds; every seed has its own problems. In each
    resample, S seeds are drawn with replacement, and N problems of each of them. `statistic` maps the means of the K measures,
    (K,), to a number; the default suits K = 1. The interval runs from the 2.5 % to the 97.5 % quantile of these numbers.

    The measures of a problem are drawn together. To compare two arms problem by problem, pass them as K = 2 measures, with the
    difference of their means as `statistic`.

    Deterministic. With few seeds its coverage is not exactly 95 %: it is too narrow if seeds differ a lot, and too wide
    if they hardly do, because the sampling of problems enters twice (with three seeds, it can be 0.8 or 1.3 times as wide
    as it should). seed_interval does not have this fault. Raises ValueError without seeds, problems or measures.

    >>> bootstrap_interval(np.ones((3, 4, 1)))
    (1.0, 1.0)
    """
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"expected values of shape (seeds, problems, measures), all of them at least 1, got {values.shape}")
    rng, (seeds, problems, _) = np.random.default_rng(0), values.shape
    drawn = []
    for _ in range(resamples):
        rows, columns = rng.integers(seeds, size=(seeds, 1)), rng.integers(problems, size=(seeds, problems))
        drawn.append(statistic(values[rows, columns].mean((0, 1))))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


# The 97.5 % quantiles of Student's t distribution with 1 to 9 degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def seed_interval(by_seed: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval for the mean of a number that was measured once per seed, such as the difference of two arms.

    The differences between seeds include the sampling of problems, so the interval covers both. Raises ValueError for
    fewer than 2 or more than 10 seeds.

    >>> [round(bound, 2) for bound in seed_interval([1.0, 2.0, 3.0])]
    [-0.48, 4.48]
    """
    n = len(by_seed)
    if not 2 <= n <= len(T_QUANTILES) + 1:
        raise ValueError(f"an interval over seeds needs 2 to {len(T_QUANTILES) + 1} of them, got {n}")
    mean = sum(by_seed) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in by_seed) / (n - 1))
    half_width = T_QUANTILES[n - 2] * deviation / math.sqrt(n)
    return mean - half_width, mean + half_width


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a proportion. Unlike the normal approximation it remains valid at 0 and n successes.

    It covers the sampling error of n independent solutions only, not the differences between seeds. Raises ValueError
    unless 0 <= successes <= n and n > 0.

    >>> [round(bound, 3) for bound in wilson_interval(10, 10)]
    [0.722, 1.0]
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"invalid proportion {successes}/{n}: need 0 <= successes <= n and n > 0")
    z = 1.959964  # the 97.5 % quantile of the normal distribution
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding could take a bound out of [0, 1].
    return max(0.0, centre - half_width), min(1.0, centre + half_width)
