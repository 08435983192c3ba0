"""The verifier: is the final number of a solution the right one?

The reward of tandem training is that of ordinary RL on GSM8K: 1 for the whole rollout if its final number equals the
reference, else 0, whoever wrote which part of it (West et al., 2025). Nothing rewards clarity itself: it pays
because senior and junior write the solution together.

GSM8K ends each reference solution in "#### 72", and models trained on it do the same. The final number is the first
one after the last "####". A model that never writes "####", such as a chat model, is given its last number.

Not here: units, fractions ("1/2"), scientific notation, numbers in words, a check of the steps in between.
"""

import re
from collections import deque

# A sign counts only where it cannot be a subtraction ("48-5") or a range. Commas count only between groups of three
# digits. [0-9] rather than \d, which would also match digits that are not ASCII. Each branch consumes what it scans, so
# that a megabyte of digits takes linear time.
NUMBER = re.compile(
    r"((?<![0-9)\].])[-\u2212])?(?:[$€£]([-\u2212]?))?"  # -5, \u22125, -$5, $-5
    r"(?:([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(\.[0-9]+)?|(\.[0-9]+))"  # 1,000.50, 72, .5
)


def final_number(text: str) -> str | None:
    """The final number of a solution, or None if it has none.

    The number is normalised so that equal numbers are equal strings: no currency sign, thousands separator, leading
    zero or trailing fractional zero ("$1,000.50" -> "1000.5", "18.00" -> "18", ".5" -> "0.5", "-0" -> "0").
    Works on any string, in time linear in its length.
    """
    marked = text.rpartition("####")
    match = NUMBER.search(marked[2]) if marked[1] else None
    if match is None:
        # Open in paper: what to do without "####". We take the last number, as evaluations of chat models do.
        match = next(iter(deque(NUMBER.finditer(text), maxlen=1)), None)
    return None if match is None else _normalise(match)


def _normalise(match: re.Match) -> str:
    sign, sign_after_currency, whole, fraction, bare_fraction = match.groups()
    whole = (whole or "").replace(",", "").lstrip("0") or "0"
    fraction = (fraction or bare_fraction or "").rstrip("0").rstrip(".")
    number = whole + fraction
    return f"-{number}" if (sign or sign_after_currency) and number != "0" else number


def reward(completion: str, gold: str) -> float:
    """1.0 if the final numbers of completion and gold are the same number, else 0.0.

    `gold` is a number or a whole reference solution. Text without a number is never right.
    """
    number = final_number(completion)
    return float(number is not None and number == final_number(gold))
