"""What is measured: accuracy, jargon, language, handoffs and the distance from the junior.

    accuracy     share of solutions that are correct (reward.is_correct)
    jargon       share of solutions with "<<" or ">>". The paper counts calculator annotations (West
                 et al., 2025); half of one counts too, because a handoff can cut one in two
    languages    share of solutions by their most likely language (library py3langid)
    tokens       mean length of a completion; in rows of training, the sum over the batch
    handoffs     changes of author per rollout, and how many of them fall inside an expression such
                 as 48/2=<<48/2=24>>24. Rows of training also count one before the end token
    legibility   the junior's cross-entropy on the senior's solutions: lower is more legible
    drift        how far the senior's distribution is from the junior's

A solution that mixes two languages counts under the likelier one. Everything here works on text,
masks and log-probabilities; neither senior nor junior is run.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from reward import is_correct

# ------------------------------------------------------------------------------------------------
# One solution

# A whole annotation, or half of one that a handoff has cut in two. To study another jargon, change
# this and `annotated_solutions` in lab/problems.py, which teaches it.
JARGON = re.compile(r"<<[^\n]*?>>|<<|>>")


def has_jargon(text: str) -> bool:
    """Whether a solution contains a calculator annotation, or half of one.

    >>> has_jargon("48/2 = <<48/2=24>>24"), has_jargon("48/2 = 24"), has_jargon("48/2 = <<48/")
    (True, False, True)
    """
    return JARGON.search(text) is not None


# Every metric maps (solution, gold answer) to a number; an evaluation reports its mean. To add one,
# name it here: every evaluation then records it, and it has a column in every table. If a metric
# takes only the values 0 and 1, its mean is a share, which has an interval there.
METRICS: dict[str, Callable[[str, str], float]] = {
    "accuracy": is_correct,
    "jargon": lambda solution, gold: has_jargon(solution),
}

# What belongs to no language: annotations, punctuation, digits. (Words may contain apostrophes.)
NOT_WORDS = re.compile(r"<<[^\n]*?>>|[^\w\s']|[\d_]")


def language_of(text: str, languages: Sequence[str]) -> str:
    """The most likely of `languages` (ISO 639-1 codes), or "none" if the text has no words.

    Raises ValueError for a code that py3langid does not know.
    """
    # Open in paper: how languages are identified.
    import py3langid  # imported here because it loads a model, which takes a second

    words = " ".join(NOT_WORDS.sub(" ", text).split())
    ranked = [code for code, _ in py3langid.rank(words) if code in languages]  # likeliest first
    if set(ranked) != set(languages):
        unknown = sorted(set(languages) - set(ranked))
        raise ValueError(f"py3langid does not know {unknown}: use ISO 639-1 codes such as 'en'")
    return ranked[0] if words else "none"


def summarise(
    texts: Sequence[str], golds: Sequence[str], lengths: Sequence[int], languages: Sequence[str]
) -> dict:
    """The evaluation of n solutions: n, means, and the outcome on every single problem.

    With the outcomes, two ways of training can be compared problem by problem.
    """
    pairs, n = list(zip(texts, golds)), len(texts)
    outcomes = {name: [float(metric(*pair)) for pair in pairs] for name, metric in METRICS.items()}
    means = {name: sum(values) / n for name, values in outcomes.items()}
    spoken = [language_of(text, languages) for text in texts]
    shares = {language: count / n for language, count in sorted(Counter(spoken).items())}
    outcomes["language"] = spoken
    return {"n": n, **means, "languages": shares, "tokens": sum(lengths) / n, "outcomes": outcomes}


# ------------------------------------------------------------------------------------------------
# Handoffs

# An operand is a number with its brackets, currency or percent sign: "48", "(1,000", "$5.50".
OPERAND = r"[($]*[0-9]+(?:[.,][0-9]+)*[)%]*"
# Operands joined by operators and annotation marks: "12-5=<<12-5=7>>7". It may end in a mark.
EXPRESSION = re.compile(rf"(?:<<)?{OPERAND}(?:\s?[-+*/×÷=<>]+\s?{OPERAND})+(?:\s?[=<>]+)?")


def count_handoffs(rollouts: Sequence[Sequence[tuple[str, str]]]) -> dict[str, float]:
    """Handoffs per rollout: all, and those inside an expression, inside a word, inside a number.

    Each rollout is a list of (author, text) spans. Edges of an expression are not inside it. A
    handoff is inside a word if there are letters on both sides of it, inside a number if digits.

    >>> count_handoffs([[("senior", "She has 48/"), ("junior", "2=24"), ("senior", " clips")]])
    {'handoffs': 2.0, 'handoffs_inside': 1.0, 'handoffs_in_words': 0.0, 'handoffs_in_numbers': 0.0}
    """
    names = ("handoffs", "handoffs_inside", "handoffs_in_words", "handoffs_in_numbers")
    total = Counter(dict.fromkeys(names, 0))
    for spans in rollouts:
        whole = "".join(text for _, text in spans)
        expressions = [match.span() for match in EXPRESSION.finditer(whole)]
        position = 0
        for _, text in spans[:-1]:  # there is a handoff at the end of every span but the last
            position += len(text)
            around = whole[max(0, position - 1) : position + 1]  # the characters on either side
            total["handoffs"] += 1
            total["handoffs_inside"] += any(a < position < b for a, b in expressions)
            total["handoffs_in_words"] += len(around) == 2 and around.isalpha()
            total["handoffs_in_numbers"] += len(around) == 2 and around.isdecimal()
    return {name: count / len(rollouts) for name, count in total.items()}


def batch_statistics(rollouts, rewards: torch.Tensor) -> dict[str, float]:
    """The statistics of a training batch in its row of metrics.jsonl. rewards: (B,).

    The runner adds loss, gradient norm, seconds, and the evaluation if there is one.
    """
    mask, by_senior = rollouts.completion_mask, rollouts.senior_mask  # (B, C) each
    # A change before the end token, which has no text, counts here.
    changes = (by_senior[:, 1:] != by_senior[:, :-1]) & mask[:, 1:].bool()  # (B, C-1)
    return {
        "reward": rewards.mean().item(),
        "jargon": sum(map(has_jargon, rollouts.texts)) / len(rollouts),
        "senior_share": int(by_senior.sum()) / int(mask.sum()),
        "handoffs": changes.sum(1).float().mean().item(),
        "tokens": int(mask.sum()),
    }


# ------------------------------------------------------------------------------------------------
# The distance from the junior, and how uncertain a share is


def distance_from_junior(
    senior: torch.Tensor, junior: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, T: float
) -> dict[str, torch.Tensor]:
    """How far the models differ on what the senior wrote: means over a solution's tokens, (B,).

    senior, junior: log-probabilities of the whole vocabulary before every token, at temperature 1,
    (B, C, V). ids, mask: (B, C). T: the temperature at which the distributions are compared. In
    nats per token.

        legibility   -log junior(y_t), at temperature 1
        drift        sum_v senior(v) * (log senior(v) - log junior(v)) = KL(senior || junior)
    """
    # Open in paper: how the distance from the junior was measured.
    cross_entropy = -junior.gather(2, ids[:, :, None])[:, :, 0]  # (B, C)
    s, j = ((logprobs / T).log_softmax(-1) for logprobs in (senior, junior))  # (B, C, V) each
    per_token = {"legibility": cross_entropy, "drift": (s.exp() * (s - j)).sum(-1)}
    # An empty solution has the value 0.
    count = mask.sum(1).clamp(min=1)
    return {name: (values * mask).sum(1) / count for name, values in per_token.items()}


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a proportion, which is valid at 0 and n successes too.

    It covers the sampling error of n independent solutions, not the differences between seeds.

    >>> [round(bound, 3) for bound in wilson_interval(10, 10)]
    [0.722, 1.0]
    """
    z = 1.959964  # the 97.5 % quantile of the normal distribution
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    spread = math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    half_width = z / (1 + z * z / n) * spread
    # Rounding could take a bound out of [0, 1].
    return max(0.0, centre - half_width), min(1.0, centre + half_width)
