"""The verifier: is the final number of a solution the right one?

The reward of tandem training is that of ordinary RL on GSM8K (West et al., 2025): 1 for the whole rollout if its final
number equals that of the reference solution, and 0 otherwise, whoever wrote which part of it. Nothing rewards clarity
itself. It pays off because senior and junior write the solution together.

    "She has 48/2 = <<48/2=24>>24 left.\\n#### 24"   final number "24"
    "She has 24 left."                                final number "24", because there is no "####"

GSM8K ends every reference solution in "#### 72", and models trained on it do the same. The final number is the first one
after the last "####". A model that never writes "####", such as a chat model, is judged by its last number.

Units, fractions ("1/2"), scientific notation and numbers in words are not understood, and the steps of a solution are
not checked.
"""

import re
from collections import deque

# The pattern of a number: -5, -$5, $-5, 1,000.50, 72, .5. A sign counts only where it cannot be a subtraction ("48-5") or a
# range ("3-5"). Commas count only between groups of three digits. It says [0-9] because \d would also match the digits of
# other scripts. Every branch consumes what it scans, so that even a megabyte of digits takes linear time.
NUMBER = re.compile(
    r"((?<![0-9)\].])[-\u2212])?(?:[$€£]([-\u2212]?))?"  # a sign before or after the currency sign
    r"(?:([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(\.[0-9]+)?|(\.[0-9]+))"  # thousands or plain digits, then a fraction
)


def final_number(text: str) -> str | None:
    """The final number of a solution in normal form, or None if it has none. Works on any string, in linear time.

    Equal numbers are equal strings: currency signs, thousands separators, leading zeros and trailing zeros of the
    fraction are removed.

    >>> [final_number(text) for text in ("#### $1,000.50", "so 48-5 is 43", "#### 18.00", "no number")]
    ['1000.5', '43', '18', None]
    """
    # The first number after the last mark, if there is one.
    before, mark, after = text.rpartition("####")
    match = NUMBER.search(after) if mark else None
    if match is None:
        # Open in paper: what to do without "####". The last number counts, as is usual for chat models.
        match = next(iter(deque(NUMBER.finditer(text), maxlen=1)), None)
    return None if match is None else _normal_form(match)


def _normal_form(match: re.Match) -> str:
    sign, sign_after_currency, whole, fraction, bare_fraction = match.groups()
    whole = (whole or "").replace(",", "").lstrip("0") or "0"
    fraction = (fraction or bare_fraction or "").rstrip("0").rstrip(".")
    number = whole + fraction
    # There is no negative zero.
    return f"-{number}" if (sign or sign_after_currency) and number != "0" else number


def is_correct(completion: str, gold: str) -> bool:
    """Whether completion and gold end in the same number. `gold` is a number or a whole reference solution.

    Text without a number is never correct. This is what evaluations report as accuracy, whatever the reward is.
    """
    number = final_number(completion)
    return number is not None and number == final_number(gold)


def reward(completion: str, gold: str) -> float:
    """The reward of a rollout, between 0 and 1; here 1.0 if it is correct and 0.0 otherwise.

    >>> reward("48/2 = <<48/2=24>>24\\n#### 24", "24"), reward("#### 25", "24")
    (1.0, 0.0)
    """
    # To try another reward, such as partial credit, change this function: accuracy stays what it is.
    return float(is_correct(completion, gold))
