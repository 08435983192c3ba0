"""What is measured: accuracy, jargon, language, handoffs, and the uncertainty of a share.

    accuracy     share of solutions that are correct (reward.is_correct)
    jargon       share of solutions that contain "<<" or ">>" (West et al., 2025: solutions with calculator annotations)
    languages    share of solutions by their most likely language, among those in play (library py3langid)
    tokens       mean length of a completion
    handoffs     how often the author changes per rollout, and how often inside an expression such as 48/2=<<48/2=24>>24
    interval     Wilson's 95 % score interval for a share of n independent solutions

A solution that mixes two languages counts for the likelier one. Everything here works on text or on the masks of a batch
of rollouts and knows nothing about models. Handoff robustness, legibility and drift (Jiao et al., 2026) are not measured.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from reward import is_correct

# ----------------------------------------------------------------------------------------------------------------------
# Metrics of a single solution


def has_jargon(text: str) -> bool:
    """Whether a solution contains a calculator annotation, or half of one.

    >>> has_jargon("48/2 = <<48/2=24>>24"), has_jargon("48/2 = 24"), has_jargon("48/2 = <<48/")
    (True, False, True)
    """
    # For another kind of jargon, change this function.
    return "<<" in text or ">>" in text


# Every metric maps (solution, gold answer) to a number, and an evaluation reports its mean. To add a metric, name it here:
# it is then in every evaluation of metrics.jsonl and in the tables of lab/figures.py.
METRICS: dict[str, Callable[[str, str], float]] = {
    "accuracy": is_correct,
    "jargon": lambda solution, gold: has_jargon(solution),
}

ANNOTATION_DIGITS_PUNCTUATION = re.compile(r"<<[^\n]*?>>|[^\w\s']|[\d_]")


def language_of(text: str, languages: Sequence[str]) -> str:
    """The one of `languages` (ISO 639-1 codes) in which the words of a text are most likely written, or "none".

    Numbers, punctuation and annotations are removed first, because they belong to no language. Raises ValueError for a
    code that py3langid does not know.
    """
    # Open in paper: the tool for language identification.
    import py3langid  # imported here because it loads a model, which takes a second

    words = " ".join(ANNOTATION_DIGITS_PUNCTUATION.sub(" ", text).split())
    ranked = [code for code, _ in py3langid.rank(words) if code in languages]  # likeliest first
    if set(ranked) != set(languages):
        raise ValueError(f"py3langid knows no language {sorted(set(languages) - set(ranked))}: use two-letter codes")
    return ranked[0] if words else "none"


def summarise(texts: Sequence[str], golds: Sequence[str], lengths: Sequence[int], languages: Sequence[str]) -> dict:
    """The evaluation of n solutions as it is written to metrics.jsonl: n, the mean of each metric, languages, mean length."""
    n = len(texts)
    means = {name: sum(metric(text, gold) for text, gold in zip(texts, golds)) / n for name, metric in METRICS.items()}
    counts = Counter(language_of(text, languages) for text in texts)
    shares = {language: count / n for language, count in sorted(counts.items())}
    return {"n": n, **means, "languages": shares, "tokens": sum(lengths) / n}


# ----------------------------------------------------------------------------------------------------------------------
# Handoffs

# Numbers joined by operators and annotation marks, perhaps broken off after one: 12-5=<<12-5=7>>7, 48 / 2 =
NUMBER = r"[($]*[0-9]+(?:[.,][0-9]+)*[)%]*"  # 48, (1,000, $5.50, 20%
EXPRESSION = re.compile(rf"(?:<<)?{NUMBER}(?:\s?[-+*/×÷=<>]+\s?{NUMBER})+(?:\s?[=<>]+)?")


def count_handoffs(rollouts: Sequence[Sequence[tuple[str, str]]]) -> dict:
    """Mean number of handoffs per rollout, and of those inside an expression.

    Each rollout is a list of (author, text) spans, as rollout.author_spans returns them.

    >>> count_handoffs([[("senior", "She has 48/"), ("junior", "2=24"), ("senior", " clips")]])
    {'handoffs': 2.0, 'handoffs_inside': 1.0}
    """
    total = inside = 0
    for spans in rollouts:
        expressions = [match.span() for match in EXPRESSION.finditer("".join(text for _, text in spans))]
        position = 0
        for _, text in spans[:-1]:
            # A handoff lies at the end of every span but the last.
            position += len(text)
            total += 1
            inside += any(start < position < end for start, end in expressions)
    return {"handoffs": total / len(rollouts), "handoffs_inside": inside / len(rollouts)}


def batch_statistics(rollouts, rewards: torch.Tensor) -> dict:
    """What a row of metrics.jsonl says about a training batch. rollouts: rollout.Rollouts; rewards: (B,)."""
    num_tokens = int(rollouts.completion_mask.sum())

    def mean_logprob(rows: torch.Tensor) -> float | None:
        """Nats per token under the senior, whoever wrote the token."""
        return (rollouts.logprobs[rows].sum() / rollouts.completion_mask[rows].sum()).item() if rows.any() else None

    return {
        "reward": rewards.mean().item(),
        "senior_share": int(rollouts.senior_mask.sum()) / num_tokens,
        "handoffs": rollouts.handoffs().float().mean().item(),
        "tokens": num_tokens,
        "logprob_right": mean_logprob(rewards == 1),
        "logprob_wrong": mean_logprob(rewards != 1),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Uncertainty


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a share. Unlike the normal approximation it is sound at 0 and at n successes.

    It is the sampling error of n independent solutions and says nothing about the differences between seeds. Raises
    ValueError unless 0 <= successes <= n and n > 0.

    >>> [round(bound, 3) for bound in wilson_interval(10, 10)]
    [0.722, 1.0]
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"no share of {successes} in {n}: need 0 <= successes <= n and n > 0")
    z = 1.959964  # the 97.5 % quantile of the normal distribution
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)
