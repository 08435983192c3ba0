"""What the figures compute, by hand; that they are drawn is seen in test_runner.py."""

import json

import pytest

import figures


def write(folder, *evaluations, stopped=False):
    """Rows 0, 4, 8, ... with the given (senior's accuracy, jargon, joint accuracy) of 4 solutions each."""
    folder.mkdir(parents=True)
    rows = []
    for i, (accuracy, jargon, together) in enumerate(evaluations):
        cell = {"n": 4, "accuracy": accuracy, "jargon": jargon, "languages": {"en": 0.25, "de": 0.75}}
        rows.append({"update": 4 * i, "eval": {"senior": cell, "tandem": cell | {"accuracy": together}, "junior": cell}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if stopped:
        (folder / "stopped.txt").write_text("why")


def test_pooling(tmp_path):
    """Two seeds, 3 of 4 and 1 of 4: pooled 4 of 8, with the Wilson interval of 8. A language nobody wrote is 0 of 8."""
    write(tmp_path / "tandem" / "seed-0", (0.75, 1.0, 0.0))
    write(tmp_path / "tandem" / "seed-1", (0.25, 1.0, 0.0))
    seeds = figures.read_runs(tmp_path)["tandem"]
    ((update, share, low, high),) = figures.pooled(seeds, "senior", "accuracy")
    assert (update, share) == (0, 0.5)
    assert (low, high) == pytest.approx((0.2152, 0.7848), abs=1e-4)
    assert figures.pooled(seeds, "senior", "de")[0][1] == 0.75
    assert figures.pooled(seeds, "senior", "fr")[0][:3] == (0, 0.0, 0.0)


def test_only_evaluations_of_every_seed_are_pooled(tmp_path):
    write(tmp_path / "tandem" / "seed-0", (1, 1, 1), (1, 1, 1))
    write(tmp_path / "tandem" / "seed-1", (1, 1, 1))
    assert [point[0] for point in figures.pooled(figures.read_runs(tmp_path)["tandem"], "senior", "accuracy")] == [0]


def test_the_best_cell_of_the_sweep(tmp_path):
    """Joint accuracy at the end decides, over both seeds; a stopped or unfinished one is out; of equals, c nearest to 0."""
    for seed, (low, high) in enumerate([(0.25, 0.75), (0.5, 0.5)]):  # pooled 3 of 8 and 5 of 8
        write(tmp_path / "c0-j1" / f"seed-{seed}", (1, 1, 1), (1, 1, low))
        write(tmp_path / "c-0.5-j0.2" / f"seed-{seed}", (0, 1, 0), (0, 1, high))
        write(tmp_path / "c-0.1-j0.2" / f"seed-{seed}", (0, 1, 0), (0, 1, high))
        write(tmp_path / "c-0.3-j0" / f"seed-{seed}", (0, 1, 1), (0, 1, 1), stopped=True)
        write(tmp_path / "c-0.3-j1" / f"seed-{seed}", (0, 1, 1))  # not at its end
        write(tmp_path / "test-c0-j0" / f"seed-{seed}", (1, 1, 1), (1, 1, 1))
    assert figures.best_cell(tmp_path) == (-0.1, 0.2)
    runs = figures.read_runs(tmp_path)
    assert figures.cells_of(runs, "test-") == {(0.0, 0.0): "test-c0-j0"}
    assert figures.figure_sweep(tmp_path, runs).is_file()
    assert figures.best_cell(tmp_path / "c0-j1") is None


def test_updates_until(tmp_path):
    """Jargon 1, 0.5, 0: under 0.6 at update 4, under 0.05 at 8, under 0 never."""
    write(tmp_path / "tandem" / "seed-0", (1, 1, 1), (1, 0.5, 1), (1, 0, 1))
    seeds = figures.read_runs(tmp_path)["tandem"]
    assert [figures.updates_until(seeds, level) for level in (0.6, 0.05)] == [4, 8]
    assert figures.updates_until(seeds, 0.0) != figures.updates_until(seeds, 0.0)  # nan


def test_equal_runs_share_a_label(tmp_path):
    """Two schedules that are one where each word is a token."""
    write(tmp_path / "token" / "seed-0", (1, 1, 1))
    write(tmp_path / "word" / "seed-0", (1, 1, 1))
    write(tmp_path / "redraw" / "seed-0", (1, 0.5, 1))
    runs = figures.read_runs(tmp_path)
    assert figures.merge_equal(runs, {arm: arm for arm in ("token", "word", "redraw")}) == {"token = word": "word", "redraw": "redraw"}


def test_a_wrapped_rollout_keeps_its_authors():
    """Eight columns: "She sells" breaks before " sells", whose space is dropped; "5:" is shared by both authors."""
    lines = figures.lines_of([("senior", "She sel"), ("junior", "ls 5"), ("senior", ":\n6")], columns=8)
    assert lines == [[(0, "senior", "She")], [(0, "senior", "sel"), (3, "junior", "ls 5"), (7, "senior", ":")], [(0, "senior", "6")]]


def test_figure_1(tmp_path):
    """Three evaluations are needed; dollars are no formula; of two seeds, the rollout with jargon is taken."""
    for seed, text in enumerate(("$3 and $4: 3+4=7. _", "She has 3+4=<<3+4=")):
        folder = tmp_path / "tandem" / f"seed-{seed}"
        folder.mkdir(parents=True)
        sample = {"who": "tandem", "question": f"Why pay $3 or $4, {seed}?", "gold": "7", "stretches": [["senior", text], ["junior", "7"]]}
        samples = [sample | {"update": update, "reward": float(update > 0)} for update in (0, 4, 8)]
        for n, drawn in ((2, bool(seed)), (3, True)):
            (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples[:n]))
            assert (figures.figure_1(tmp_path) is not None) == drawn
    assert (tmp_path / "figure1.png").is_file()
