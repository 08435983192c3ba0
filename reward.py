"""The verifier: is the final number of a solution the right one?

As in ordinary RL on GSM8K, and as in the paper (West et al., 2025), the reward is 1 if the final
number of a rollout equals that of the reference solution, else 0. All tokens share it, no matter
which model wrote them. Clarity is not rewarded directly. It pays indirectly: if the junior cannot
follow what the senior wrote, it is likely to continue wrongly, and the rollout earns nothing.

    "She has 48/2 = <<48/2=24>>24 left.\\n#### 24"   the first number after the last "####": 24
    "Of her 48 she has 24 left."                      no "####", so the last number: 24

Every reference solution of GSM8K ends with "####" and the answer, and models trained on it do the
same. After the mark the answer comes first, perhaps followed by a unit or a remark. Without the
mark, as from a chat model, intermediate results come first and the answer last.

A number is read in the English way: 1,500.50 and 2.125. Since the junior's language may differ from
the reference's, a solution is also right if its number equals the reference when it is read with
point and comma swapped: 1.500,50 in German, 1 500,50 in French. So "1.500" is right where the
answer is 1.5, and where it is 1500. The number of the reference is found in the same way, but it
has one reading: the English one if there is one, else the continental one.

The verifier knows no units, fractions ("#### 1/2" is read as 1), scientific notation or numbers in
words, and it does not check the steps. `# Open in paper:` marks a choice that the papers, as far as
we know them, leave open.
"""

import re

# Digits with separators between them: comma, point or no-break space. [0-9], because \d would also
# match the digits of other scripts. A minus, perhaps typeset as another hyphen or as an en dash,
# directly after a digit, a closing bracket or a point is a subtraction or a range, not a sign. The
# sign may also follow the currency: $-5. A point after a word or a point, as in "Rs.500", is no
# decimal point.
NUMBER = re.compile(
    r"((?<![0-9)\].])[-\u2010-\u2013\u2212])?(?:[$€£]([-\u2010-\u2013\u2212])?)?"
    r"([0-9]+(?:[.,\u00a0\u202f][0-9]+)*|(?<![A-Za-z]{2})(?<!\.)\.[0-9]+)"
)
# Thousands in groups of three (not 0,125), or plain digits; then perhaps a decimal part.
ENGLISH = re.compile(r"([1-9][0-9]{0,2}(?:[,\s][0-9]{3})+|[0-9]*)(?:\.([0-9]+))?")
SWAP = str.maketrans(",.", ".,")


def final_number(text: str) -> str | None:
    """The final number of a solution in normal form, or None if none can be read.

    Equal numbers give equal strings: without currency, separators of thousands, leading zeros and
    trailing zeros of the decimal part.

    >>> [final_number(text) for text in ("#### $1,000.50", "so 48-5 is 43", "#### 18.00", "none")]
    ['1000.5', '43', '18', None]
    """
    return next(iter(_readings(text)), None)


def _readings(text: str) -> list[str]:
    """The final number in the English and in the continental reading, if it can be read so."""
    # If a model writes several marks, the last one counts.
    _, mark, after = text.rpartition("####")
    # After the mark an ordinary space may separate thousands; elsewhere it separates two numbers.
    after = re.sub(r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]))", "\u202f", after)
    found = NUMBER.search(after) if mark else None
    if found is None:
        # Open in paper: what counts if no number follows "####". Here the last number of the text.
        found = [None, *NUMBER.finditer(text)][-1]
    if found is None:
        return []
    sign, digits, readings = found[1] or found[2], found[3], []
    for body in (digits, digits.translate(SWAP)):
        match = ENGLISH.fullmatch(body)
        if match is not None:
            whole = re.sub("[^0-9]", "", match[1]).lstrip("0") or "0"
            number = f"{whole}.{match[2] or 0}".rstrip("0").rstrip(".")
            # -0 equals 0.
            readings.append(f"-{number}" if sign and number != "0" else number)
    return readings


def is_correct(completion: str, gold: str) -> bool:
    """Whether the final number of a completion is that of `gold`, a number or a whole solution.

    Evaluations report the mean of this function as accuracy, even if you change `reward`.
    """
    right = final_number(gold)
    return right is not None and right in _readings(completion)


def reward(completion: str, gold: str) -> float:
    """The reward of a rollout: 1.0 if it is correct, else 0.0. It must lie in [0, 1].

    >>> reward("48/2 = <<48/2=24>>24\\n#### 24", "24"), reward("#### 25", "24")
    (1.0, 0.0)
    """
    # To try another reward, such as partial credit, change this function; accuracy stays as it is.
    return float(is_correct(completion, gold))
