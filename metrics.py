"""What is measured: jargon, language, accuracy with its interval.

    jargon       a solution that contains "<<" or ">>" (West et al., 2025: share of solutions with annotations)
    language     the most likely language of a solution's words, among those in play (library py3langid); where two are mixed,
                 the likelier one
    handoffs     how often the author changes, and how often within an expression such as 48/2=<<48/2=24>>24
    interval     Wilson's 95 % score interval for a share of n independent solutions

All work on text and know nothing of models. Not here: handoff robustness, legibility and drift (Jiao et al., 2026).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from reward import reward

NOT_WORDS = re.compile(r"<<[^\n]*?>>|[^\w\s']|[\d_]")  # annotations, then punctuation and digits


NUMBER = r"[($]*[0-9]+(?:[.,][0-9]+)*[)%]*"
EXPRESSION = re.compile(rf"(?:<<)?{NUMBER}(?:\s?[-+*/×÷=<>]+\s?{NUMBER})+(?:\s?[=<>]+)?")


def has_jargon(text: str) -> bool:
    """Whether a solution contains a calculator annotation, or half of one."""
    return "<<" in text or ">>" in text


def language_of(text: str, languages: Sequence[str]) -> str:
    """The one of `languages` (ISO 639-1 codes) in which the words of text are most likely written, or "none".

    Numbers, punctuation and annotations are stripped first. Raises ValueError for a code that py3langid lacks.
    """
    import py3langid  # imported late: it loads a model, which takes a second

    words = " ".join(NOT_WORDS.sub(" ", text).split())
    ranked = [code for code, _ in py3langid.rank(words) if code in languages]
    if set(ranked) != set(languages):
        raise ValueError(f"py3langid knows no language {sorted(set(languages) - set(ranked))}: use two-letter codes")
    return ranked[0] if words else "none"


def summarise(texts: Sequence[str], golds: Sequence[str], lengths: Sequence[int], languages: Sequence[str]) -> dict:
    """The evaluation of n solutions, as it stands in metrics.jsonl: shares of n, and the mean length in tokens."""
    n = len(texts)
    spoken = Counter(language_of(text, languages) for text in texts)
    return {
        "n": n,
        "accuracy": sum(reward(text, gold) for text, gold in zip(texts, golds)) / n,
        "jargon": sum(map(has_jargon, texts)) / n,
        "languages": {language: count / n for language, count in sorted(spoken.items())},
        "tokens": sum(lengths) / n,
    }


def count_handoffs(rollouts: Sequence[Sequence[tuple[str, str]]]) -> dict:
    """Means over joint rollouts, each [(author, text), ...] as rollout.stretches gives it: all handoffs, those inside expressions."""
    total = inside = 0
    for stretches in rollouts:
        spans = [match.span() for match in EXPRESSION.finditer("".join(text for _, text in stretches))]
        position = 0
        for _, text in stretches[:-1]:
            position += len(text)
            total += 1
            inside += any(start < position < end for start, end in spans)
    return {"handoffs": total / len(rollouts), "handoffs_inside": inside / len(rollouts)}


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share: sound at 0 and n successes, where the usual one has width 0.

    Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"no share of {successes} in {n}: need 0 <= successes <= n and n > 0")
    z = 1.959964  # 97.5 % quantile of the normal distribution
    share = successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)
