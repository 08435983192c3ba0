"""The parts that figures and tables are made of: from the files of a run to the points of a curve, and from points to a drawing.

A share, such as accuracy, is pooled over the seeds of an arm. If seed k evaluated n_k solutions and the share s_k of them is right,

    share = sum_k n_k s_k / sum_k n_k,   with Wilson's 95 % interval for sum_k n_k solutions (metrics.wilson_interval)

so that 3 of 4 and 1 of 4 make 4 of 8, or 50 % [21.5, 78.5]. The interval is the sampling error of the evaluation; each seed draws
its own held-out problems. It does not say how far training differs from seed to seed: that is what the thin lines show, one per
seed. (The pretrained base is the same for all seeds.) Any other number, such as the mean length, is averaged over the seeds.

The figures themselves are in lab/figures.py and lab/figures_rl.py. This file neither loads a model nor computes a metric.
"""

import textwrap
from collections.abc import Callable, Iterable
from itertools import cycle
from math import isfinite, nan
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws to files, without a screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab.runs import read_back, read_rows, seed_folders, unusable, writing
from metrics import wilson_interval
from rollout import Step

Rows = list[dict]  # the rows of one metrics.jsonl
Runs = dict[str, list[Rows]]  # {arm: [the rows of each seed]}


class Style(NamedTuple):
    colour: str
    marker: str
    line: str = "-"


plt.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 7})
WIDTH = 7.0  # inches: the text width of a paper with two columns
# The colours of Okabe and Ito (2008), which the colour-blind can tell apart, each with its own marker.
BLUE, RED, GREEN, ORANGE, PINK, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
COLOURS_AND_MARKERS = [(BLUE, "o"), (RED, "s"), (GREEN, "^"), (ORANGE, "D"), (PINK, "v"), (SKY, "P")]
STYLES = [Style(colour, marker, line) for line in ("-", "--", ":") for colour, marker in COLOURS_AND_MARKERS]
JUNIOR_GREY = "#555555"

# ----------------------------------------------------------------------------------------------------------------------
# From files to points of a curve


def read_runs(folder: str | Path, arms: Iterable[str]) -> Runs:
    """The rows of every seed of those `arms` in which senior, tandem and junior were evaluated before training.

    Raises Refused for a file that holds something else than rows and evaluations.
    """
    runs: Runs = {}
    for arm in arms:
        seeds = list(read_seeds(folder, arm, "metrics.jsonl", is_row).values())
        if seeds and all(evaluated_all(rows) for rows in seeds):
            runs[arm] = seeds
    return runs


def read_seeds(folder: str | Path, arm: str, file: str, check: Callable[[dict], bool]) -> dict[int, Rows]:
    """{k: the rows of RUNS/<arm>/seed-<k>/<file>}, in the order of k. Raises Refused unless every row passes the check."""
    paths = [path / file for path in seed_folders(folder, arm)]
    seeds = {int(path.parent.name.removeprefix("seed-")): read_checked(path, check) for path in paths if path.is_file()}
    # A run that has just begun has an empty file.
    return {seed: rows for seed, rows in seeds.items() if rows}


def evaluated_all(rows: Rows) -> bool:
    """Whether senior, tandem and junior were evaluated before training."""
    return {"senior", "tandem", "junior"} <= set(rows[0].get("eval", {}))


def read_checked(path: Path, check: Callable[[dict], bool]) -> Rows:
    """The rows of a file. Raises Refused unless each of them passes the check, so that nothing fails in the midst of a figure."""
    rows = read_rows(path)
    for row in rows:
        if not check(row):
            raise unusable(path, f"what it says of update {row['update']} is not what a run writes")
    return rows


def is_row(row: dict) -> bool:
    """Whether a row of metrics.jsonl can be drawn: its evaluations and its seconds."""
    evaluations, seconds = row.get("eval", {}), [value for key, value in row.items() if key.startswith("seconds")]
    if not isinstance(evaluations, dict) or not all(isinstance(value, (int, float)) for value in seconds):
        return False
    return all(map(is_evaluation, evaluations.values()))


def is_evaluation(evaluation) -> bool:
    """Whether this is an evaluation: a number of solutions, shares of them, and means. A metric that somebody added may be anything."""
    try:
        shares = [evaluation["accuracy"], evaluation["jargon"], *evaluation["languages"].values()]
        means = [evaluation[name] for name in ("tokens", "handoffs", "handoffs_inside") if name in evaluation]
        return evaluation["n"] > 0 and len(shares) > 2 and all(0 <= share <= 1 for share in shares) and all(map(isfinite, means))
    except (KeyError, TypeError, AttributeError, OverflowError):
        return False


def is_sample(row: dict) -> bool:
    """Whether a row of samples.jsonl can be drawn: who wrote which text, how it was rewarded, and the steps, if there are any."""
    try:
        steps = [Step(*step) for step in row.get("steps", [])]
        texts = [row["who"], row["question"], row["gold"], *(text for _, text in row["spans"])]
        texts += [text for step in steps for text in (step.text, step.senior, step.junior)]
        authors = {author for author, _ in row["spans"]} | {step.author for step in steps}
        numbers = [row["reward"], *(step.probability for step in steps)]
        return authors <= {"senior", "junior"} and all(map(isfinite, numbers)) and all(isinstance(text, str) for text in texts)
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def read_flags(folder: str | Path, arm: str) -> dict:
    """The flags of an arm, from the config.json of its first seed (seeds differ in their seed only)."""
    kinds = {"handoff": str, "p": (int, float), "solo": bool, "senior_language": str, "junior_language": str}
    for path in (folder / "config.json" for folder in seed_folders(folder, arm)):
        flags = read_back(path, flags=dict)["flags"]
        wrong = [f"--{name}" for name, kind in kinds.items() if not isinstance(flags.get(name), kind)]
        if wrong:
            raise unusable(path, f"it lacks the values of {', '.join(wrong)}")
        return flags
    raise FileNotFoundError(f"{Path(folder, arm)} has no seed-<k>/config.json")


class Point(NamedTuple):
    """A point of a curve. Shares are in percent; what is not a share has no interval."""

    update: int
    value: float
    low: float | None = None
    high: float | None = None


def is_share(metric: str) -> bool:
    """Whether a metric is a share of n solutions, with a Wilson interval. Anything else is averaged and has no interval."""
    return metric in ("accuracy", "jargon") or metric.startswith("languages.")


def pooled(seeds: list[Rows], who: str, metric: str) -> list[Point]:
    """A metric of `who` ("senior", "tandem", "junior") at every update at which each seed measured it.

    `metric` is "accuracy", "jargon", "languages.de" (the share of solutions in German), or the name of any other number in the
    evaluation, such as "tokens".
    """
    # Open in paper: seeds and intervals. Here: shares pooled over the seeds, with Wilson's interval.
    measured = [evaluations_with(rows, who, metric) for rows in seeds]
    points = []
    for update in sorted(set.intersection(*map(set, measured))):
        evaluations = [by_update[update] for by_update in measured]
        numbers = [number_in(evaluation, metric) for evaluation in evaluations]
        if is_share(metric):
            # share = sum_k n_k s_k / sum_k n_k
            n = sum(evaluation["n"] for evaluation in evaluations)
            hits = round(sum(evaluation["n"] * share for evaluation, share in zip(evaluations, numbers)))
            low, high = wilson_interval(hits, n)
            points.append(Point(update, 100 * hits / n, 100 * low, 100 * high))
        else:
            points.append(Point(update, sum(numbers) / len(numbers)))
    return points


def evaluations_with(rows: Rows, who: str, metric: str) -> dict[int, dict]:
    """{update: evaluation of `who`} for one seed, wherever the evaluation holds the metric."""
    evaluations = {row["update"]: row["eval"][who] for row in rows if who in row.get("eval", {})}
    return {update: evaluation for update, evaluation in evaluations.items() if number_in(evaluation, metric) is not None}


def number_in(evaluation: dict, metric: str) -> float | None:
    """A number of an evaluation; None if it is not there. A language in which no solution was written has the share 0."""
    if metric.startswith("languages."):
        return evaluation["languages"].get(metric.removeprefix("languages."), 0.0)
    return evaluation.get(metric)


def updates_until(seeds: list[Rows], level: float) -> float:
    """The first evaluated update at which the senior's jargon is under `level` percent; nan if there is none."""
    return next((float(point.update) for point in pooled(seeds, "senior", "jargon") if point.value < level), nan)


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a figure


def draw_curve(ax: Axes, seeds: list[Rows], who: str, metric: str, style: Style, label: str) -> None:
    """A metric against updates: a thin line per seed, and a thick line over all seeds, with its band if it is a share."""
    points = pooled(seeds, who, metric)
    if not points:
        raise ValueError(f"{label}: there is no update at which every seed has measured {metric!r} of {who!r}")
    if len(seeds) > 1:
        for rows in seeds:
            of_one_seed = pooled([rows], who, metric)
            updates, values = [point.update for point in of_one_seed], [point.value for point in of_one_seed]
            ax.plot(updates, values, color=style.colour, alpha=0.4, linewidth=0.5)
    updates, values = [point.update for point in points], [point.value for point in points]
    ax.plot(updates, values, color=style.colour, marker=style.marker, linestyle=style.line, markersize=2.5, linewidth=1.2, label=label)
    if is_share(metric):
        low, high = [point.low for point in points], [point.high for point in points]
        ax.fill_between(updates, low, high, color=style.colour, alpha=0.2, linewidth=0)
        ax.set_ylim(-3, 103)


def draw_arms(ax: Axes, runs: Runs, labels: dict[str, tuple[str, Style]], who: str, metric: str) -> None:
    """A curve for each arm, with its label and style."""
    for arm, seeds in runs.items():
        label, style = labels[arm]
        draw_curve(ax, seeds, who, metric, style, label)


def draw_junior(ax: Axes, runs: Runs, metric: str) -> None:
    """A horizontal line for the junior alone, which is not trained: from the arm with the most seeds, if it measured the metric."""
    points = pooled(max(runs.values(), key=len), "junior", metric)
    if points:
        ax.axhline(points[0].value, color=JUNIOR_GREY, linestyle="--", linewidth=1, label="junior alone")
        if is_share(metric):
            ax.axhspan(points[0].low, points[0].high, color=JUNIOR_GREY, alpha=0.1, linewidth=0)


def labels_and_styles(arms: Iterable[str], known: dict[str, str]) -> dict[str, tuple[str, Style]]:
    """{arm: (label, style)}. A known arm has the same style in every figure; any other one follows under its own name."""
    unknown = [arm for arm in dict.fromkeys(arms) if arm not in known]
    return {arm: (known.get(arm, arm), style) for arm, style in zip([*known, *unknown], cycle(STYLES))}


def add_legend(place: Axes | Figure, panels: Iterable[Axes], **options) -> None:
    """In `place`, a legend of all labels of the panels, each once."""
    entries: dict = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    place.legend(entries.values(), entries.keys(), **options)


def add_caption_and_save(figure: Figure, runs: Runs, path: Path, note: str = "") -> Path:
    """Say below the figure how many seeds there are and what the bands are, and save it."""
    counts = sorted({len(seeds) for seeds in runs.values()})
    if counts == [1]:
        caption = "1 seed per arm."
    else:
        caption = f"{' or '.join(map(str, counts))} seeds per arm: thin lines are single seeds, thick lines all seeds pooled."
    caption += f" Bands: 95 % Wilson intervals of the evaluation. {note}"
    add_caption(figure, caption)
    return save(figure, path)


def add_caption(figure: Figure, caption: str) -> None:
    figure.supxlabel("\n".join(textwrap.wrap(caption, 135)), fontsize=7, color="#333333")


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG, and beside it as PDF. Without a creation date, the same rows give the same PDF."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    plt.close(figure)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a table


def markdown_table(headings: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown, with one string per cell."""
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([lines[0], "|---" * len(headings) + "|", *lines[1:]])


def with_interval(point: Point) -> str:
    return f"{point.value:.1f} [{point.low:.1f}, {point.high:.1f}]"
