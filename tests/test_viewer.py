"""The page of rollouts: everything that was kept is on it, and no text becomes a part of it."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from conftest import rollouts_of
from lab import viewer
from lab.runs import Refused, read_rows
from rollout import Pair

ROOT = Path(__file__).parent.parent
NASTY = "</script><img src=x onerror=alert(1)> <!-- & \u2028 \U0001f600"


def data_of(page: Path) -> dict:
    """The runs that stand in the page, as JSON between its script element."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'(\{"runs":.*?"missing":\d+\})', text)[1])


def test_spans_and_steps_by_hand(monkeypatch):
    """Two tokens of one author are decoded together (0xC3 0xB6 is ö). In steps the second byte adds
    ö to the text; a candidate that is half of it is spelled out."""
    pieces = [b"sch\xc3", b"\xb6", b"n", b""]
    probabilities = torch.tensor([[1, 0.25, 0.5, 0.12345]]).log()
    monkeypatch.setattr(viewer.engine, "completion_logprobs", lambda *_: probabilities)
    # Per step: the rows, both candidates of each, whether a coin was tossed. Row 5 is shown.
    trace = [([4, 5], [9, 0], [9, 2], [True, True]), ([5], [1], [1], [False])]
    trace += [([5], [0], [2], [True]), ([5], [2], [3], [False])]
    pair = Pair(None, None, None, None, [3], pieces)
    one = rollouts_of([[0, 1, 2, 3]], [[1, 1, 0, 0]])
    assert viewer.author_spans(one, pieces) == [[("senior", "schö"), ("junior", "n")]]
    assert viewer.steps(one, 5, trace, 0.7, pair) == [
        ["senior", "sch", r"sch\xc3", "n", True, 1.0],
        ["senior", "ö", r"\xb6", r"\xb6", False, 0.25],
        ["junior", "n", r"sch\xc3", "n", True, 0.5],
        ["junior", "", "n", "", False, 0.1235],
    ]


@pytest.fixture
def folder(tmp_path):
    """Two committed runs, whose files are of an older format."""
    for arm in ("tandem", "solo"):
        shutil.copytree(ROOT / "results" / "tiny" / arm / "seed-0", tmp_path / arm / "seed-0")
    return tmp_path


def test_the_page_holds_every_kept_rollout(folder):
    data = data_of(viewer.draw_page(folder))
    assert [run["arm"] for run in data["runs"]] == ["tandem", "solo"]
    for run in data["runs"]:
        path = folder / run["arm"] / "seed-0" / "samples.jsonl"
        kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        # Some problems were kept before and after training only, and are not shown.
        times = Counter(sample["question"] for sample in kept)
        assert len(run["ranks"]) == len(times)
        kept = [one for one in kept if times[one["question"]] == max(times.values())]
        shown = [rollout for *_, rollouts in run["problems"] for rollout in rollouts]
        assert len(shown) == len(kept)
        texts = {"".join(token[1] for token in rollout["tokens"]) for rollout in shown}
        assert texts == {"".join(text for _, text in sample["spans"]) for sample in kept}
        assert run["evaluations"]["0"]["senior"][0] == 200


def test_no_text_becomes_markup(folder):
    path = folder / "tandem" / "seed-0" / "samples.jsonl"
    sample = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    sample |= {"question": NASTY, "spans": [["senior", NASTY]], "steps": []}
    path.write_text(json.dumps(sample) + "\n")
    page = viewer.draw_page(folder, ["tandem"])
    template = viewer.TEMPLATE.read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8").count("<") == template.count("<")
    assert data_of(page)["runs"][0]["problems"][0][0] == NASTY


def test_which_runs_are_on_the_page(folder, capsys):
    """The first seed, or all of named arms, which must be there; none before its first row."""

    def shown(*arms):
        data = data_of(viewer.draw_page(folder, arms))
        return [(run["arm"], run["seed"]) for run in data["runs"]], data["missing"]

    shutil.copytree(folder / "tandem" / "seed-0", folder / "tandem" / "seed-1")
    assert shown() == ([("tandem", 0), ("solo", 0)], 1)
    assert "name arms" in capsys.readouterr().out
    assert shown("tandem") == ([("tandem", 0), ("tandem", 1)], 0)
    (folder / "tandem" / "seed-0" / "metrics.jsonl").unlink()
    assert shown("tandem") == ([("tandem", 1)], 0)
    for place, arms, absent in ((folder / "solo", [], "any arm"), (folder, ["solo", "x"], "x")):
        with pytest.raises(Refused, match=f"no run of {absent} has kept rollouts"):
            viewer.draw_page(place, arms)


# Whether the senior alone is right, and then the pair before, during and after training; j: with
# jargon.
RANKS = {"right wrong-j wrong-j right": 3, "wrong wrong-j right": 2, "right wrong right": 2}
RANKS |= {"right wrong-j right-j": 2, "right right-j right": 1, "right right wrong": 0, "right": 0}


@pytest.mark.parametrize("verdicts", RANKS)
def test_the_rank_of_an_example(verdicts):
    written = zip(["senior", *["tandem"] * 3], verdicts.split())
    rollouts = [{"who": who, "right": "right" in v, "jargon": "-j" in v} for who, v in written]
    assert viewer.rank_example(rollouts) == RANKS[verdicts]


def test_the_example_was_kept_during_training(folder):
    """A better one that was kept before and after training only is counted, and not chosen."""
    path = folder / "tandem" / "seed-0" / "samples.jsonl"
    sample = dict(update=0, who="senior", question="once", gold="7", reward=1, spans=[])
    joint = sample | {"who": "tandem", "reward": 0, "spans": [["senior", "<<7=7>>"]]}
    # Without the senior alone, all the others have rank 0.
    kept = [row for row in read_rows(path) if row["who"] == "tandem"]
    rows = [*kept, sample, joint, joint | {"update": 28, "reward": 1, "spans": []}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (question, _), rollouts, why = viewer.choose_example(folder)
    assert question == kept[0]["question"]
    assert len(rollouts) >= 3
    num = len({row["question"] for row in kept}) + 1
    assert why.endswith(f"The first of {num - 1} such problems among {num} saved.")


@pytest.mark.parametrize("copy", sorted((ROOT / "docs").glob("*.html")), ids=lambda path: path.stem)
def test_the_published_pages_are_up_to_date(copy, tmp_path, monkeypatch):
    """The command in the page makes it again. If this fails, run it and copy the page to docs/."""
    page = copy.read_text(encoding="utf-8")
    folder, *arms = re.search(r'"python -m lab.viewer ([^"]*)"', page)[1].split()
    # The page is not written into results/.
    (tmp_path / folder).mkdir(parents=True)
    for run in (ROOT / folder).glob("*/seed-0"):
        (tmp_path / folder / run.parent.name).symlink_to(run.parent)
    monkeypatch.chdir(tmp_path)
    assert viewer.draw_page(folder, arms).read_text(encoding="utf-8") == page
    assert len(page) < 1_400_000
