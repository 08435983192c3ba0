"""What the figures compute, checked against numbers worked out by hand, and that nothing that was run is left undrawn."""

import json
import re
import sys
from itertools import product
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

from lab import curves, figures, figures_rl

FLAGS = {"handoff": "word", "p": 0.5, "solo": False, "senior_language": "en", "junior_language": "en"}
PNG = b"\x89PNG"


def write_seed(folder, *evaluations, flags=None, diverged=False, **added):
    """Rows for updates 0, 4, 8, ..., with the given (senior's accuracy, jargon, joint accuracy) of 4 solutions each.

    `flags` go over FLAGS in config.json; `added` are further numbers in the evaluation of the senior.
    """
    folder.mkdir(parents=True)
    rows = []
    for i, (accuracy, jargon, together) in enumerate(evaluations):
        cell = {"n": 4, "accuracy": accuracy, "jargon": jargon, "languages": {"en": 0.25, "de": 0.75}, "tokens": 30.0 + i}
        tandem = cell | {"accuracy": together, "handoffs": 8.0, "handoffs_inside": 2.0}
        rows.append({"update": 4 * i, "eval": {"senior": cell | added, "tandem": tandem}, "seconds_eval": 30.0})
    rows[0]["eval"]["junior"] = cell | {"accuracy": 0.25}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"flags": FLAGS | (flags or {})}), encoding="utf-8")
    if diverged:
        (folder / "stopped.txt").write_text("why", encoding="utf-8")


def write_samples(path, text, question, n=3):
    """Joint rollouts of one problem at n evaluations, wrong at the first one and right after it."""
    sample = {"who": "tandem", "question": question, "gold": "7", "spans": [["senior", text], ["junior", "7"]]}
    samples = [sample | {"update": 4 * i, "reward": float(i > 0)} for i in range(n)]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")


MEASURES = dict(solo=[1, 0], handoff=[1, 0], word=[1, 0], continued_25=[1, 0], continued_50=[1, 0], continued_75=[1, 0])
MEASURES |= dict(legibility=[0.5, 0.3], drift=[0.2, 0.1], drift_k3=[0.2, 0.2])


def write_measures(folder, *rows, updates=None, **flags):
    """measures.jsonl for updates 0, 12, 24, ... of two problems each, with what the rows change in MEASURES.

    `updates`: the number of updates in config.json, if the run has not finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = 12 * (len(rows) - 1) if updates is None else updates
    at_the_ends = {0: {"right_of_8": [8, 1]}, last: {"right_of_8": [8, 1]}}
    lines = [{"update": 12 * i} | MEASURES | at_the_ends.get(12 * i, {}) | row for i, row in enumerate(rows)]
    (folder / "measures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    flags = FLAGS | {"updates": last, "problems": "generated", "validation": False} | flags
    (folder / "config.json").write_text(json.dumps({"flags": flags}), encoding="utf-8")


def write_arm(runs, arm, **flags):
    """One seed of an arm, with two evaluations, in which jargon goes from 100 to 50 %."""
    write_seed(runs / arm / "seed-0", (0.75, 1, 0.5), (0.5, 0.5, 0.75), flags=flags)


def labels_in(ax):
    return ax.get_legend_handles_labels()[1]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def test_pooling(tmp_path):
    """Two seeds, 3 of 4 and 1 of 4: pooled 4 of 8, with the Wilson interval of 8. A language in which nobody wrote is 0 of 8."""
    write_seed(tmp_path / "tandem" / "seed-0", (0.75, 1.0, 0.0))
    write_seed(tmp_path / "tandem" / "seed-1", (0.25, 1.0, 0.0))
    seeds = curves.read_runs(tmp_path, ["tandem"])["tandem"]
    (point,) = curves.pooled(seeds, "senior", "accuracy")
    assert (point.update, point.value) == (0, 50)
    assert (point.low, point.high) == pytest.approx((21.52, 78.48), abs=1e-2)
    assert curves.pooled(seeds, "senior", "languages.de")[0].value == 75
    assert curves.pooled(seeds, "senior", "languages.fr")[0][:3] == (0, 0, 0)


def test_only_evaluations_of_every_seed_are_pooled(tmp_path):
    write_seed(tmp_path / "tandem" / "seed-0", (1, 1, 1), (1, 1, 1))
    write_seed(tmp_path / "tandem" / "seed-1", (1, 1, 1))
    seeds = curves.read_runs(tmp_path, ["tandem"])["tandem"]
    assert [[point.update for point in curves.pooled(some, "senior", "accuracy")] for some in (seeds, seeds[:1])] == [[0], [0, 4]]


def test_only_arms_that_evaluated_all_three_are_read(tmp_path):
    write_arm(tmp_path, "tandem")
    write_arm(tmp_path, "solo")
    row = {"update": 0, "eval": {"junior": {"n": 4, "accuracy": 1.0, "jargon": 0.0, "languages": {"en": 1.0}}}}
    (tmp_path / "solo" / "seed-0" / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert list(curves.read_runs(tmp_path, ["solo", "tandem", "absent"])) == ["tandem"]


def test_the_best_cell_of_the_sweep(tmp_path):
    """Joint accuracy at the end decides, over both seeds; a diverged or unfinished arm is out; of equals, c nearest to 0."""
    for seed, (low, high) in enumerate([(0.25, 0.75), (0.5, 0.5)]):  # pooled 3 of 8 and 5 of 8
        write_seed(tmp_path / "c0-j1" / f"seed-{seed}", (1, 1, 1), (1, 1, low))
        write_seed(tmp_path / "c-0.5-j0.2" / f"seed-{seed}", (0, 1, 0), (0, 1, high))
        write_seed(tmp_path / "c-0.1-j0.2" / f"seed-{seed}", (0, 1, 0), (0, 1, high))
        write_seed(tmp_path / "c-0.3-j0" / f"seed-{seed}", (0, 1, 1), (0, 1, 1), diverged=True)
        write_seed(tmp_path / "c-0.3-j1" / f"seed-{seed}", (0, 1, 1))  # has not reached its end
        write_seed(tmp_path / "test-c0-j0" / f"seed-{seed}", (1, 1, 1), (1, 1, 1))
    assert figures.best_cell(tmp_path) == (-0.1, 0.2)
    assert figures.cells_of(figures.arms_in(tmp_path), "test-") == {(0.0, 0.0): "test-c0-j0"}
    assert figures.best_cell(tmp_path / "c0-j1") is None


def test_updates_until(tmp_path):
    """Jargon 100, 50, 0 %: under 60 at update 4, under 5 at 8, under 0 never."""
    write_seed(tmp_path / "tandem" / "seed-0", (1, 1, 1), (1, 0.5, 1), (1, 0, 1))
    seeds = curves.read_runs(tmp_path, ["tandem"])["tandem"]
    assert [curves.updates_until(seeds, level) for level in (60, 5)] == [4, 8]
    assert curves.updates_until(seeds, 0) != curves.updates_until(seeds, 0)  # nan


def test_table(tmp_path):
    """Two seeds: the senior's accuracy 4 of 8, then 6 of 8 (2 and 4 of 4); 4 evaluations of half a minute: 1.0 minutes per seed."""
    write_seed(tmp_path / "tandem" / "seed-0", (0.75, 1, 0), (1.0, 0, 1))
    write_seed(tmp_path / "tandem" / "seed-1", (0.25, 1, 0), (0.5, 0, 1))
    head, _, row = figures.table(curves.read_runs(tmp_path, ["tandem"])).splitlines()
    assert head.endswith("| language | minutes per seed |")
    assert row == (
        "| tandem | 2 | 4 | 50.0 → 75.0 [40.9, 92.9] (50.0–100.0) | 100.0 → 0.0 [0.0, 32.4] (0.0–0.0) "
        "| 0.0 → 100.0 [67.6, 100.0] (100.0–100.0) | 25.0 [7.1, 59.1] (25.0–25.0) | de → de, 75.0 [40.9, 92.9] | 1.0 |"
    )


def test_an_added_metric_has_a_column_and_can_be_drawn(tmp_path):
    """A mean, not a share: averaged over seeds, without a band, on axes of its own range; "–" where an arm has not measured it."""
    for seed, perplexity in enumerate((120.0, 130.0)):
        write_seed(tmp_path / "tandem" / f"seed-{seed}", (1, 1, 1), (1, 1, 1), perplexity=perplexity, words=["any", "thing"])
    write_arm(tmp_path, "solo")
    runs = curves.read_runs(tmp_path, ["tandem", "solo"])
    head, _, tandem, solo = figures.table(runs).splitlines()
    assert head.endswith("| minutes per seed | perplexity |")
    assert tandem.endswith("| 125 → 125 |")
    assert solo.endswith("| – |")
    figure, ax = plt.subplots()
    curves.draw_curve(ax, runs["tandem"], "senior", "perplexity", curves.STYLES[0], "mine")
    assert [list(line.get_ydata()) for line in ax.lines] == [[120, 120], [130, 130], [125, 125]]
    assert len(ax.collections) == 0
    assert ax.get_ylim()[1] > 130
    with pytest.raises(ValueError, match="acuracy"):
        curves.draw_curve(ax, runs["tandem"], "senior", "acuracy", curves.STYLES[0], "a typing error")
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# Nothing is left undrawn


def test_every_arm_of_the_granularity_figure_is_drawn(tmp_path, drawn):
    """By its flags: a schedule that nobody knows, p with another schedule, and two arms that differ in something else."""
    write_arm(tmp_path, "tandem")
    write_seed(tmp_path / "syllables" / "seed-0", (0.5, 1, 0.5), flags={"handoff": "syllable"})
    write_arm(tmp_path, "p-0.25", p=0.25)
    write_arm(tmp_path, "rare", p=0.1, handoff="sentence")
    write_arm(tmp_path, "solo", solo=True)
    write_seed(tmp_path / "mine" / "seed-0", (0.25, 1, 0.5))
    figures.draw(tmp_path, "granularity", ["syllables", "tandem", "mine", "p-0.25", "rare", "solo"])
    axes = drawn["granularity.png"].axes
    assert labels_in(axes[0]) == labels_in(axes[1])[:-1] == ["word (tandem)", "word (mine)", "syllable"]
    by_p = ["p = 0.1, sentence", "p = 0.25, word", "p = 0.5, word (tandem)", "p = 0.5, word (mine)", "p = 1"]
    assert labels_in(axes[3]) == by_p
    handoffs = [bar.get_height() for bar in axes[5].patches]
    assert handoffs == [8, 8, 8, 8, 0] + [2, 2, 2, 2, 0]  # all, then inside an expression; the solo arm shares nothing


def test_equal_schedules_share_a_label(tmp_path, drawn):
    """Two schedules may be one, where each word is one token: they are drawn once, under both names. "redraw" comes after "word"."""
    write_arm(tmp_path, "redraw", handoff="redraw")
    write_seed(tmp_path / "tandem" / "seed-0", (1, 1, 1))
    write_seed(tmp_path / "token" / "seed-0", (1, 1, 1), flags={"handoff": "token"})
    figures.draw(tmp_path, "granularity", ["redraw", "tandem", "token"])
    axes = drawn["granularity.png"].axes
    assert labels_in(axes[0]) == ["token = word", "redraw"]
    assert len(axes) == 3  # no arm differs in p, so there is no second row


def test_more_arms_than_styles_are_all_drawn(tmp_path, drawn):
    arms = [f"arm-{i}" for i in range(len(curves.STYLES) + 2)]
    for arm in arms:
        write_arm(tmp_path, arm, handoff=arm)
    figures.draw(tmp_path, "skill", arms)
    assert labels_in(drawn["skill-figure2.png"].axes[0]) == [*arms, "junior alone"]


def test_an_unknown_control_arm_is_drawn_under_its_own_name(tmp_path, drawn):
    german_french = {"senior_language": "de", "junior_language": "fr"}
    write_arm(tmp_path, "tandem")
    write_arm(tmp_path, "mine", **german_french)
    write_arm(tmp_path, "de-fr-shuffled", **german_french)
    figures.draw(tmp_path, "control", ["tandem", "mine", "de-fr-shuffled"])
    axes = drawn["control.png"].axes
    assert [ax.get_title() for ax in axes] == ["English → English"] * 2 + [""] + ["German → French"] * 3
    assert labels_in(axes[5]) == ["mine", "shuffled rewards, j = 1"]
    legend = [text.get_text() for text in axes[2].get_legend().get_texts()]
    assert legend == ["true rewards, j = 1 (main)", "junior alone", "mine", "shuffled rewards, j = 1"]


def test_an_unknown_language_is_drawn(tmp_path, drawn):
    write_arm(tmp_path, "es-en-tandem", senior_language="es")
    path = tmp_path / "es-en-tandem" / "seed-0" / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"de"', '"es"'), encoding="utf-8")
    figures.draw(tmp_path, "language", ["es-en-tandem"])
    (ax,) = drawn["language-figure3.png"].axes
    assert ax.get_title() == "es → English"
    last = {line.get_label(): line.get_ydata()[-1] for line in ax.lines}
    assert last == {"English": 25, "German": 0, "French": 0, "es": 75}


# ----------------------------------------------------------------------------------------------------------------------
# Figure 1


def test_a_wrapped_rollout_keeps_its_authors():
    """Eight columns: "She sells" breaks before " sells", whose space is dropped; "5:" is shared by both authors."""
    lines = figures.wrap_spans([("senior", "She sel"), ("junior", "ls 5"), ("senior", ":\n6")], columns=8)
    assert lines == [[(0, "senior", "She")], [(0, "senior", "sel"), (3, "junior", "ls 5"), (7, "senior", ":")], [(0, "senior", "6")]]


def test_a_word_that_is_too_long_is_broken():
    assert [line[0][2] for line in figures.wrap_spans([("senior", "1+1=2+0=1+1")], columns=5)] == ["1+1=", "2+0=", "1+1"]


def test_figure_1(tmp_path, drawn):
    """Three evaluations are needed; dollars are no formula; of two seeds, the rollout with jargon is taken."""
    for seed, text in enumerate(("$3 and $4: 3+4=7. _", "She has 3+4=<<3+4=")):
        folder = tmp_path / "tandem" / f"seed-{seed}"
        folder.mkdir(parents=True)
        for n, is_drawn in ((2, seed == 1), (3, True)):
            write_samples(folder / "samples.jsonl", text, f"Why pay $3 or $4, {seed}?", n)
            assert (figures.figure_1(tmp_path, {}) is not None) == is_drawn
    texts = [text.get_text() for text in drawn["skill-figure1.png"].axes[0].texts]
    assert texts[0] == "Why pay $3 or $4, 1? (Answer: 7)"
    assert texts[1:4] == ["before: update 0, wrong", "She has 3+4=<<3+4=", "7"]
    assert "Chosen: the first with <<...>> that went from wrong to right" in texts


def test_figure_1_shows_jargon_that_goes_although_the_answer_was_right_before(tmp_path):
    """The first sample never had jargon; the second had it, and lost it; both were right all the time."""
    texts = {"plain": ["3+4=7."] * 3, "annotated": ["3+4=<<3+4=7>>7.", "3+4=7.", "3+4=7."]}
    rows = [
        {"update": 4 * i, "who": "tandem", "question": question, "gold": "7", "reward": 1.0, "spans": [["senior", text]]}
        for question, of_question in texts.items()
        for i, text in enumerate(of_question)
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    samples, reason = figures.choose_example([path])
    assert samples[0]["question"] == "annotated"
    assert reason == "Chosen: the first that lost its <<...>>"


# ----------------------------------------------------------------------------------------------------------------------
# All of it

SETTINGS = {
    "skill": ["tandem", "solo"],
    "language": [f"{pair}-{arm}" for pair, arm in product(("en-de", "de-fr"), ("tandem", "solo"))],
    "granularity": ["token", "tandem", "p-0.25", "solo"],
    "control": ["tandem", "shuffled", "senior-only", "de-fr-tandem", "de-fr-shuffled", "de-fr-senior-only"],
    "sweep": ["c0-j0", "c0-j1", "c-0.5-j1"],
    "pressure": ["grpo-tandem", "reinforce-j1"],
    "pressure-language": ["de-fr-grpo-tandem", "en-de-grpo-tandem"],
    "rlvr": ["rlvr-tandem", "rlvr-solo"],
}
FILES = ["skill-figure1", "skill-figure2", "language-figure2", "language-figure3", "granularity", "control", "sweep"]
FILES += ["pressure", "pressure-language-figure2", "pressure-language-figure3", "rlvr"]


def test_all_settings_are_drawn(tmp_path, capsys, monkeypatch):
    """From a folder with one seed per arm. The test arms of the sweep are found, and an arm of no setting is named."""
    monkeypatch.setitem(sys.modules, "run_gsm8k", SimpleNamespace(SETTINGS=SETTINGS))
    for arm in dict.fromkeys(arm for arms in SETTINGS.values() for arm in arms):
        flags = {"handoff": "token"} if arm == "token" else {"solo": arm.endswith("solo"), "p": 0.25 if arm == "p-0.25" else 0.5}
        if arm[:5] in ("en-de", "de-fr"):
            flags |= {"senior_language": arm[:2], "junior_language": arm[3:5]}
        write_arm(tmp_path, arm, **flags)
    write_arm(tmp_path, "test-c-0.5-j1")
    write_arm(tmp_path, "stray")
    write_samples(tmp_path / "tandem" / "seed-0" / "samples.jsonl", "3+4=", "How many?")
    write_seed(tmp_path / "dose" / "0.02" / "grpo-tandem" / "seed-0", (0.75, 1, 0.25), (0.5, 0, 0.75))
    for arm in SETTINGS["rlvr"]:
        write_measures(tmp_path / arm / "seed-0", {}, {})
    # The intervals take long and are tested elsewhere.
    monkeypatch.setattr(figures_rl, "bootstrap_interval", lambda values, statistic: (0.0, 1.0))
    figures.main(str(tmp_path))
    printed = capsys.readouterr().out
    drawn = {f"{name}.{kind}" for name in FILES for kind in ("pdf", "png")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == drawn | {"rollouts.html"}
    for name in FILES:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes()[:4] == PNG
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
        assert f"{name}.png" in printed
    assert all(f"| {arm} | 1 | 4 |" in printed for arms in SETTINGS.values() for arm in arms)
    assert "| test-c-0.5-j1 | 1 | 4 |" in printed
    assert "stray is in no setting" in printed
    # The further tables stand below that of their setting, each after an empty line.
    assert printed.count("\n\n| ") == 4
    assert all(f"\n\n| {heading} | " in printed for heading in ("annotated", "arm | seeds | solo", "difference"))
    assert "\n\n| arm, together before training | handoffs | inside an expression | " in printed
    # The rows of this test are as old ones are: words and numbers are not told apart.
    assert "| token | 8.0 | 2.0 | – | – |" in printed


def test_handoffs_by_place_are_means_over_seeds(tmp_path):
    for seed, counts in enumerate(([8.0, 2.0, 1.0, 0.5], [9.0, 3.0, 2.0, 0.0])):
        write_seed(tmp_path / "word" / f"seed-{seed}", (1, 1, 0.5), (1, 0, 0.75))
        path = tmp_path / "word" / f"seed-{seed}" / "metrics.jsonl"
        first, *others = [json.loads(line) for line in path.read_text().splitlines()]
        first["eval"]["tandem"] |= dict(zip(figures.HANDOFFS, counts))
        path.write_text("".join(json.dumps(row) + "\n" for row in (first, *others)))
    table = figures.table_of_handoffs(tmp_path, curves.read_runs(tmp_path, ["word"]))
    assert table.splitlines()[-1] == "| word | 8.5 | 2.5 | 1.5 | 0.2 |"


def test_the_sweep_says_what_became_of_each_cell(tmp_path, drawn):
    """With c = 0, j = 0 is more accurate than j = 1 and loses its jargon at update 4. With c = -0.5, one arm diverged, one is missing."""
    write_seed(tmp_path / "c0-j1" / "seed-0", (1, 1, 0.5), (1, 0.5, 0.5))
    write_seed(tmp_path / "c0-j0" / "seed-0", (1, 1, 0.5), (1, 0, 0.75))
    write_seed(tmp_path / "c-0.5-j1" / "seed-0", (1, 1, 0.5), diverged=True)
    write_arm(tmp_path, "test-c-0.5-j1")
    write_arm(tmp_path, "test-c0-j1")
    figures.draw(tmp_path, "sweep", SETTINGS["sweep"])
    accuracy, no_jargon, learning, _ = drawn["sweep.png"].axes
    assert [text.get_text() for text in accuracy.texts] == ["75", "50", "–", "diverged"]
    assert [text.get_text() for text in no_jargon.texts] == ["4", "never", "–", "diverged"]
    assert [frame.get_xy() for frame in accuracy.patches] == [(-0.5, -0.5)]
    main, other = "c = 0, j = 1", "c = -0.5, j = 1"
    assert labels_in(learning) == [
        f"{main} (main), senior alone",
        f"{main}, together",
        f"{other}, senior alone",
        f"{other}, together",
        "junior alone",
    ]


def test_a_sweep_of_which_every_arm_diverged_is_drawn(tmp_path, drawn):
    write_seed(tmp_path / "c0-j1" / "seed-0", (1, 1, 1), diverged=True)
    figures.draw(tmp_path, "sweep", ["c0-j1"])
    assert [text.get_text() for text in drawn["sweep.png"].axes[0].texts] == ["diverged"]


def test_a_sweep_with_test_arms_only_is_drawn(tmp_path, drawn):
    write_arm(tmp_path, "test-c0-j1")
    figures.draw(tmp_path, "sweep", ["c0-j1"])
    assert labels_in(drawn["sweep.png"].axes[3]) == ["c = 0, j = 1 (main), senior alone", "junior alone"]


def test_a_folder_without_evaluated_arms_draws_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "run_gsm8k", SimpleNamespace(SETTINGS=SETTINGS))
    figures.draw(tmp_path, "skill", SETTINGS["skill"])
    assert "nothing to draw" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit, match=r"run run_gsm8k\.py first"):
        figures.main(str(tmp_path))


def test_what_is_not_drawn_is_said(tmp_path, capsys):
    """An arm that evaluated the junior only, and a setting without a figure."""
    write_arm(tmp_path, "tandem")
    write_arm(tmp_path, "solo")
    row = {"update": 0, "eval": {"junior": {"n": 4, "accuracy": 1.0, "jargon": 0.0, "languages": {"en": 1.0}}}}
    (tmp_path / "solo" / "seed-0" / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    figures.draw(tmp_path, "mine", ["tandem", "solo"])
    printed = capsys.readouterr().out
    assert "solo is left out" in printed
    assert "mine has no figure" in printed
    assert "| tandem | 1 | 4 |" in printed


def test_the_caption_counts_the_seeds(tmp_path, drawn):
    write_arm(tmp_path, "tandem")
    figures.draw(tmp_path, "skill", ["tandem"])
    assert drawn["skill-figure2.png"].get_supxlabel().startswith("1 seed per arm. Bands: 95 %")
    for seed in (0, 1, 2):
        write_seed(tmp_path / "solo" / f"seed-{seed}", (1, 1, 1))
    figures.draw(tmp_path, "skill", ["tandem", "solo"])
    assert drawn["skill-figure2.png"].get_supxlabel().startswith("1 or 3 seeds per arm: thin lines are single seeds")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", "[1]"),
        ("metrics.jsonl", '{"update": "0"}'),
        ("metrics.jsonl", '{"update": 0.5}'),
        ("metrics.jsonl", '{"update": 0, "eval": [1]}'),
        ("metrics.jsonl", '{"update": 0, "eval": {"senior": [1]}}'),
        ("metrics.jsonl", '{"update": 0, "eval": {"senior": {"n": 4, "accuracy": 0.5, "jargon": 0.5}}}'),
        ("metrics.jsonl", '{"update": 0, "eval": {"senior": {"n": 4, "accuracy": NaN, "jargon": 0.5, "languages": {"en": 1}}}}'),
        ("metrics.jsonl", '{"update": 0, "eval": {"senior": {"n": 4, "accuracy": 0.5, "jargon": 7, "languages": {"en": 1}}}}'),
        ("metrics.jsonl", '{"update": 0, "eval": {"senior": {"n": 0, "accuracy": 0.5, "jargon": 0.5, "languages": {"en": 1}}}}'),
        ("metrics.jsonl", '{"update": 0, "eval": {"senior": {"n": 4, "accuracy": 0.5, "jargon": 0.5, "languages": {"en": "all"}}}}'),
        (
            "metrics.jsonl",
            '{"update": 0, "eval": {"senior": {"n": 4, "accuracy": 0.5, "jargon": 0.5, "languages": {"en": 1}, "tokens": [3]}}}',
        ),
        ("metrics.jsonl", '{"update": 0, "eval": {"senior": {"n": 4, "accuracy": 0.5, "jargon": 0.5, "languages": {}}}}'),
        ("metrics.jsonl", '{"update": 0, "seconds_rollout": "3"}'),
        ("samples.jsonl", "3"),
        ("samples.jsonl", '{"update": 0}'),
        ("samples.jsonl", '{"update": 0, "who": "tandem", "question": "Q", "gold": "7", "reward": 1, "spans": ["senior"]}'),
        ("samples.jsonl", '{"update": 0, "who": "tandem", "question": "Q", "gold": "7", "reward": 1, "spans": [["nobody", "7"]]}'),
        ("samples.jsonl", '{"update": 0, "who": "tandem", "question": "Q", "gold": "7", "reward": "1", "spans": [["senior", "7"]]}'),
        ("samples.jsonl", '{"update": 0, "who": "tandem", "question": 5, "gold": "7", "reward": 1, "spans": [["senior", "7"]]}'),
        (
            "samples.jsonl",
            '{"update": 0, "who": "tandem", "question": "Q", "gold": "7", "reward": 1, "spans": [], "steps": [["senior", "7"]]}',
        ),
        ("config.json", "[1]"),
        ("config.json", '{"flags": {}}'),
    ],
)
@pytest.mark.usefixtures("drawn")
def test_a_damaged_file_is_named_in_one_line(tmp_path, file, content):
    """A message instead of a number makes the exit code 1."""
    write_arm(tmp_path, "tandem")
    path = tmp_path / "tandem" / "seed-0" / file
    path.write_text(content + "\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        figures.main(str(tmp_path))
    assert re.fullmatch(f"error: {re.escape(str(path))} cannot be used .*: restore it from a copy, or remove .*", stop.value.code)


def test_a_missing_folder_is_named_in_one_line(tmp_path):
    with pytest.raises(SystemExit) as stop:
        figures.main(str(tmp_path / "nowhere"))
    assert re.fullmatch(
        f"{re.escape(str(tmp_path / 'nowhere'))} has no .*: run run_gsm8k.py first, or name its --out folder", stop.value.code
    )


def test_figures_that_cannot_be_written_are_named(tmp_path):
    write_arm(tmp_path, "tandem")
    (tmp_path / "figures").write_text("a file in their place", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        figures.main(str(tmp_path))
    assert re.fullmatch(f"error: cannot write {re.escape(str(tmp_path))}/figures/.*: make room or give rights .*", stop.value.code)
