"""Metrics by hand, but for the distance from the junior (test_measures.py) and Wilson's interval
(test_figures.py)."""

import pytest
import torch

import metrics
from conftest import rollouts_of
from lab.problems import LANGUAGES


def test_language_looks_at_words_only():
    assert metrics.language_of("48/2 = <<48/2=24>>24\n#### 24", LANGUAGES) == "none"
    annotated = "<<the house is in the garden>> Das Haus steht im Garten"
    assert metrics.language_of(annotated, ("en", "de")) == "de"
    assert metrics.language_of("Das Haus steht im Garten", ("en", "fr")) in ("en", "fr")
    with pytest.raises(ValueError, match="xx"):
        metrics.language_of("Haus", ("en", "xx"))


def test_summary_by_hand(monkeypatch):
    """Three solutions: two right, one with jargon, one without words.

    Accuracy does not depend on the reward, and a metric is added in one place: here words.
    """
    monkeypatch.setattr("reward.reward", lambda completion, gold: 0.5)
    monkeypatch.setitem(metrics.METRICS, "words", lambda solution, gold: len(solution.split()))
    texts = ["She has <<1+1=2>>2 left.\n#### 2", "Sie hat drei < 4 Äpfel.\n#### 3", "7"]
    summary = metrics.summarise(texts, ["2", "3", "8"], [10, 8, 3], LANGUAGES)
    outcomes = {"accuracy": [1, 1, 0], "jargon": [1, 0, 0], "words": [6, 8, 1]}
    assert summary.pop("outcomes") == outcomes | {"language": ["en", "de", "none"]}
    assert summary.pop("languages") == pytest.approx(dict.fromkeys(("de", "en", "none"), 1 / 3))
    means = {"accuracy": 2 / 3, "jargon": 1 / 3, "words": 5, "tokens": 7}
    assert summary == pytest.approx(means | {"n": 3})


HANDOFFS = {  # spans: handoffs, of these inside an expression, inside a word, inside a number
    "She sells 5: |12-5=<<12-5=7>>7.": [1, 0, 0, 0],  # before the expression
    "She sells 5: $12-$|5=<<12-5=7>>7.": [1, 1, 0, 0],
    "She sells 5: 12-5=<<12-5=|7>>|7|.": [3, 2, 0, 0],  # the last one is after it
    "48/2| = |24 clips": [2, 2, 0, 0],  # spaces around an operator are inside
    "Sie besi|tzt 9|-mal so| viele": [3, 0, 1, 0],
    "She has 3 |and| 4|th": [3, 0, 0, 0],  # between a digit and a letter it is in neither
    "so <<|(1|,000)|*2|5>|>": [5, 5, 0, 1],
}


@pytest.mark.parametrize("text", HANDOFFS)
def test_handoffs_by_place(text):
    spans = [("SJ"[i % 2], span) for i, span in enumerate(text.split("|"))]
    # A second rollout without a handoff halves the means.
    halved = metrics.count_handoffs([spans, [("S", "1+1")]])
    assert [2 * mean for mean in halved.values()] == HANDOFFS[text]


def test_batch_statistics_by_hand():
    """S J S and S S with padding: 2 and 0 handoffs, 4 of 5 tokens by the senior."""
    masks = [[1, 0, 1], [1, 1, 0]], [[1, 1, 1], [1, 1, 0]]
    rollouts = rollouts_of([[5, 6, 7]] * 2, *masks, texts=["1 >>", "1"])
    found = metrics.batch_statistics(rollouts, torch.tensor([0.0, 0.5]))
    assert found == dict(reward=0.25, jargon=0.5, senior_share=0.8, handoffs=1.0, tokens=5)
