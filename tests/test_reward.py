import json
import time
from decimal import Decimal
from pathlib import Path

import pytest

from lab.problems import plain
from metrics import has_jargon
from reward import final_number, reward

GSM8K = Path(__file__).parents[2] / "shared" / "gsm8k"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("#### $18", "18"),
        ("#### 1,000", "1000"),
        ("#### 18.00", "18"),
        ("#### -5", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### \u22125", "-5"),
        ("#### 72.", "72"),
        ("#### 10%", "10"),
        ("#### .5", "0.5"),
        ("####    7   ", "7"),
        ("#### 72 clips in 2 months", "72"),  # the first number after the mark, not the last
        ("#### 3\n#### 4", "4"),  # the last mark
        ("so 48-5", "5"),  # a subtraction has no sign
        ("a range of 3-5", "5"),
        ("1,2,3", "3"),  # commas between other than three digits
        ("007.50", "7.5"),
        ("-0", "0"),
        ("she has 4 now ####", "4"),  # nothing after the mark
        ("in 2 days, 9 clips", "9"),
        ("#### 1.500", "1500"),  # German
        ("#### 150.000", "150000"),
        ("#### 1.500,50", "1500.5"),
        ("es bleiben 1.234.567 Euro", "1234567"),
        ("#### 3,5", "3.5"),
        ("das sind 12,75 €", "12.75"),
        ("#### 1 500", "1500"),  # French, with an ordinary space after the mark
        ("#### 12 345 678,5 euros", "12345678.5"),
        ("il reste 1\u202f500 euros", "1500"),
        ("il reste 1\u00a0500,25 euros", "1500.25"),
        ("in 2 500-page books", "500"),  # elsewhere a space separates two numbers
        ("#### 0.125", "0.125"),
        ("#### 0,125", "0.125"),
        ("#### 1234,567", "1234.567"),
        ("#### 1,0000", "1"),  # no thousands: as in English, 1.0000
        ("#### -1.500", "-1500"),
        ("1,23,456", "23456"),
        ("none", None),
        ("", None),
        ("####", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("completion", "gold", "right"),
    [
        ("#### 18.00", "18", 1.0),
        ("#### $1,000", "1000", 1.0),
        ("#### 18", "48/2 = <<48/2=24>>24\n#### 18", 1.0),
        ("#### 18.5", "18", 0.0),
        ("#### 5", "-5", 0.0),
        ("no number", "5", 0.0),
        ("no number", "none", 0.0),
        ("Antwort: 1.500", "1500", 1.0),
        ("Antwort: 1.500", "1,500", 1.0),
        ("#### 3,5", "3.5", 1.0),
        ("#### 1.5", "1,500", 0.0),
    ],
)
def test_reward(completion, gold, right):
    assert reward(completion, gold) == right


@pytest.mark.parametrize("text", ["1" * 10**6, "1,111" * 2 * 10**5, "1,111," * 10**5, "-" * 10**6, "#" * 10**6, "$." * 10**6, "0" * 10**6])
def test_a_megabyte_takes_linear_time(text):
    """Linear code needs well under a second; a quadratic one, or Python's int(), would take minutes or refuse."""
    start = time.perf_counter()
    assert 0 <= reward(text, text) <= 1
    assert time.perf_counter() - start < 30


def test_odd_strings_do_not_raise():
    for text in ["\x00", "\ud800", "٣٤", "½", "####" * 100, "-" * 9 + "1", "1e999999999", "NaN", "∞"]:
        assert 0 <= reward(text, "1") <= 1
    assert final_number("٣") is None  # digits of other scripts are not numbers here


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the official GSM8K files are not on this machine")
def test_every_official_solution():
    """8,792 solutions: reward 1 with their own gold, 0 with gold + 1; the jargon metric sees each that has a `<<`."""
    answers = [json.loads(line)["answer"] for name in ("train", "test") for line in (GSM8K / f"{name}.jsonl").open(encoding="utf-8")]
    assert len(answers) == 8792
    for answer in answers:
        gold = answer.split("####")[1].strip()
        assert reward(answer, gold) == 1.0
        assert reward(answer, str(Decimal(gold.replace(",", "")) + 1)) == 0.0
        assert has_jargon(answer) == ("<<" in answer)
        assert not has_jargon(plain(answer))  # the annotations go whole
        assert reward(plain(answer), gold) == 1.0
    assert sum(map(has_jargon, answers)) == 8679  # 113 solutions hold no annotation
