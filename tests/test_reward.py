import time
from pathlib import Path

import pytest

from lab.problems import load_gsm8k, plain
from metrics import has_jargon
from reward import final_number, reward

GSM8K = Path(__file__).parents[2] / "shared" / "gsm8k"

# Final number: texts that have it.
NUMBERS = {
    "72": ["#### 72", "#### 72.", "####  72  ", "#### 72 clips in 2 months", "#### 3\n#### 72"],
    "18": ["#### $18", "#### 18.00", "#### 18%", "018.0", "so 66-18", "3-18", "3.-18", "3\u201318"],
    "4": ["she has 4 now ####", "in 2 days, 4 clips"],  # no number after a mark: the last of all
    "-5": ["#### -5", "#### -$5", "#### $-5", "#### \u22125", "#### \u20135", "$\u20115", "-5.0"],
    "0": ["-0", "0.00"],
    "0.5": ["#### .5", "#### 0.5"],
    # The English reading comes first,
    "1000": ["#### 1,000", "#### $1,000.00"],
    "1.5": ["#### 1.500", "#### 1,5"],
    # else the continental one counts: German, or French with an ordinary space after the mark.
    "1500.5": ["#### 1.500,50", "#### 1 500,50", "noch 1\u202f500,5 euros", "1\u00a0500,50"],
    "1234567": ["es bleiben 1.234.567 Euro", "#### 1 234 567 euros", "1,234,567"],
    "0.125": ["#### 0,125"],  # no thousands
    "500": ["in 2 500-page books", "#### Rs.500", "it is...500"],  # spaces and points of the text
    "1": ["#### 1,0000", "#### 1 0000"],
    # Lists, other digits and no number at all.
    None: ["1,2,3", "1,23,456", "1.2.3", "٣", "½", "none", "####", "\ud800", "NaN"],
}


@pytest.mark.parametrize("number", NUMBERS)
def test_final_number(number):
    for text in NUMBERS[number]:
        assert final_number(text) == number, text
        assert reward(text, f"3-1=2\n#### {number}") == (number is not None)
        assert reward(text, "7") == 0


def test_two_readings():
    """A solution may be meant in the German or the English way, a reference in the latter only."""
    golds = "1500 1.5 1,500 15 -1500 500".split()
    assert [reward("#### 1.500", gold) for gold in golds] == [1, 1, 1, 0, 0, 0]
    assert [reward("#### 1.5", gold) for gold in golds] == [0, 1, 0, 0, 0, 0]
    assert not any(reward("1,2,3", gold) for gold in ("1", "3", "123", "none"))


@pytest.mark.parametrize("unit", ["1", "1,111", "1 111 ", "1.111,", "-", "#", "$.", "0"])
def test_a_long_text_takes_linear_time(unit):
    """Well under a second. Quadratic code would take minutes, and Python's int() would refuse."""
    text, start = unit * (200_000 // len(unit)), time.process_time()
    for solution in (text, "#### " + text):
        assert 0 <= reward(solution, solution) <= 1
    assert time.process_time() - start < 5


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the official GSM8K files are not on this machine")
def test_every_official_solution():
    problems = load_gsm8k(str(GSM8K), "train") + load_gsm8k(str(GSM8K), "test")
    solutions = [problem.solutions["en"] for problem in problems]
    for solution, problem in zip(solutions, problems):
        assert reward(solution, problem.gold) == reward(plain(solution), problem.gold) == 1.0
        assert not has_jargon(plain(solution))  # the annotations go whole
    assert sum(map(has_jargon, solutions)) == 8792 - 113  # the others contain no annotation
