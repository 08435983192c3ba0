import json
import time
from decimal import Decimal
from pathlib import Path

import pytest

from lab.problems import plain
from metrics import has_jargon
from reward import final_number, is_correct, reward

GSM8K = Path(__file__).parents[2] / "shared" / "gsm8k"

# Final number: texts that have it.
NUMBERS = {
    "72": ["#### 72", "#### 72.", "####  72  ", "#### 72 clips in 2 months", "#### 3\n#### 72"],
    "18": ["#### $18", "#### 18.00", "#### 18%", "018.0", "so 66-18", "a range of 3-18"],
    "4": ["she has 4 now ####", "in 2 days, 4 clips"],  # no number after a mark: the last of all
    "-5": ["#### -5", "#### -$5", "#### $-5", "#### \u22125", "-5.0"],
    "0": ["-0", "0.00"],
    "0.5": ["#### .5", "#### 0.5"],
    "1000": ["#### 1,000", "#### $1,000.00", "#### 1000"],
    # The English reading comes first,
    "2.125": ["#### 2.125"],
    "1.5": ["#### 1.500", "#### 1,5"],
    "150": ["#### 150.000"],
    # else the continental one counts: German, or French with an ordinary space after the mark.
    "1500.5": ["#### 1.500,50", "#### 1 500,50", "noch 1\u202f500,5 euros", "1\u00a0500,50"],
    "1234567": ["es bleiben 1.234.567 Euro", "#### 1 234 567 euros", "#### 1,234,567"],
    "1234.567": ["#### 1234,567"],
    "0.125": ["#### 0,125", "#### 0.125"],  # no thousands
    "500": ["in 2 500-page books"],  # elsewhere a space separates two numbers
    "1": ["#### 1,0000"],
    # Lists, other digits and no number at all.
    None: ["1,2,3", "1,23,456", "1.2.3", "٣", "½", "none", "", "####"],
}


@pytest.mark.parametrize("number", NUMBERS)
def test_final_number(number):
    for text in NUMBERS[number]:
        assert final_number(text) == number, text


REWARDS = [  # (completion, references for which it is right, others for which it is wrong)
    ("#### 1.500", "1500 1.5 1,500", "15 -1500"),  # German or English
    ("#### 1,500", "1500", "15 150"),
    ("#### 1.5", "1.5", "1,500 15 1500"),  # the reference is read in the English way only
    ("#### 3,5", "3.5", "35"),
    ("#### 2.125", "2.125", "2"),
    ("#### 0,125", "0.125", "125"),
    ("Antwort: 1.500", "1500", "500"),
    ("#### 18.5", "18.5", "18"),
    ("#### 5", "5 5.0", "-5"),
    ("1,2,3", "", "1 3 123"),
    ("no number", "", "5 none"),
]


@pytest.mark.parametrize(("completion", "right", "wrong"), REWARDS)
def test_reward(completion, right, wrong):
    for gold in right.split():
        assert reward(completion, gold) == reward(completion, f"3-1=2\n#### {gold}") == 1
    for gold in wrong.split():
        assert reward(completion, gold) == is_correct(completion, gold) == 0


@pytest.mark.parametrize("unit", ["1", "1,111", "1,111,", "1 111 ", "1.111,", "-", "#", "$.", "0"])
def test_a_megabyte_takes_linear_time(unit):
    """Well under a second. Quadratic code would take minutes, and Python's int() would refuse."""
    text, start = unit * (10**6 // len(unit)), time.perf_counter()
    for solution in (text, "#### " + text):
        assert 0 <= reward(solution, solution) <= 1
    assert time.perf_counter() - start < 20


def test_odd_strings_do_not_raise():
    for text in ["\x00", "\ud800", "####" * 100, "-" * 9 + "1", "1e999999999", "NaN", "∞"]:
        assert reward(text, "3") == 0


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the official GSM8K files are not on this machine")
def test_every_official_solution():
    """Reward 1 with their own gold, 0 with gold + 1; jargon where there is "<<"."""
    files = [GSM8K / f"{name}.jsonl" for name in ("train", "test")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 8792
    for answer in answers:
        gold = answer.split("####")[1].strip()
        assert reward(answer, gold) == reward(plain(answer), gold) == 1.0
        assert reward(answer, str(Decimal(gold.replace(",", "")) + 1)) == 0.0
        assert has_jargon(answer) == ("<<" in answer)
        assert not has_jargon(plain(answer))  # the annotations go whole
    assert sum(map(has_jargon, answers)) == 8679  # 113 solutions contain no annotation
