"""The figures and tables of the settings pressure and rlvr, checked against numbers worked out by hand."""

import json
from math import isnan

import pytest
from test_figures import MEASURES, labels_in, write_arm, write_measures, write_seed

from lab import curves, figures, figures_rl
from lab.runs import Refused

# ----------------------------------------------------------------------------------------------------------------------
# Pressure


def write_doses(runs):
    """Three shares. Before training: the senior's accuracy 75 %, the junior's 25 %, so that both alone have 50 % on average.

    Together 25 % (2 %: cost 25), 50 % (6 %: cost 0) and 25 or 75 % (12 %: cost 25 and -25).
    """
    write_seed(runs / "dose" / "0.02" / "grpo-tandem" / "seed-0", (0.75, 1, 0.25), (0.75, 0, 0.5), (1, 0, 1))
    for seed in (0, 1, 2):
        write_seed(runs / "grpo-tandem" / f"seed-{seed}", (0.75, 1, 0.5), (0.75, 0.25, 0.5), (0.5, 0, 0.5))
    # One seed keeps its jargon, and the other one has not reached update 8.
    write_seed(runs / "dose" / "0.12" / "grpo-tandem" / "seed-0", (0.75, 1, 0.25), (0.5, 1, 0.5), (0.5, 0.75, 0.5))
    write_seed(runs / "dose" / "0.12" / "grpo-tandem" / "seed-1", (0.75, 0.5, 0.75), (0.75, 0.25, 0.5))


def test_the_seeds_of_the_doses(tmp_path):
    """Seed 2 of the shipped base has no counterpart. Folders without a share or an evaluation of all three do not count."""
    write_doses(tmp_path)
    write_arm(tmp_path / "dose" / "bases", "grpo-tandem")
    row = {"update": 0, "eval": {"junior": {"n": 4, "accuracy": 1.0, "jargon": 0.0, "languages": {"en": 1.0}}}}
    write_arm(tmp_path / "dose" / "0.5", "grpo-tandem")
    (tmp_path / "dose" / "0.5" / "grpo-tandem" / "seed-0" / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    doses = figures_rl.read_doses(tmp_path)
    assert [(share, list(seeds)) for share, seeds in doses.items()] == [(0.02, [0]), (0.06, [0, 1]), (0.12, [0, 1])]
    assert figures_rl.read_doses(tmp_path / "dose") == {}


def test_the_panel_of_the_doses(tmp_path, drawn):
    """Points (cost, updates): low at 4 and at 8; never within 8, which is at the top; not known after 4 updates, so not drawn."""
    write_doses(tmp_path)
    runs = curves.read_runs(tmp_path, ["grpo-tandem"])
    assert figures_rl.figure_pressure(tmp_path, runs) == tmp_path / "figures" / "pressure.png"
    jargon, accuracy, together, panel = drawn["pressure.png"].axes
    assert labels_in(jargon) == ["GRPO, tandem (j = 0)"]
    assert labels_in(accuracy) == labels_in(together) == ["GRPO, tandem (j = 0)", "junior alone"]
    assert labels_in(panel) == ["2 %", "6 %", "12 %"]
    low, middle, high = [list(zip(*line.get_data())) for line in panel.lines]
    assert (low, middle) == ([(25, 4)], [(0, 8), (0, 8)])
    top = panel.get_yticks()[-1]
    assert top > 8
    assert panel.get_yticklabels()[-1].get_text() == "not\nwithin 8"
    assert high[0] == (25, top)
    assert high[1][0] == -25
    assert isnan(high[1][1])
    assert len({line.get_marker() for line in panel.lines}) == 3


def test_without_doses_there_is_neither_panel_nor_table(tmp_path, drawn):
    write_arm(tmp_path, "grpo-solo")
    write_arm(tmp_path, "grpo-tandem")
    runs = curves.read_runs(tmp_path, ["grpo-tandem", "grpo-solo"])
    figures_rl.figure_pressure(tmp_path, runs)
    axes = drawn["pressure.png"].axes
    assert len(axes) == 3
    assert labels_in(axes[0]) == ["GRPO, tandem (j = 0)", "GRPO, solo"]
    legend = [text.get_text() for text in drawn["pressure.png"].legends[0].get_texts()]
    assert legend == ["GRPO, tandem (j = 0)", "GRPO, solo", "junior alone"]
    assert figures_rl.table_of_doses(tmp_path, runs) is None


def test_table_of_doses(tmp_path, monkeypatch):
    """Of 12 %, both seeds reached update 4 only: accuracy 5 of 8 there, jargon 4 and 1 of 4. Nobody has measured update 24."""
    write_doses(tmp_path)
    monkeypatch.setattr(figures_rl, "DOSE_UPDATES", (0, 4, 24))
    head, _, *rows = figures_rl.table_of_doses(tmp_path, {}).splitlines()
    assert head == (
        "| annotated | seeds | updates | cost before training | jargon at 0 | jargon at 4 | jargon at 24 | under 5 % at | accuracy alone |"
    )
    assert rows == [
        "| 2 % | 1 | 8 | 25.0 | 100.0 | 0.0 | – | 4 | 75.0 → 100.0 [51.0, 100.0] |",
        "| 6 % | 2 | 8 | 0.0 (0.0–0.0) | 100.0 (100.0–100.0) | 25.0 (25.0–25.0) | – | 8, 8 | 75.0 → 50.0 [21.5, 78.5] |",
        "| 12 % | 2 | 4 | 0.0 (-25.0–25.0) | 75.0 (50.0–100.0) | 62.5 (25.0–100.0) | – | > 8, > 4 | 75.0 → 62.5 [30.6, 86.3] |",
    ]


def test_the_languages_under_pressure_have_files_of_their_own(tmp_path, drawn):
    write_arm(tmp_path, "de-fr-grpo-tandem", senior_language="de", junior_language="fr")
    figures.draw(tmp_path, "pressure-language", ["de-fr-grpo-tandem"])
    assert list(drawn) == ["pressure-language-figure2.png", "pressure-language-figure3.png"]
    assert labels_in(drawn["pressure-language-figure2.png"].axes[0]) == ["GRPO, tandem (j = 0)", "junior alone"]
    assert drawn["pressure-language-figure3.png"].axes[0].get_ylabel() == "GRPO, tandem (j = 0):\nsolutions (%)"


# ----------------------------------------------------------------------------------------------------------------------
# Tandem RL


def ends(runs, *arms):
    """{arm: {seed: last row}}"""
    return figures_rl.ends_of(runs, figures_rl.read_measures(runs, arms))


def test_a_measure_and_its_interval(tmp_path):
    """One seed, two problems, one of them right: two draws of two give 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4."""
    write_measures(tmp_path / "rlvr-solo" / "seed-0", {}, {"solo": [1, 0], "legibility": [0.5, 0.3]})
    rows = list(ends(tmp_path, "rlvr-solo")["rlvr-solo"].values())
    assert figures_rl.estimate(rows, "solo") == (50, 0, 100, [50])
    assert figures_rl.estimate(rows, "legibility") == (pytest.approx(0.4), 0.3, 0.5, [pytest.approx(0.4)])


def test_retention_and_pass_at_4(tmp_path):
    """Retention is (1/2) / (3/4) = 2/3. One right of 8: C(7, 4) / C(8, 4) = 35 / 70 are all wrong; 5 of 8: never; 0 of 8: always."""
    right = {"solo": [1, 1, 1, 0], "handoff": [1, 0, 1, 0], "right_of_8": [1, 5, 0, 8]}
    write_measures(tmp_path / "rlvr-solo" / "seed-0", {name: [0, 0, 0, 0] for name in MEASURES} | right)
    rows = list(ends(tmp_path, "rlvr-solo")["rlvr-solo"].values())
    assert figures_rl.estimate(rows, "retention").value == pytest.approx(200 / 3)
    assert figures_rl.estimate(rows, "pass@4").value == pytest.approx(100 * (0.5 + 1 + 0 + 1) / 4)


def test_retention_without_a_right_solution_is_unknown(tmp_path):
    for arm, solo in (("rlvr-tandem", [1, 1]), ("rlvr-solo", [0, 0])):
        write_measures(tmp_path / arm / "seed-0", {"solo": solo, "handoff": [1, 1]})
    tandem, solo = (list(seeds.values()) for seeds in ends(tmp_path, "rlvr-tandem", "rlvr-solo").values())
    assert isnan(figures_rl.estimate(solo, "retention").value)
    assert figures_rl.difference_cell(tandem, solo, "retention") == "+nan [+nan, +nan]"


def test_arms_are_compared_on_the_same_seeds_and_problems(tmp_path):
    """Both arms are right on the same problems of seeds 1 and 3, so the difference is 0 in every resample.

    Seed 0 of the one arm and seed 2 of the other one have not finished. With them, or if each arm drew its own problems, it would not be 0.
    """
    for arm, unfinished in (("rlvr-tandem", 0), ("rlvr-solo", 2)):
        for seed, solo in enumerate(([1, 1], [1, 0], [0, 0], [0, 1])):
            write_measures(tmp_path / arm / f"seed-{seed}", {}, {"solo": solo}, updates=24 if seed == unfinished else 12)
    head, _, row = figures_rl.table_of_differences(tmp_path, ["rlvr-tandem", "rlvr-solo"]).splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | ")))
    assert cells["| difference"] == "| rlvr-tandem − rlvr-solo"
    assert cells["seeds"] == "2"
    assert cells["solo"] == "+0.0 [+0.0, +0.0] [+0.0, +0.0]"


def test_differences_by_hand(tmp_path):
    """Handoff 1 against 0 everywhere: +100, without 0. Drift 0.1 against 0.3: -0.2, without 0. Solo of one problem of two: with 0."""
    write_measures(tmp_path / "rlvr-tandem" / "seed-0", {"solo": [1, 0], "handoff": [1, 1], "drift": [0.1, 0.1]})
    write_measures(tmp_path / "rlvr-solo" / "seed-0", {"solo": [0, 0], "handoff": [0, 0], "drift": [0.3, 0.3]})
    write_measures(tmp_path / "rlvr-solo-kl" / "seed-1", {})
    tandem, solo, _ = (list(seeds.values()) for seeds in ends(tmp_path, "rlvr-tandem", "rlvr-solo", "rlvr-solo-kl").values())
    assert figures_rl.difference_cell(tandem, solo, "handoff") == "**+100.0 [+100.0, +100.0]**"
    assert figures_rl.difference_cell(solo, tandem, "handoff") == "**-100.0 [-100.0, -100.0]**"
    assert figures_rl.difference_cell(tandem, solo, "drift") == "**-0.2000 [-0.2000, -0.2000]**"
    assert figures_rl.difference_cell(tandem, solo, "solo") == "+50.0 [+0.0, +100.0]"
    # Two seeds, +50 and 0: mean 25, and Student's interval 25 -+ 12.706 * 35.36 / sqrt(2) = 25 -+ 317.7 keeps it from being bold.
    two = [*tandem, *solo], [*solo, *solo]
    assert figures_rl.difference_cell(*two, "solo").endswith("[-292.6, +342.6]")
    # An arm without a seed in common cannot be compared.
    rows = figures_rl.table_of_differences(tmp_path, ["rlvr-tandem", "rlvr-solo-kl"]).splitlines()[2:]
    assert rows == ["| rlvr-tandem − rlvr-solo-kl | 0 |" + " – |" * 11]
    assert figures_rl.table_of_differences(tmp_path, ["rlvr-solo", "rlvr-solo-kl"]) is None
    assert figures_rl.table_of_differences(tmp_path, ["rlvr-tandem"]) is None


def test_table_of_measures(tmp_path):
    """Two finished seeds whose problems are all alike: 0 and 100 %. An arm of which no seed has finished has no numbers."""
    for seed, solo in enumerate(([0, 0], [1, 1])):
        write_measures(tmp_path / "rlvr-tandem" / f"seed-{seed}", {}, {"solo": solo, "legibility": [0.5, 0.5]})
    write_measures(tmp_path / "rlvr-tandem" / "seed-5", {}, {}, updates=24)
    write_measures(tmp_path / "rlvr-solo" / "seed-0", {}, updates=12)
    write_arm(tmp_path, "rlvr-solo-16")
    head, _, tandem, solo, _, note = figures_rl.table_of_measures(tmp_path, ["rlvr-tandem", "rlvr-solo", "rlvr-solo-16"]).splitlines()
    assert head == (
        "| arm | seeds | solo | pass@4 | handoff | word | retention | continued_25 | continued_50 | continued_75 "
        "| legibility | drift | drift_k3 |"
    )
    cells = dict(zip(head.split(" | "), tandem.split(" | ")))
    assert (cells["| arm"], cells["seeds"]) == ("| rlvr-tandem", "2")
    assert cells["solo"] == "50.0 [0.0, 100.0] (0.0–100.0)"
    assert cells["legibility"] == "0.5000 [0.5000, 0.5000] (0.5000–0.5000)"
    assert cells["pass@4"].startswith("75.0 [")  # 8 and 1 right of 8: (1 + 1/2) / 2
    assert solo == "| rlvr-solo | 0 |" + " – |" * 11
    assert note == "Left out at the end, because not finished: rlvr-tandem seed 5, rlvr-solo seed 0."


@pytest.mark.parametrize(
    ("row", "flags", "reason"),
    [
        ({name: [0, 1, 1] for name in [*MEASURES, "right_of_8"]}, {}, "update 12, 3 problems of generated"),
        ({}, {"problems": "openai/gsm8k"}, "2 problems of openai/gsm8k"),
        ({}, {"validation": True}, r"generated \(validation\)"),
        ({"update": 24, "right_of_8": [8, 1]}, {"updates": 24}, "update 24, 2 problems"),
    ],
)
def test_runs_that_were_measured_differently_are_not_compared(tmp_path, row, flags, reason):
    write_measures(tmp_path / "rlvr-tandem" / "seed-0", {}, {})
    write_measures(tmp_path / "rlvr-solo" / "seed-0", {}, {})
    assert figures_rl.table_of_differences(tmp_path, ["rlvr-tandem", "rlvr-solo"]) is not None
    write_measures(tmp_path / "rlvr-solo" / "seed-0", {}, row, **flags)
    for draw in (figures_rl.table_of_differences, figures_rl.table_of_measures, figures_rl.figure_rlvr):
        with pytest.raises(Refused, match=f"rlvr-tandem.seed-0: update 12, 2 problems of generated; .*rlvr-solo.seed-0: .*{reason}"):
            draw(tmp_path, ["rlvr-tandem", "rlvr-solo"])


@pytest.mark.parametrize(
    "row",
    [{"drift": [0.1]}, {"word": None}, {"solo": []}, {"legibility": [0.1, float("nan")]}, {"right_of_8": [9, 0]}, {"handoff": [1, "0"]}],
)
def test_measures_that_no_run_writes_are_refused(tmp_path, row):
    write_measures(tmp_path / "rlvr-solo" / "seed-0", {}, row)
    with pytest.raises(Refused, match=r"measures.jsonl cannot be used \(what it says of update 12"):
        figures_rl.read_measures(tmp_path, ["rlvr-solo"])


def test_a_finished_run_needs_pass_at_4_and_its_flags(tmp_path):
    folder = tmp_path / "rlvr-solo" / "seed-0"
    write_measures(folder, {}, {}, {}, updates=12)
    with pytest.raises(Refused, match="its last row lacks right_of_8"):
        ends(tmp_path, "rlvr-solo")
    write_measures(folder, {}, {})
    (folder / "config.json").write_text(json.dumps({"flags": {"updates": 12}}), encoding="utf-8")
    with pytest.raises(Refused, match="config.json cannot be used .it lacks the values of --updates"):
        ends(tmp_path, "rlvr-solo")


def test_figure_rlvr(tmp_path, drawn):
    """Two finished seeds, 50 and 100 %, and an unfinished one that counts in the curves only, up to update 12."""
    arms = ["rlvr-tandem", "rlvr-solo", "mine"]
    write_measures(tmp_path / "rlvr-tandem" / "seed-0", {"solo": [0, 0]}, {"solo": [1, 0]}, {"solo": [1, 0]})
    write_measures(tmp_path / "rlvr-tandem" / "seed-1", {"solo": [0, 0]}, {"solo": [1, 0]}, {"solo": [1, 1]})
    write_measures(tmp_path / "rlvr-tandem" / "seed-2", {"solo": [0, 0]}, {"solo": [1, 1]}, updates=24)
    write_measures(tmp_path / "mine" / "seed-0", {"drift": [0, 0]}, {"drift": [0.1, 0.2]}, updates=24)
    figures_rl.figure_rlvr(tmp_path, dict.fromkeys(arms))
    figure = drawn["rlvr.png"]
    upper, lower = figure.axes[0], figure.axes[4]
    assert [ax.get_title().split("\n")[0] for ax in figure.axes[:4]] == [title.split("\n")[0] for title in figures_rl.PANELS.values()]
    # A resample has the mean 0 with probability 1/4 * 1/16 = 1/64 and at most 1/4 with 5/64, so its 2.5 % quantile is 1/4.
    (bar,) = upper.collections[0].get_segments()
    assert [list(point) for point in bar] == [[0, 25], [0, 100]]
    assert [list(line.get_ydata()) for line in upper.lines] == [[75], [50, 100]]
    assert upper.get_xlabel() == "update 24"
    # Three thin lines and the mean of the first arm, then the only seed of the other one.
    mean = [0, pytest.approx(200 / 3)]
    assert [list(line.get_ydata()) for line in lower.lines] == [[0, 50, 50], [0, 50, 100], [0, 100], mean, [50, 50]]
    assert list(lower.lines[2].get_xdata()) == list(lower.lines[3].get_xdata()) == [0, 12]
    assert list(figure.axes[6].lines[-1].get_ydata()) == [0, pytest.approx(0.15)]
    assert labels_in(lower) == ["tandem GRPO", "mine"]
    caption = " ".join(figure.get_supxlabel().split())
    assert caption.startswith("Seeds per arm: 1 or 3.")
    assert caption.endswith("Left out at the end, because not finished: rlvr-tandem seed 2, mine seed 0.")


def test_without_measures_there_is_nothing_to_draw(tmp_path, drawn):
    """A run that has just begun has an empty file."""
    write_arm(tmp_path, "rlvr-tandem")
    (tmp_path / "rlvr-tandem" / "seed-0" / "measures.jsonl").touch()
    runs = curves.read_runs(tmp_path, ["rlvr-tandem", "rlvr-solo"])
    assert figures_rl.figure_rlvr(tmp_path, runs) is None
    assert figures_rl.table_of_measures(tmp_path, runs) is None
    assert figures_rl.table_of_differences(tmp_path, runs) is None
    assert drawn == {}
    # As soon as there is a row, there is a figure, though no run has finished.
    write_measures(tmp_path / "rlvr-tandem" / "seed-0", {}, updates=12)
    assert figures_rl.figure_rlvr(tmp_path, runs) is not None
    assert drawn["rlvr.png"].axes[0].get_xlabel() == "no run has finished"
    assert len(drawn["rlvr.png"].axes[0].lines) == 0
