"""Tables and figures, checked against numbers that were worked out by hand."""

import json
import math
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from companions import atod, belief_states
from conftest import ends_with
from lab import experiments, figures, tables
from lab.measures import bootstrap_interval
from lab.runs import Refused

FLAGS = experiments.DEFAULTS | {"updates": 8, "eval_problems": 2, "junior": "some/where"}
MEASURES = dict.fromkeys(["solo", "handoff", "word", *tables.CONTINUED], [1, 0])
MEASURES |= {"legibility": [0.5, 0.3], "drift": [0.2, 0.1], "right_of_8": [8, 1]}
GOOD = dict(n=4, accuracy=0.5, jargon=0.5, languages={"en": 0.25, "de": 0.75})
SAMPLE = dict(update=0, who="tandem", question="Q", gold="7", reward=1, spans=[["senior", "7"]])


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_seed(folder, *evaluations, measures=(), flags=(), pair=(), **added):
    """Rows of updates 0, 4, 8, ... with (senior's accuracy, jargon, joint accuracy) of 4 solutions.

    `added` goes into the evaluations of the senior, `pair` into those of the pair; `measures`: what
    changes in MEASURES of two problems, at the same updates; `flags` go over FLAGS.
    """
    rows = []
    for i, (accuracy, jargon, together) in enumerate(evaluations):
        senior = GOOD | {"accuracy": accuracy, "jargon": jargon, "tokens": 30.0} | added
        tandem = GOOD | {"accuracy": together, "handoffs": 8.0, "handoffs_inside": 2.0} | dict(pair)
        evaluation = {"senior": senior, "tandem": tandem}
        rows.append({"update": 4 * i, "eval": evaluation, "seconds_eval": 30.0})
    rows[0]["eval"]["junior"] = GOOD | {"accuracy": 0.25}
    write_rows(folder / "metrics.jsonl", *rows)
    lines = [{"update": 4 * i} | MEASURES | row for i, row in enumerate(measures)]
    write_rows(folder / "measures.jsonl", *lines)
    (folder / "config.json").write_text(json.dumps({"flags": FLAGS | dict(flags)}))


def draw(folder, setting, name):
    """One figure, which is not written."""
    plt.close("all")
    runs = tables.read_runs(folder, experiments.SETTINGS[setting])
    return figures.FIGURES[setting][name](folder, runs)


def test_differences_by_hand(tmp_path):
    """Two seeds of two problems. Alone j1 is right on 2 of 4 and the other arm on 3, the pair on 2
    and none; per seed +50 and 0, so Student's interval is 25 +- 12.706 * 25 (317.6)."""
    right = {"reinforce-j1": ([0, 1], [1, 0]), "reinforce-junior": ([1, 1], [1, 0])}
    # On validation problems and on other problems: not compared.
    right["reinforce-imitation"] = right["reinforce-j0"] = right["reinforce-j1"]
    for arm, seeds in right.items():
        for seed, values in enumerate(seeds):
            flags = {"updates": 0, "validation": "imitation" in arm}
            flags |= {"problems": "others"} if "j0" in arm else {}
            pair = {"outcomes": {"accuracy": [int(arm == "reinforce-j1"), 0]}}
            options = dict(flags=flags, pair=pair, outcomes={"accuracy": values, "jargon": [0, 0]})
            write_seed(tmp_path / arm / f"seed-{seed}", (1, 1, 1), **options)
    runs = tables.read_runs(tmp_path, right)
    write_seed(tmp_path / "reinforce-j1" / "seed-2", (1, 1, 1), (1, 1, 1))  # is not as long
    assert draw(tmp_path, "credit", "credit-shuffled") is None
    found = tables.table_of_differences(tmp_path, runs)
    assert "| reinforce-junior − reinforce-j1 | 2 | +25.0 [" in found
    assert "] [-292.6, +342.6] | +0.0 [+0.0, +0.0] [+0.0, +0.0] | -50.0 [" in found
    assert found.count("reinforce") == 2


# ------------------------------------------------------------------------------------------------
# Statistics


def test_the_bootstrap_sees_seeds_and_problems():
    """Two seeds that disagree completely: 0 to 1. Seeds that agree on a half of 400 problems: as
    the normal interval of 1200."""
    assert bootstrap_interval(np.stack([np.zeros((50, 1)), np.ones((50, 1))])) == (0.0, 1.0)
    rng = np.random.default_rng(1)
    half = np.stack([rng.permutation([0.0, 1.0] * 200) for _ in range(3)])[:, :, None]
    low, high = bootstrap_interval(half)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(1200), rel=0.15)


# ------------------------------------------------------------------------------------------------
# Tables of evaluations


def test_pooling(tmp_path):
    """3 of 4 and 1 of 4: 4 of 8, with its Wilson interval. Nobody wrote French: 0 of 8. Only what
    both seeds have evaluated is pooled."""
    write_seed(tmp_path / "tandem" / "seed-0", (0.75, 1, 0), (1, 1, 1))
    write_seed(tmp_path / "tandem" / "seed-1", (0.25, 1, 0))
    runs = tables.read_runs(tmp_path, ["tandem"])
    assert list(tables.pooled(runs, "senior", "accuracy").index) == [0]
    assert list(tables.pooled(runs, "senior", "languages.fr").loc[0])[:2] == [0, 0]
    assert tables.last_cell(runs, "senior", "accuracy") == "50.0 [21.5, 78.5] (25.0–75.0)"


def test_table(tmp_path):
    """4 evaluations of half a minute. An added metric has a column: a share if every outcome is 0
    or 1, else a mean; "–" where it was not measured."""
    for seed, share in enumerate((0.75, 0.25)):
        added = dict(short=share, lines=1.5 + seed, outcomes={"short": [1, 0], "lines": [1, 3]})
        evaluations = (share, 1, 0), (1 - seed / 2, 0, 1)
        write_seed(tmp_path / "tandem" / f"seed-{seed}", *evaluations, **added)
    write_seed(tmp_path / "solo" / "seed-0", (1, 1, 1))
    runs = tables.read_runs(tmp_path, ["tandem", "solo"])
    head, _, tandem, solo = tables.table(runs).splitlines()
    assert head.endswith("| minutes per seed | handoffs | handoffs_inside | short | lines |")
    assert solo.endswith("| 8 → 8 | 2 → 2 | – | – |")
    assert tandem == (
        "| tandem | 2 | 4 | 50.0 → 75.0 [40.9, 92.9] (50.0–100.0) "
        "| 100.0 → 0.0 [0.0, 32.4] (0.0–0.0) | 0.0 → 100.0 [67.6, 100.0] (100.0–100.0) "
        "| 25.0 [7.1, 59.1] (25.0–25.0) | de → de, 75.0 [40.9, 92.9] | 1.0 | 8 → 8 | 2 → 2 "
        "| 50.0 → 50.0 [21.5, 78.5] (25.0–75.0) | 2 → 2 |"
    )


# ------------------------------------------------------------------------------------------------
# Measures of Tandem RL


def test_estimates_by_hand(tmp_path):
    """One of two problems right: two draws give 0, 1/2, 1. Retention is (1/2) / (3/4). One right of
    8: 35 of 70 fours are all wrong; 5 or more: none; 0: all."""
    four = {"solo": [1, 1, 1, 0], "handoff": [1, 0, 1, 0], "right_of_8": [1, 5, 0, 8]}
    four = {name: [0, 0, 0, 0] for name in MEASURES} | four
    write_seed(tmp_path / "two" / "seed-0", (1, 1, 1), measures=[{}, {}, {}])
    write_seed(tmp_path / "four" / "seed-0", (1, 1, 1), measures=[{}, {}, four])
    (two,), (four,) = (tables.read_ends(tmp_path, [arm]).values() for arm in ("two", "four"))
    assert tables.estimate("solo", two) == (50, [(0, 100)], [50])
    assert tables.estimate("legibility", two)[:2] == (pytest.approx(0.4), [(0.3, 0.5)])
    assert tables.estimate("retention", four)[0] == pytest.approx(200 / 3)
    assert tables.estimate("pass@4", four)[0] == pytest.approx(62.5)


def test_comparisons_by_hand(tmp_path):
    """Differences are those of the seeds that both arms have finished, problem by problem. Solo:
    +50 and 0, whose Student's interval 25 -+ 12.706 * 35.36 / sqrt(2) keeps it from being bold.
    Retention is unknown for the seed without a right solution."""
    for seed in (0, 1):
        last = {"rlvr-tandem": {}, "rlvr-solo": {"solo": [seed, 0], "drift": [0.4, 0.3]}}
        for arm, row in last.items():
            write_seed(tmp_path / arm / f"seed-{seed}", (1, 1, 1), measures=[{}, {}, row])
    write_seed(tmp_path / "rlvr-tandem" / "seed-7", (1, 1, 1), measures=[{}, {}])
    runs = tables.read_runs(tmp_path, ["rlvr-tandem", "rlvr-solo"])
    head, _, tandem, solo, *_, cells = tables.table_of_measures(tmp_path, runs).splitlines()
    assert head.endswith("| legibility | drift |")
    assert tandem.startswith("| rlvr-tandem | 2 | 50.0 [0.0, 100.0] (50.0–50.0) | 75.0 [")
    assert solo.endswith(" | 0.3500 [0.3000, 0.4000] (0.3500–0.3500) |")
    name, seeds, solo, _, handoff, _, retention, *_, drift = cells.split(" | ")
    assert (name, seeds, solo[-16:]) == ("| rlvr-tandem − rlvr-solo", "2", "[-292.6, +342.6]")
    assert handoff == "+0.0 [+0.0, +0.0] [+0.0, +0.0]"
    assert retention.endswith("[+nan, +nan]")
    assert drift == "**-0.2000 [-0.2000, -0.2000] [-0.2000, -0.2000]** |"
    write_seed(tmp_path / "rlvr-solo" / "seed-0", (1, 1, 1), flags={"problems": "varied"})
    with pytest.raises(Refused, match="not measured alike"):
        tables.table_of_measures(tmp_path, runs)


# ------------------------------------------------------------------------------------------------
# Figures

RESULTS = Path(__file__).parent.parent / "results"
COMMITTED = [p for p in sorted(RESULTS.rglob("*.png")) if p.stem != "rollouts"]


def draw_again(committed, path):
    """Draw a committed figure again, from the rows beside it."""
    out = committed.parent
    if out.name == "atod":
        atod.draw(out, atod.seeds_in(out), path)
    elif out.name == "belief_states":
        belief_states.draw(belief_states.read_results(out), path)
    elif out.parents[1].name == "questions":
        kinds = {"lingua-franca": figures.SPOKEN, "languages-by-reward": figures.PAIR}
        runs = tables.read_runs(out.parent, tables.arms_in(out.parent))
        drawn = figures.curves(out.parent, runs, kinds.get(committed.stem, figures.SKILL))
        figures.save(drawn, path)
    else:
        (setting,) = [name for name, named in figures.FIGURES.items() if committed.stem in named]
        figures.save(draw(out.parent, setting, committed.stem), path)


@pytest.mark.parametrize("committed", COMMITTED, ids=lambda p: str(p.relative_to(RESULTS)))
def test_committed_figures_are_those_of_the_committed_rows(committed, tmp_path):
    """Pixel by pixel, where the same version of matplotlib draws them."""
    made_by = re.search(rb"Matplotlib version([0-9.]+[0-9])", committed.read_bytes())[1].decode()
    if made_by != matplotlib.__version__:
        pytest.skip(f"drawn by matplotlib {made_by}, and this is {matplotlib.__version__}")
    draw_again(committed, tmp_path / "again.png")
    assert np.array_equal(plt.imread(tmp_path / "again.png"), plt.imread(committed))
    # The PDF beside it holds no time, so that the same rows give the same file.
    pdf = committed.with_suffix(".pdf")
    assert not pdf.is_file() or b"CreationDate" not in pdf.read_bytes()


def test_curves(tmp_path):
    """Pooled with a band, or a line per seed where they disagree: 0 and 100 %. The control is drawn
    though it is of another setting. Each pair of languages has a row of panels."""
    for arm, jargon in {"tandem": (0, 1), "solo": (0.5, 0.5), "imitation": (1, 1)}.items():
        for seed in (0, 1):
            later = [(1, 0.5, 1)] * ((arm, seed) != ("solo", 1))  # which is still running
            write_seed(tmp_path / arm / f"seed-{seed}", (1, jargon[seed], 1), *later, n=400)
    figure = draw(tmp_path, "skill", "skill-figure2")
    assert (len(figure.axes[0].lines), len(figure.axes[0].collections)) == (4, 2)
    labels = [text.get_text() for text in figure.legends[0].texts]
    assert labels == ["tandem training", "standard RL", "imitation only", "junior alone"]
    about = "Junior: where. Problems: generated, 400 solutions per point and seed. Seeds per arm: 2"
    assert about in " ".join(figure.get_supxlabel().split())
    flags = {"senior_language": "de", "junior_language": "xx"}
    write_seed(tmp_path / "de-fr-tandem" / "seed-0", (1, 1, 1), flags=flags)
    rows = draw(tmp_path, "control", "control").axes
    labels = [ax.get_ylabel().splitlines()[0] for ax in rows[::3]]
    assert labels == ["English → English", "German → xx"]
    assert [ax.lines[-1].get_ydata()[0] for ax in rows[2::3]] == [25, 0]


def test_the_sweep(tmp_path):
    """Joint accuracy at the end decides; diverged arms are out; all equals are framed.
    Jargon is under 5 % at update 4, or never."""
    write_seed(tmp_path / "c0-j1" / "seed-0", (1, 1, 1), (1, 1, 0.5))
    write_seed(tmp_path / "c-0.5-j0" / "seed-0", (0, 1, 0), (0, 0, 0.75))
    write_seed(tmp_path / "c-0.1-j0" / "seed-0", (0, 1, 0), (0, 1, 0.75))
    write_seed(tmp_path / "c-0.3-j0" / "seed-0", (0, 1, 1), (0, 1, 1))
    (tmp_path / "c-0.3-j0" / "seed-0" / "stopped.txt").touch()
    write_seed(tmp_path / "test-c0-j1" / "seed-0", (1, 1, 1), (1, 1, 1))
    accuracy, until = draw(tmp_path, "sweep", "sweep").axes
    assert [text.get_text() for text in accuracy.texts] == ["50", "75", "75"]
    assert [text.get_text() for text in until.texts] == ["never", "never", "4"]
    # Of the cells from above, the second and the third are the best.
    assert [frame.get_edgecolor()[0] > 0.8 for frame in accuracy.patches] == [0, 1, 1]


def test_what_is_written_and_printed(tmp_path, monkeypatch, capsys):
    """An incomplete arm and an arm of no setting are named. A new setting is drawn."""
    monkeypatch.setitem(experiments.SETTINGS, "own", ["mine", "not run"])
    for arm in ("tandem", "stray", "shuffled", "mine"):
        write_seed(tmp_path / arm / "seed-0", (0.75, 1, 0.5), (0.5, 0.5, 0.75))
    write_rows(tmp_path / "shuffled" / "seed-0" / "metrics.jsonl", {"update": 0})
    samples = [SAMPLE | {"update": i, "spans": []} for i in range(3)]
    write_rows(tmp_path / "tandem" / "seed-0" / "samples.jsonl", *samples)
    figures.main(tmp_path)
    names = ["control", "granularity", "own", "skill-figure1", "skill-figure2"]
    files = [f"{name}.{kind}" for name in names for kind in ("pdf", "png")]
    found = {path.name for path in (tmp_path / "figures").iterdir()}
    assert found == {*files, "rollouts.html", "evaluations.csv"}
    written = pd.read_csv(tmp_path / "figures" / "evaluations.csv")
    assert not written.filter(regex="outcomes|seconds").size
    of_tandem = written[(written.arm == "tandem") & (written.who != "junior")]
    assert of_tandem.accuracy.tolist() == [0.75, 0.5, 0.5, 0.75]
    printed = capsys.readouterr().out
    for line in ("stray is left out", " | 8 → 8 | 2 → 2 |", "shuffled is left out"):
        assert line in printed
    ends_with(r"nowhere has no .*: run run_gsm8k\.py first", figures.main, tmp_path / "nowhere")
    (tmp_path / "tandem" / "seed-0" / "config.json").write_text("{")
    ends_with("tandem/seed-0/config.json cannot be used", figures.main, tmp_path)
