import pytest

from lab.problems import LANGUAGES, generate, plain
from metrics import METRICS, count_handoffs, has_jargon, language_of, summarise, wilson_interval


@pytest.mark.parametrize(
    ("text", "jargon"),
    [("48/2 = <<48/2=24>>24", True), ("48/2 = <<48/2=", True), ("=24>>24", True), ("48/2 = 24 < 30 > 2", False), ("", False)],
)
def test_jargon(text, jargon):
    assert has_jargon(text) is jargon


@pytest.mark.parametrize("language", LANGUAGES)
def test_language_of_solutions_whose_language_is_known(language):
    solutions = [problem.solutions[language] for problem in generate(200, "test", 1)]
    for form in (solutions, list(map(plain, solutions))):
        assert sum(language_of(text, LANGUAGES) == language for text in form) >= 198


def test_language_looks_at_words_only():
    assert language_of("48/2 = <<48/2=24>>24\n#### 24", LANGUAGES) == "none"
    assert language_of("<<the house is in the garden>> Das Haus steht im Garten", ("en", "de")) == "de"
    assert language_of("Das Haus steht im Garten", ("en", "fr")) in ("en", "fr")
    with pytest.raises(ValueError, match="xx"):
        language_of("Haus", ("en", "xx"))


def test_wilson_by_hand():
    """10 of 10 at z = 1.96: low = 10 / (10 + 3.8415) = 0.7225, high = 1. 1 of 2 is symmetric about a half."""
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = wilson_interval(1, 2)
    assert low + high == pytest.approx(1.0)
    assert high - low == pytest.approx(0.8108, abs=1e-3)
    for successes, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="invalid proportion"):
            wilson_interval(successes, n)


def test_a_metric_is_added_in_one_place(monkeypatch):
    """Whatever is named in METRICS is in the evaluation, as a mean over the solutions; here the number of lines."""
    monkeypatch.setitem(METRICS, "lines", lambda solution, gold: len(solution.splitlines()))
    assert summarise(["She has 2.\n#### 2", "#### 3"], ["2", "3"], [1, 1], LANGUAGES)["lines"] == 1.5


def test_accuracy_does_not_depend_on_the_reward(monkeypatch):
    monkeypatch.setattr("reward.reward", lambda completion, gold: 0.5)
    assert summarise(["#### 2", "#### 3"], ["2", "2"], [1, 1], LANGUAGES)["accuracy"] == 0.5
    assert summarise(["#### 2", "#### 2"], ["2", "2"], [1, 1], LANGUAGES)["accuracy"] == 1.0


def test_summary_by_hand():
    """Three solutions: two right, one with jargon, one without words."""
    texts = ["She has <<1+1=2>>2 apples left.\n#### 2", "Sie hat noch drei Äpfel.\n#### 3", "7"]
    cell = summarise(texts, ["2", "3", "8"], [10, 8, 3], LANGUAGES)
    third = pytest.approx(1 / 3)
    assert cell == {
        "n": 3,
        "accuracy": pytest.approx(2 / 3),
        "jargon": third,
        "languages": {"de": third, "en": third, "none": third},
        "tokens": 7,
    }


@pytest.mark.parametrize(
    ("spans", "handoffs", "inside", "in_words", "in_numbers"),
    [
        ("She sells 5: |12-5=<<12-5=7>>7.", 1, 0, 0, 0),  # before the expression
        ("She sells 5: 12-|5=<<12-5=7>>7.", 1, 1, 0, 0),
        ("She sells 5: 12-5=<<12-5=|7>>|7|.", 3, 2, 0, 0),  # the last one is after it
        ("48/2| = |24 clips", 2, 2, 0, 0),  # spaces around an operator are inside
        ("Sie besi|tzt 9|-mal so| viele", 3, 0, 1, 0),
        ("#### |1|8", 2, 0, 0, 1),
        ("She has 3 |and| 4|th", 3, 0, 0, 0),  # between a digit and a letter it is in neither
        ("so <<1|,000*2|5", 2, 2, 0, 1),
        ("no handoff", 0, 0, 0, 0),
    ],
)
def test_handoffs_by_place(spans, handoffs, inside, in_words, in_numbers):
    cut = [("senior" if i % 2 == 0 else "junior", text) for i, text in enumerate(spans.split("|"))]
    counts = {"handoffs": handoffs, "handoffs_inside": inside, "handoffs_in_words": in_words, "handoffs_in_numbers": in_numbers}
    assert count_handoffs([cut]) == counts
    assert count_handoffs([cut, [("senior", "1+1")]]) == {name: count / 2 for name, count in counts.items()}
