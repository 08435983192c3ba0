"""The verifier: is the final number of a solution the right one?

As in ordinary RL on GSM8K, and as in the paper (West et al., 2025), the reward is 1 if the final number of a rollout equals
that of the reference solution, else 0. All tokens share it, no matter which model wrote them. Clarity is not rewarded
directly. It pays indirectly: if the junior cannot follow what the senior wrote, it is likely to continue wrongly, and the
rollout then tends to earn nothing.

    "She has 48/2 = <<48/2=24>>24 left.\\n#### 24"   final number "24", the first one after the last "####"
    "Of her 48 she has 24 left."                      final number "24", the last one, because there is no "####"

Every reference solution of GSM8K ends with "####" and the answer, such as "#### 72", and models trained on it do the
same. After the mark the answer comes first, perhaps followed by a unit or a remark. Without the mark, as from a chat
model, intermediate results come first and the answer last.

Numbers are read by their shape, since the junior's language may differ from the reference's: 1,500.50 in English,
1.500,50 in German and 1 500,50 in French (the space must be a no-break space, except after "####") are the same number. One
to three digits that do not start with 0, followed by groups of exactly three, are read as thousands. Otherwise what follows
a single separator is the decimal part. Some numbers stay ambiguous: "2.125" is read as 2125, in English too, and a lone
"1,2" as 1.2, although it may be a list of two items. The reference is read by the same rules, so identical spellings always
compare as equal; only different spellings can be misjudged.

The verifier does not understand units, fractions such as "1/2" (which it reads as two numbers), scientific notation or
numbers written out as words. It does not check the steps of a solution. `# Open in paper:` marks a choice that our sources
on the paper leave open.
"""

import re
from collections import deque

# We write [0-9] because \d would also match the digits of other scripts. A policy under RL may write very long runs of
# digits; each alternative scans a run of digits at most once, so matching takes linear time.
NUMBER = re.compile(
    # A minus (ASCII or typographic) directly after a digit, a closing bracket or a point is a subtraction or range, not a sign.
    # The sign may also follow the currency symbol: $-5.
    r"((?<![0-9)\].])[-\u2212])?(?:[$€£]([-\u2212]?))?("
    # Groups of three digits between equal separators (comma, point, no-break space), then perhaps a decimal part after a different mark.
    r"[0-9]{1,3}([.,\u00a0\u202f])[0-9]{3}(?:\4[0-9]{3})*(?![0-9])(?:(?!\4)[.,][0-9]+)?"
    # A decimal part after a point; or after a comma, unless this is a list of three or more items such as "1,2,3".
    r"|[0-9]+\.[0-9]+|(?<![0-9],)[0-9]+,[0-9]+(?![0-9]|,[0-9])"
    # Plain digits, or a decimal part alone: 72, .5
    r"|[0-9]+|\.[0-9]+)"
)


def final_number(text: str) -> str | None:
    """The final number of a solution in normal form, or None if it has none. Works on any string, in linear time.

    Equal numbers give equal strings, without rounding or overflow: currency symbols, thousands separators, leading zeros and
    trailing zeros of the decimal part are removed.

    >>> [final_number(text) for text in ("#### $1,000.50", "das sind 1.000,50 Euro", "so 48-5 is 43", "#### 18.00", "none")]
    ['1000.5', '1000.5', '43', '18', None]
    """
    # The first number after the last "####": if a model writes several, the last is its final word.
    _, mark, after = text.rpartition("####")
    # Directly after the mark, an ordinary space may also separate thousands. Elsewhere it separates two numbers.
    after = re.sub(r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]))", "\u202f", after)
    match = NUMBER.search(after) if mark else None
    if match is None:
        # Open in paper: what to do if no number follows "####". The last number of the whole text counts, as is usual for
        # chat models. The deque runs through all matches and keeps the last one, in constant memory.
        match = next(iter(deque(NUMBER.finditer(text), maxlen=1)), None)
    return None if match is None else _normal_form(match)


def _normal_form(match: re.Match) -> str:
    sign, sign_after_currency, body, _ = match.groups()
    # Split at the last separator: "1,500.50" gives "1,500", "." and "50".
    whole, separator, fraction = re.fullmatch(r"(.*?)(?:([^0-9])([0-9]+))?", body).groups()
    # A single point or comma marks thousands if one to three digits, not starting with 0, precede it and exactly three follow.
    # A repeated one always does, and so does a space. Anything else is a decimal mark: 0.125, 3,5 or the comma in 1.500,50.
    repeated = separator and separator in whole
    one_group = separator and whole.isdigit() and whole[0] != "0" and len(whole) <= 3 and len(fraction) == 3
    if repeated or one_group or (separator and separator not in ".,"):
        whole, fraction = whole + fraction, ""
    whole = re.sub("[^0-9]", "", whole).lstrip("0") or "0"
    fraction = (fraction or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    # -0 equals 0.
    return f"-{number}" if (sign or sign_after_currency) and number != "0" else number


def is_correct(completion: str, gold: str) -> bool:
    """Whether completion and gold have the same final number. `gold` is a number or a whole reference solution.

    Text without a number is never correct. Evaluations report the mean of this function as accuracy, even if you change
    `reward`.
    """
    number = final_number(completion)
    return number is not None and number == final_number(gold)


def reward(completion: str, gold: str) -> float:
    """The reward of a rollout: 1.0 if it is correct, else 0.0. outcome_weights in reinforce.py rejects rewards outside [0, 1].

    >>> reward("48/2 = <<48/2=24>>24\\n#### 24", "24"), reward("#### 25", "24")
    (1.0, 0.0)
    """
    # To try another reward, such as partial credit, change this function; accuracy is unaffected.
    return float(is_correct(completion, gold))
