"""Tables and figures, checked against numbers that were worked out by hand."""

import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lab import figures, tables, tiny
from lab.experiments import SETTINGS
from lab.measures import bootstrap_interval, pass_at_k, seed_interval
from lab.runs import Refused

FLAGS = {"handoff": "word", "p": 0.5, "solo": False, "updates": 8, "problems": "generated"}
FLAGS |= {"senior_language": "en", "junior_language": "en", "validation": False}
MEASURES = dict.fromkeys(["solo", "handoff", "word", *tables.CONTINUED], [1, 0])
MEASURES |= {"legibility": [0.5, 0.3], "drift": [0.2, 0.1], "right_of_8": [8, 1]}
GOOD = dict(n=4, accuracy=0.5, jargon=0.5, languages={"en": 0.25, "de": 0.75})
SAMPLE = dict(update=0, who="tandem", question="Q", gold="7", reward=1, spans=[["senior", "7"]])


@pytest.fixture
def drawn(monkeypatch):
    """{name of the file: figure} of what a test draws. For speed it is not written."""
    found = {}
    monkeypatch.setattr(figures, "save", lambda f, path, *_, **__: found.setdefault(path.stem, f))
    yield found
    plt.close("all")


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_seed(folder, *evaluations, flags=(), **added):
    """Rows of updates 0, 4, 8, ... with (senior's accuracy, jargon, joint accuracy) of 4 solutions.

    `flags` go over FLAGS; `added` goes into the evaluations of the senior.
    """
    rows = []
    for i, (accuracy, jargon, together) in enumerate(evaluations):
        senior = GOOD | {"accuracy": accuracy, "jargon": jargon, "tokens": 30.0} | added
        tandem = GOOD | {"accuracy": together, "handoffs": 8.0, "handoffs_inside": 2.0}
        evaluation = {"senior": senior, "tandem": tandem}
        rows.append({"update": 4 * i, "eval": evaluation, "seconds_eval": 30.0})
    rows[0]["eval"]["junior"] = GOOD | {"accuracy": 0.25}
    write_rows(folder / "metrics.jsonl", *rows)
    (folder / "config.json").write_text(json.dumps({"flags": FLAGS | dict(flags)}))


def write_measures(folder, *rows, **flags):
    """Measures of updates 0, 4, 8, ... of two problems each, with what changes in MEASURES."""
    lines = [{"update": 4 * i} | MEASURES | row for i, row in enumerate(rows)]
    write_rows(folder / "measures.jsonl", *lines)
    (folder / "config.json").write_text(json.dumps({"flags": FLAGS | flags}))


def labels_in(ax):
    return ax.get_legend_handles_labels()[1]


# ------------------------------------------------------------------------------------------------
# Statistics


def test_pass_at_k_beside_counting():
    """4 solutions of which 1 is right: 1 of 4 for k = 1, and 3 of the 6 pairs hold it."""
    assert [pass_at_k(1, 4, 1), pass_at_k(1, 4, 2)] == pytest.approx([0.25, 0.5])
    assert [pass_at_k(0, 4, 3), pass_at_k(2, 4, 4)] == [0, 1]
    with pytest.raises(ValueError, match="pass@1 from 5 right of 4"):
        pass_at_k(5, 4, 1)


def test_the_bootstrap_sees_seeds_and_problems():
    """Two seeds that disagree completely: 0 to 1. Seeds that agree on a half of 400 problems: as
    the normal interval of 1200. Equal measures differ by 0, because problems stay together."""
    assert bootstrap_interval(np.stack([np.zeros((50, 1)), np.ones((50, 1))])) == (0.0, 1.0)
    rng = np.random.default_rng(1)
    half = np.stack([rng.permutation([0.0, 1.0] * 200) for _ in range(3)])[:, :, None]
    low, high = bootstrap_interval(half)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(1200), rel=0.15)
    same = np.concatenate([half, half], 2)
    assert bootstrap_interval(same, lambda means: means[0] - means[1]) == (0.0, 0.0)


def test_the_interval_over_seeds_covers_what_it_says():
    """Five seeds that scatter around 0: about 95 % of 400 intervals contain 0."""
    rng = np.random.default_rng(2)
    intervals = [seed_interval(rng.normal(size=5).tolist()) for _ in range(400)]
    assert 0.92 < np.mean([low <= 0 <= high for low, high in intervals]) < 0.98


# ------------------------------------------------------------------------------------------------
# Tables of evaluations


def test_pooling(tmp_path):
    """3 of 4 and 1 of 4: 4 of 8, with its Wilson interval. Nobody wrote French: 0 of 8. Only the
    update that both seeds have evaluated is pooled."""
    write_seed(tmp_path / "tandem" / "seed-0", (0.75, 1, 0), (1, 1, 1))
    write_seed(tmp_path / "tandem" / "seed-1", (0.25, 1, 0))
    runs = tables.read_runs(tmp_path, ["tandem"])
    (point,) = tables.pooled(runs, "senior", "accuracy").itertuples()
    assert point == pytest.approx((0, 50, 21.52, 78.48), abs=1e-2)
    assert tables.pooled(runs, "senior", "languages.de").value[0] == 75
    assert list(tables.pooled(runs, "senior", "languages.fr").loc[0])[:2] == [0, 0]
    assert tables.by_seed(runs, "senior", "accuracy").to_dict("list")[0] == [75, 100]


def test_table(tmp_path):
    """The senior's accuracy is 4 of 8, then 6 of 8; 4 evaluations of half a minute."""
    write_seed(tmp_path / "tandem" / "seed-0", (0.75, 1, 0), (1, 0, 1))
    write_seed(tmp_path / "tandem" / "seed-1", (0.25, 1, 0), (0.5, 0, 1))
    head, _, row = tables.table(tables.read_runs(tmp_path, ["tandem"])).splitlines()
    assert head.endswith("| language | minutes per seed |")
    assert row == (
        "| tandem | 2 | 4 | 50.0 → 75.0 [40.9, 92.9] (50.0–100.0) "
        "| 100.0 → 0.0 [0.0, 32.4] (0.0–0.0) | 0.0 → 100.0 [67.6, 100.0] (100.0–100.0) "
        "| 25.0 [7.1, 59.1] (25.0–25.0) | de → de, 75.0 [40.9, 92.9] | 1.0 |"
    )


def test_an_added_metric_has_a_column(tmp_path):
    """A share if every outcome is 0 or 1, else a mean; "–" where it was not measured."""
    outcomes = {"accuracy": [1] * 4, "short": [1, 1, 1, 0], "lines": [1, 1, 1, 3]}
    outcomes |= {"jargon": [1] * 4, "language": ["en"] * 4}
    for seed, short in enumerate((0.75, 0.25)):
        added = dict(short=short, lines=1.5 + seed, outcomes=outcomes)
        write_seed(tmp_path / "tandem" / f"seed-{seed}", (1, 1, 1), (1, 1, 1), **added)
    write_seed(tmp_path / "solo" / "seed-0", (1, 1, 1))
    runs = tables.read_runs(tmp_path, ["tandem", "solo"])
    head, _, tandem, solo = tables.table(runs).splitlines()
    assert head.endswith("| minutes per seed | short | lines |")
    assert tandem.endswith("| 50.0 → 50.0 [21.5, 78.5] (25.0–75.0) | 2 → 2 |")
    assert solo.endswith("| – | – |")


def test_doses(tmp_path, drawn, monkeypatch):
    """Alone, senior and junior have 50 % on average; together 25 % (2 %: cost 25), 50 % (6 %: 0),
    and 25 or 75 % (12 %: 25 and -25). Seed 2 of the shipped base has no counterpart."""
    assert tables.SHIPPED == tiny.ANNOTATED
    low, high = (tmp_path / "dose" / share / "grpo-tandem" for share in ("0.02", "0.12"))
    for seed in (0, 1, 2):
        evaluations = (0.75, 1, 0.5), (0.75, 0.25, 0.5), (0.5, 0, 0.5)
        write_seed(tmp_path / "grpo-tandem" / f"seed-{seed}", *evaluations)
    runs = tables.read_runs(tmp_path, ["grpo-tandem"])
    assert tables.table_of_doses(tmp_path, runs) is None
    write_seed(low / "seed-0", (0.75, 1, 0.25), (0.75, 0, 0.5), (1, 0, 1))
    write_seed(high / "seed-0", (0.75, 1, 0.25), (0.5, 1, 0.5), (0.5, 0.75, 0.5))
    write_seed(high / "seed-1", (0.75, 0.5, 0.75), (0.75, 0.25, 0.5))
    monkeypatch.setattr(tables, "DOSE_UPDATES", (4, 24))
    assert tables.table_of_doses(tmp_path, runs).splitlines()[2:] == [
        "| 2 % | 1 | 8 | 25.0 | 0.0 | – | 4 | 75.0 → 100.0 [51.0, 100.0] |",
        "| 6 % | 2 | 8 | 0.0 (0.0–0.0) | 25.0 (25.0–25.0) | – | 8, 8 | 75.0 → 50.0 [21.5, 78.5] |",
        "| 12 % | 2 | 4 | 0.0 (-25.0–25.0) | 62.5 (25.0–100.0) | – | > 8, > 4 "
        "| 75.0 → 62.5 [30.6, 86.3] |",
    ]
    figures.figure_pressure(tmp_path, runs, "pressure")
    lines = drawn["pressure"].axes[3].lines
    assert [list(line.get_ydata()) for line in lines[:2]] == [[4], [8, 8]]
    assert list(lines[2].get_xdata()) == [25, -25]
    # Not low at the last update: at the top. Not trained as long: not drawn.
    assert lines[2].get_ydata()[0] > 8
    assert math.isnan(lines[2].get_ydata()[1])


# ------------------------------------------------------------------------------------------------
# Measures of Tandem RL


def test_estimates_by_hand(tmp_path):
    """One of two problems right: two draws give 0, 1/2, 1. Retention is (1/2) / (3/4). One right of
    8: 35 of 70 fours are all wrong; 5 or more: none; 0: all."""
    four = {"solo": [1, 1, 1, 0], "handoff": [1, 0, 1, 0], "right_of_8": [1, 5, 0, 8]}
    four = {name: [0, 0, 0, 0] for name in MEASURES} | four
    rows = [{"update": 8} | MEASURES, {"update": 8} | four]
    one, four = (pd.Series([tables.measures_in(row)[1]]) for row in rows)
    assert tables.estimate(one, "solo") == (50, (0, 100), [50])
    assert tables.estimate(one, "legibility")[:2] == (pytest.approx(0.4), (0.3, 0.5))
    assert tables.estimate(four, "retention")[0] == pytest.approx(200 / 3)
    assert tables.estimate(four, "pass@4")[0] == pytest.approx(62.5)


def test_table_of_measures_by_hand(tmp_path):
    """Differences are those of the seeds that both arms have finished, problem by problem. Solo:
    +50 and 0, whose Student's interval 25 -+ 12.706 * 35.36 / sqrt(2) keeps it from being bold.
    Retention is unknown for the seed without a right solution."""
    for seed in (0, 1):
        last = {"rlvr-tandem": {}, "rlvr-solo": {"solo": [seed, 0], "drift": [0.4, 0.3]}}
        for arm, row in last.items():
            write_measures(tmp_path / arm / f"seed-{seed}", {}, {}, row)
    write_measures(tmp_path / "rlvr-tandem" / "seed-7", {}, {})
    runs = pd.DataFrame({"arm": ["rlvr-tandem", "rlvr-solo"]})
    table = tables.table_of_measures(tmp_path, runs)
    head, _, tandem, solo, _, note, *_, cells = table.splitlines()
    assert head.endswith("| legibility | drift |")
    assert tandem.startswith("| rlvr-tandem | 2 | 50.0 [0.0, 100.0] (50.0–50.0) | 75.0 [")
    assert solo.endswith(" | 0.3500 [0.3000, 0.4000] (0.3500–0.3500) |")
    assert note == "Left out at the end, because not finished: rlvr-tandem seed 7."
    name, seeds, solo, _, handoff, _, retention, *_, drift = cells.split(" | ")
    assert (name, seeds, solo[-16:]) == ("| rlvr-tandem − rlvr-solo", "2", "[-292.6, +342.6]")
    assert handoff == "+0.0 [+0.0, +0.0] [+0.0, +0.0]"
    assert retention.endswith("[+nan, +nan]")
    assert drift == "**-0.2000 [-0.2000, -0.2000] [-0.2000, -0.2000]** |"
    write_measures(tmp_path / "rlvr-solo" / "seed-0", {}, {}, problems="varied", updates=4)
    with pytest.raises(Refused, match="seed 0: update 8, 2 problems of generated; .*of varied"):
        tables.table_of_measures(tmp_path, runs)


# ------------------------------------------------------------------------------------------------
# Figures


def test_the_sweep(tmp_path, drawn):
    """Joint accuracy at the end decides; diverged and unfinished arms are out; of equals, the c
    nearest to 0. Jargon is under 5 % at update 4, or never."""
    write_seed(tmp_path / "c0-j1" / "seed-0", (1, 1, 1), (1, 1, 0.5))
    write_seed(tmp_path / "c-0.5-j0" / "seed-0", (0, 1, 0), (0, 0, 0.75))
    write_seed(tmp_path / "c-0.1-j0" / "seed-0", (0, 1, 0), (0, 1, 0.75))
    write_seed(tmp_path / "c-0.3-j0" / "seed-0", (0, 1, 1), (0, 1, 1))
    (tmp_path / "c-0.3-j0" / "seed-0" / "stopped.txt").touch()
    write_seed(tmp_path / "c-0.3-j1" / "seed-0", (0, 1, 1))
    write_seed(tmp_path / "test-c0-j1" / "seed-0", (1, 1, 1), (1, 1, 1))
    assert figures.best_cell(tmp_path) == (-0.1, 0.0)
    assert figures.best_cell(tmp_path / "c0-j1") is None
    figures.draw(tmp_path, "sweep")
    accuracy, until, curves, _ = drawn["sweep"].axes
    assert [t.get_text() for t in accuracy.texts] == ["50", "75", "100", "diverged", "75"]
    assert [t.get_text() for t in until.texts] == ["never", "never", "never", "diverged", "4"]
    assert [frame.get_xy() for frame in accuracy.patches] == [(-0.5, 0.5)]
    assert labels_in(curves)[:2] == ["c = 0, j = 1 (main), senior alone", "c = 0, j = 1, together"]


def test_granularity_draws_every_arm(tmp_path, drawn, monkeypatch):
    """Equal runs share a label; an unknown schedule comes last; a solo arm has p = 1."""
    arms = {"redraw": {"handoff": "redraw"}, "tandem": {}, "syllables": {"handoff": "syllable"}}
    arms |= {"p-0.25": {"p": 0.25}, "solo": {"solo": True}}
    for i, (arm, flags) in enumerate(arms.items()):
        write_seed(tmp_path / arm / "seed-0", (i / 4, 1, 1), flags=flags)
    write_seed(tmp_path / "token" / "seed-0", (0.25, 1, 1), flags={"handoff": "token"})
    monkeypatch.setitem(SETTINGS, "granularity", [*arms, "token"])
    figures.draw(tmp_path, "granularity")
    axes = drawn["granularity"].axes
    assert labels_in(axes[0]) == ["token = word", "redraw", "syllable"]
    assert labels_in(axes[3]) == ["p = 0.25", "p = 0.5", "p = 1"]
    assert [bar.get_height() for bar in axes[5].patches] == [8, 8, 0, 2, 2, 0]


def test_figure_1(tmp_path, drawn):
    """Of two problems, the one with jargon is taken."""
    samples = []
    for question, text in {"Why pay $3 or $4?": "3+4=7.", "Why 7?": "3+4=<<3+4="}.items():
        spoken = {"question": question, "spans": [["senior", text], ["junior", "7"]]}
        samples += [SAMPLE | spoken | {"update": i, "reward": i > 0} for i in range(3)]
    write_rows(tmp_path / "tandem" / "seed-0" / "samples.jsonl", *samples)
    figures.figure_1(tmp_path, None, "skill")
    texts = [text.get_text() for text in drawn["skill-figure1"].axes[0].texts]
    assert texts[:4] == ["Why 7? (Answer: 7)", "before: update 0, wrong", "3+4=<<3+4=", "7"]
    assert texts[-1] == "Chosen: the first with <<...>> that went from wrong to right"


FILES = ["skill-figure1", "skill-figure2", "language-figure2", "language-figure3", "granularity"]
FILES += ["control", "sweep", "pressure", "pressure-language-figure2", "pressure-language-figure3"]
FILES += ["rlvr"]


def test_all_settings_are_drawn(tmp_path, capsys):
    """From one seed per arm. An incomplete arm and an arm of no setting are named."""
    for arm in {arm for arms in SETTINGS.values() for arm in arms[:2] + arms[-2:]}:
        flags = dict(solo=arm.endswith("solo"), p=0.25 if arm == "p-0.25" else 0.5)
        if arm[2:3] == "-":
            flags |= dict(senior_language=arm[:2], junior_language=arm[3:5])
        write_seed(tmp_path / arm / "seed-0", (0.75, 1, 0.5), (0.5, 0.5, 0.75), flags=flags)
    write_seed(tmp_path / "stray" / "seed-0", (1, 1, 1))
    write_rows(tmp_path / "shuffled" / "seed-0" / "metrics.jsonl", {"update": 0})
    samples = [SAMPLE | {"update": i} for i in range(3)]
    write_rows(tmp_path / "tandem" / "seed-0" / "samples.jsonl", *samples)
    write_measures(tmp_path / "rlvr-tandem" / "seed-0", {}, {}, {})
    figures.main(str(tmp_path))
    found = sorted(path.stem for path in (tmp_path / "figures").iterdir())
    assert found == sorted([*FILES, *FILES, "rollouts"])
    assert b"CreationDate" not in (tmp_path / "figures" / "sweep.pdf").read_bytes()
    printed = capsys.readouterr().out
    assert "stray is in no setting" in printed
    assert "| token | 8.0 | 2.0 | – | – |" in printed
    assert "shuffled is left out" in printed


def test_a_setting_without_a_complete_run_is_named(tmp_path, capsys):
    figures.draw(tmp_path, "skill")
    assert capsys.readouterr().out.strip().endswith("there is nothing to draw")
    with pytest.raises(SystemExit, match=r"run run_gsm8k\.py first"):
        figures.main(str(tmp_path / "nowhere"))


DAMAGED = [
    ("metrics.jsonl", {"update": "0"}),
    ("metrics.jsonl", {"update": 0, "eval": {"senior": [1]}}),
    ("metrics.jsonl", {"update": 0, "eval": {"senior": GOOD | {"accuracy": math.nan}}}),
    ("metrics.jsonl", {"update": 0, "eval": {"senior": GOOD | {"jargon": 7}}}),
    ("metrics.jsonl", {"update": 0, "eval": {"senior": GOOD | {"n": 0}}}),
    ("samples.jsonl", SAMPLE | {"spans": [["nobody", "7"]]}),
    ("measures.jsonl", {"update": 0} | MEASURES | {"drift": [0.1]}),
    ("measures.jsonl", {"update": 8} | MEASURES | {"right_of_8": None}),
    ("config.json", {"flags": {}}),
]


@pytest.mark.parametrize(("file", "content"), DAMAGED)
@pytest.mark.usefixtures("drawn")
def test_a_damaged_file_is_named_in_one_line(tmp_path, file, content):
    arm = "rlvr-tandem" if file == "measures.jsonl" else "tandem"
    path = tmp_path / arm / "seed-0" / file
    write_seed(path.parent, (1, 1, 1))
    write_rows(path, content)
    with pytest.raises(SystemExit) as stop:
        figures.main(str(tmp_path))
    assert re.fullmatch(f"error: {re.escape(str(path))} cannot be used .*", stop.value.code)
