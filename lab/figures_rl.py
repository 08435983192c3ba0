"""The figures and tables of Tandem RL (Jiao et al., 2026), for the settings `pressure` and `rlvr` of lab/figures.py.

pressure. GRPO gives the junior's tokens no weight, so only the reward can drive the jargon out. Does it? The *dose* is the arm
grpo-tandem with three bases, which have seen 2, 6 or 12 % annotated solutions: the fewer a junior has seen, the more jargon costs
the pair. Cost before training, in points of accuracy:

    cost = (senior alone + junior alone) / 2 - both together

Annotated shares other than that of the shipped base are read from RUNS/dose/<share>/grpo-tandem/seed-<k>.

rlvr. Is a senior that was trained in tandem easier to follow than one that was trained alone? measures.jsonl (lab/measures.py) has
one number per problem. A measure is the mean over seeds and problems, or, for retention, the quotient of two such means. Its
interval is the bootstrap over seeds and problems (metrics.bootstrap_interval). Two arms are compared on the same seeds, problem by
problem. If handoff is 1, 0 on the two problems of the only seed of one arm, and 0, 0 in the other, the difference is +50 points.

A seed counts at the end only if it has reached the last update; the others are named. Differences also have Student's interval over
the seeds (metrics.seed_interval). Of some thirty comparisons, one or two have an interval without 0 by chance alone.
"""

import re
from collections.abc import Iterable
from itertools import cycle
from math import isfinite, isnan, nan
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lab.curves import (
    BLUE,
    SKY,
    WIDTH,
    Rows,
    Runs,
    Style,
    add_caption,
    add_caption_and_save,
    add_legend,
    draw_arms,
    draw_junior,
    evaluated_all,
    is_row,
    labels_and_styles,
    markdown_table,
    pooled,
    read_seeds,
    save,
    updates_until,
    with_interval,
)
from lab.measures import SAMPLES
from lab.runs import Refused, read_back, unusable
from lab.tiny import ANNOTATED
from metrics import T_QUANTILES, bootstrap_interval, pass_at_k, seed_interval

# ----------------------------------------------------------------------------------------------------------------------
# Pressure

PRESSURE_ARMS = {
    "grpo-tandem": "GRPO, tandem (j = 0)",
    "grpo-shuffled": "GRPO, tandem, rewards shuffled",
    "grpo-solo": "GRPO, solo",
    "reinforce-j1": "REINFORCE, tandem, j = 1",
    "reinforce-j0": "REINFORCE, tandem, j = 0",
}
DOSE_ARM = "grpo-tandem"
DOSE_STYLES = [Style(SKY, "P"), Style(BLUE, "X"), Style("#00304D", "*")]  # from light to dark
LOW_JARGON = 5.0  # percent
DOSE_UPDATES = (0, 24, 48, 80)  # at which the table of doses states the jargon

Doses = dict[float, dict[int, Rows]]  # {annotated share: {seed: rows}}


def figure_pressure(folder: Path, runs: Runs) -> Path:
    """Jargon and accuracy against updates, and how fast jargon goes by how much it costs, if the folder has doses."""
    panels = [
        ("senior", "jargon", "solutions with jargon (%)", "senior alone"),
        ("senior", "accuracy", "accuracy (%)", "senior alone"),
        ("tandem", "accuracy", "accuracy (%)", "senior and junior together"),
    ]
    doses = read_doses(folder)
    (rows, columns), height = ((2, 2), 5.0) if doses else ((1, 3), 2.8)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained")
    for ax, (who, metric, ylabel, title) in zip(axes.flat, panels):
        draw_arms(ax, runs, labels_and_styles(runs, PRESSURE_ARMS), who, metric)
        if metric == "accuracy":
            draw_junior(ax, runs, metric)
        ax.set(xlabel="updates", ylabel=ylabel, title=title)
    add_legend(figure, axes.flat[: len(panels)], loc="outside upper center", ncols=3)
    note = ""
    if doses:
        draw_doses(axes[1, 1], doses)
        note = "Lower right: one point per seed."
    return add_caption_and_save(figure, runs, folder / "figures" / "pressure.png", note)


def read_doses(folder: str | Path) -> Doses:
    """The seeds of every annotated share in ascending order; none if the folder has no dose/.

    Of the shipped base, whose runs lie in the folder itself, only those seeds count that another share has too.
    """
    paths = [path for path in Path(folder, "dose").glob("*") if re.fullmatch(r"0\.\d+", path.name)]
    doses = {float(path.name): read_seeds(path, DOSE_ARM, "metrics.jsonl", is_row) for path in paths}
    shared = {seed for seeds in doses.values() for seed in seeds}
    shipped = read_seeds(folder, DOSE_ARM, "metrics.jsonl", is_row)
    doses.setdefault(ANNOTATED, {seed: rows for seed, rows in shipped.items() if seed in shared})
    evaluated = {share: {seed: rows for seed, rows in seeds.items() if evaluated_all(rows)} for share, seeds in doses.items()}
    return {share: seeds for share, seeds in sorted(evaluated.items()) if seeds}


def cost_of_jargon(seeds: list[Rows]) -> float:
    """What jargon costs the pair before training, in points of accuracy."""
    senior, junior, together = (pooled(seeds, who, "accuracy")[0].value for who in ("senior", "junior", "tandem"))
    return (senior + junior) / 2 - together


def last_evaluation(rows: Rows) -> int:
    """The last update at which a seed was evaluated."""
    return pooled([rows], "senior", "jargon")[-1].update


def draw_doses(ax: Axes, doses: Doses) -> None:
    """A point per seed: the cost of jargon before training, and the updates until jargon is low.

    A seed whose jargon is not low at the last update is at the top. One that has not been trained as long is not drawn.
    """
    last = max(last_evaluation(rows) for seeds in doses.values() for rows in seeds.values())
    top = 1.35 * last or 1.0
    for (share, seeds), style in zip(doses.items(), cycle(DOSE_STYLES)):
        points = []
        for rows in seeds.values():
            updates = updates_until([rows], LOW_JARGON)
            if isnan(updates) and last_evaluation(rows) == last:
                updates = top
            points.append((cost_of_jargon([rows]), updates))
        ax.plot(
            *zip(*points), color=style.colour, marker=style.marker, markersize=6, linestyle="none", alpha=0.6, label=f"{100 * share:g} %"
        )
    ticks = list(range(0, last + 1, max(1, last // 4)))
    ax.set_yticks([*ticks, top], [*map(str, ticks), f"not\nwithin {last}"])
    # Room for the legend above the points.
    ax.set(ylim=(-0.05 * top, 1.55 * top), xlabel="cost of jargon before training (points of accuracy)")
    ax.set(ylabel=f"updates until jargon < {LOW_JARGON:g} %", title="GRPO, tandem, by base")
    ax.legend(loc="upper center", ncols=len(doses), title="annotated solutions that the base has seen", title_fontsize=7)


def table_of_doses(folder: Path, runs: Runs) -> str | None:
    """A row per annotated share. Shares are in percent, with the lowest and the highest seed in brackets; None without dose/."""
    doses = read_doses(folder)
    jargon = [f"jargon at {update}" for update in DOSE_UPDATES]
    headings = ["annotated", "seeds", "updates", "cost before training", *jargon, f"under {LOW_JARGON:g} % at", "accuracy alone"]
    return markdown_table(headings, [dose_row(share, list(seeds.values())) for share, seeds in doses.items()]) if doses else None


def dose_row(share: float, seeds: list[Rows]) -> list[str]:
    """What the table of doses says of one share, in the order of its headings."""
    accuracy = pooled(seeds, "senior", "accuracy")
    # A seed whose jargon has never been low has "> " the last update at which that is known.
    until = [(updates_until([rows], LOW_JARGON), last_evaluation(rows)) for rows in seeds]
    return [
        f"{100 * share:g} %",
        str(len(seeds)),
        str(accuracy[-1].update),
        f"{cost_of_jargon(seeds):.1f}{span([cost_of_jargon([rows]) for rows in seeds])}",
        *(jargon_at(update, seeds) for update in DOSE_UPDATES),
        ", ".join(f"> {last}" if isnan(updates) else f"{updates:.0f}" for updates, last in until),
        f"{accuracy[0].value:.1f} → {with_interval(accuracy[-1])}",
    ]


def jargon_at(update: int, seeds: list[Rows]) -> str:
    """The senior's jargon at an update, such as "48.5 (2.0–98.5)"; "–" unless every seed has measured it."""
    together = {point.update: point.value for point in pooled(seeds, "senior", "jargon")}
    if update not in together:
        return "–"
    singly = [point.value for rows in seeds for point in pooled([rows], "senior", "jargon") if point.update == update]
    return f"{together[update]:.1f}{span(singly)}"


def span(values: list[float], form: str = ".1f") -> str:
    """The lowest and the highest value, such as " (7.0–98.5)"; nothing if there is one value."""
    return f" ({min(values):{form}}–{max(values):{form}})" if len(values) > 1 else ""


# ----------------------------------------------------------------------------------------------------------------------
# Tandem RL: the measures of lab/measures.py

RLVR_ARMS = {
    "rlvr-tandem": "tandem GRPO",
    "rlvr-solo": "solo GRPO",
    "rlvr-solo-kl": "solo GRPO + KL",
    "rlvr-solo-16": "solo GRPO, group of 16",
}
COMPARED = "rlvr-tandem"  # with each of the others
PANELS = {
    "solo": "solo accuracy\n(%)",
    "handoff": "handoff robustness\n(%)",
    "drift": "drift from the junior\n(nats per token)",
    "legibility": "legibility: cross-entropy\n(nats per token)",
}
MOST_SEEDS = len(T_QUANTILES) + 1  # of seed_interval
PASS_K, RIGHT = 4, f"right_of_{SAMPLES}"
CONTINUED = [f"continued_{percent}" for percent in (25, 50, 75)]
IN_NATS = ("legibility", "drift", "drift_k3")  # per token; every other measure is a share
MEASURES = ["solo", f"pass@{PASS_K}", "handoff", "word", "retention", *CONTINUED, *IN_NATS]

Measured = dict[str, dict[int, Rows]]  # {arm: {seed: the rows of its measures.jsonl}}
Ends = dict[str, dict[int, dict]]  # {arm: {seed: the last row, if the seed has finished}}


def is_measured(row: dict) -> bool:
    """Whether a row of measures.jsonl can be drawn: one number per problem for every measure, and of 8 solutions at most 8 right."""
    names = ["solo", "handoff", "word", *CONTINUED, *IN_NATS, *([RIGHT] if RIGHT in row else [])]
    try:
        problems = len(row["solo"])
        complete = problems > 0 and all(len(row[name]) == problems and all(map(isfinite, row[name])) for name in names)
        return complete and all(isinstance(count, int) and 0 <= count <= SAMPLES for count in row.get(RIGHT, []))
    except (KeyError, TypeError, OverflowError):
        return False


def read_measures(folder: str | Path, arms: Iterable[str]) -> Measured:
    """The measures of every arm that has some. Raises Refused for a file that holds something else."""
    measured = {arm: read_seeds(folder, arm, "measures.jsonl", is_measured) for arm in arms}
    return {arm: seeds for arm, seeds in measured.items() if seeds}


def ends_of(folder: str | Path, measured: Measured) -> Ends:
    """The last row of every seed that has reached the last update of its config.json.

    Raises Refused unless all of them were measured at the same update on equally many of the same problems.
    """
    ends: Ends = {arm: {} for arm in measured}
    conditions: dict[str, Path] = {}  # {how a seed was measured: the first one that was measured like that}
    for arm, seeds in measured.items():
        for seed, rows in seeds.items():
            path, last = Path(folder, arm, f"seed-{seed}"), rows[-1]
            flags = read_back(path / "config.json", flags=dict)["flags"]
            if not isinstance(flags.get("updates"), int) or not {"problems", "validation"} <= set(flags):
                raise unusable(path / "config.json", "it lacks the values of --updates, --problems or --validation")
            if last["update"] >= flags["updates"]:
                if RIGHT not in last:
                    raise unusable(path / "measures.jsonl", f"its last row lacks {RIGHT}")
                ends[arm][seed] = last
                # A seed always draws the same problems, if it draws as many from the same ones.
                drawn_from = f"{flags['problems']}{' (validation)' if flags['validation'] else ''}"
                conditions.setdefault(f"update {last['update']}, {len(last['solo'])} problems of {drawn_from}", path)
    if len(conditions) > 1:
        listed = "; ".join(f"{path}: {condition}" for condition, path in conditions.items())
        raise Refused(f"runs that were not measured alike cannot be compared ({listed}): move some of them to another folder")
    return ends


def unfinished(measured: Measured, ends: Ends) -> str:
    """A sentence that names the seeds that have not finished; empty if all have."""
    names = [f"{arm} seed {seed}" for arm, seeds in measured.items() for seed in seeds if seed not in ends[arm]]
    return f"Left out at the end, because not finished: {', '.join(names)}." if names else ""


def values_of(row: dict, name: str) -> np.ndarray:
    """What a measure is made of: (N, K), for N problems the K numbers whose means it needs."""
    if name == "retention":
        columns = [row["handoff"], row["solo"]]
    elif name == f"pass@{PASS_K}":
        columns = [[pass_at_k(right, SAMPLES, PASS_K) for right in row[RIGHT]]]
    else:
        columns = [row[name]]
    return np.array(columns, dtype=float).T


def measure_of(means: np.ndarray, name: str) -> float:
    """A measure from its K means: shares in percent, the others in nats per token. Without a right solution, retention is nan."""
    value = means[0] / (means[1] or nan) if name == "retention" else means[0]
    return float(value if name in IN_NATS else 100 * value)


class Estimate(NamedTuple):
    """A measure of an arm, or the difference of two arms, with its bootstrap interval and its value in every seed."""

    value: float
    low: float
    high: float
    by_seed: list[float]


def estimate(rows: list[dict], name: str, minus: list[dict] | None = None) -> Estimate:
    """A measure over the rows of S seeds. `minus`: the rows of the same seeds of another arm, whose measure is subtracted."""
    arms = [rows] if minus is None else [rows, minus]
    # The numbers of both arms on a problem stay side by side: (S, N, K) or (S, N, 2K).
    values = np.concatenate([np.stack([values_of(row, name) for row in arm]) for arm in arms], axis=2)

    def statistic(means: np.ndarray) -> float:
        measures = [measure_of(part, name) for part in np.split(means, len(arms))]
        return measures[0] if minus is None else measures[0] - measures[1]

    low, high = bootstrap_interval(values, statistic)
    return Estimate(statistic(values.mean((0, 1))), low, high, [statistic(seed.mean(0)) for seed in values])


# ----------------------------------------------------------------------------------------------------------------------
# The figure and the tables of these measures


def figure_rlvr(folder: Path, runs: Runs) -> Path | None:
    """Four measures at the last update (upper row) and against updates (lower row). None if no seed has measures."""
    measured = read_measures(folder, runs)
    if not measured:
        return None
    ends, labels = ends_of(folder, measured), labels_and_styles(measured, RLVR_ARMS)
    last = max((row["update"] for rows in ends.values() for row in rows.values()), default=None)
    figure, axes = plt.subplots(2, len(PANELS), figsize=(WIDTH, 4.2), layout="constrained")
    for (upper, lower), (name, title) in zip(axes.T, PANELS.items()):
        for x, (arm, seeds) in enumerate(measured.items()):
            label, style = labels[arm]
            if ends[arm]:
                draw_end(upper, x, list(ends[arm].values()), name, style)
            draw_course(lower, list(seeds.values()), name, style, label)
        upper.set_title(title, fontsize=7)
        upper.set(xlim=(-0.7, len(measured) - 0.3), xticks=[], xlabel="no run has finished" if last is None else f"update {last}")
        lower.set_xlabel("updates")
    add_legend(figure, axes[1], loc="outside upper center", ncols=4)
    counts = " or ".join(map(str, sorted({len(seeds) for seeds in measured.values()})))
    caption = f"Seeds per arm: {counts}. Small points and thin lines are single seeds, markers and thick lines means over all seeds."
    add_caption(figure, f"{caption} Bars: 95 % bootstrap intervals over seeds and problems. {unfinished(measured, ends)}")
    return save(figure, folder / "figures" / "rlvr.png")


def draw_end(ax: Axes, x: float, rows: list[dict], name: str, style: Style) -> None:
    """A measure at the last update: a bar for its interval, and beside it a point per seed."""
    value, low, high, by_seed = estimate(rows, name)
    ax.vlines(x, low, high, color=style.colour, linewidth=1.5)
    ax.plot([x], [value], color=style.colour, marker=style.marker, markersize=4.5, linestyle="none")
    ax.plot([x - 0.3] * len(by_seed), by_seed, color=style.colour, marker=".", markersize=4, linestyle="none", alpha=0.5)


def draw_course(ax: Axes, seeds: list[Rows], name: str, style: Style, label: str) -> None:
    """A measure against updates: a thin line per seed, and a thick line for the mean where every seed has been measured."""
    courses = [{row["update"]: measure_of(values_of(row, name).mean(0), name) for row in rows} for rows in seeds]
    if len(courses) > 1:
        for course in courses:
            ax.plot(list(course), list(course.values()), color=style.colour, alpha=0.4, linewidth=0.5)
    updates = sorted(set.intersection(*map(set, courses)))
    means = [sum(course[update] for course in courses) / len(courses) for update in updates]
    ax.plot(updates, means, color=style.colour, marker=style.marker, linestyle=style.line, markersize=2.5, linewidth=1.2, label=label)


def form_of(name: str) -> str:
    """The format of a measure: four decimals in nats, one in percent."""
    return ".4f" if name in IN_NATS else ".1f"


def table_of_measures(folder: Path, runs: Runs) -> str | None:
    """A row per arm at the last update: mean [95 % interval] (lowest–highest seed). None if no seed has measures."""
    measured = read_measures(folder, runs)
    if not measured:
        return None
    ends = ends_of(folder, measured)
    rows = []
    for arm, seeds in ends.items():
        cells = [measure_cell(list(seeds.values()), name) if seeds else "–" for name in MEASURES]
        rows.append([arm, str(len(seeds)), *cells])
    return "\n\n".join(filter(None, [markdown_table(["arm", "seeds", *MEASURES], rows), unfinished(measured, ends)]))


def measure_cell(rows: list[dict], name: str) -> str:
    found, form = estimate(rows, name), form_of(name)
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]{span(found.by_seed, form)}"


def table_of_differences(folder: Path, runs: Runs) -> str | None:
    """A row per comparison with tandem GRPO, over the seeds that both arms have finished: difference [bootstrap] [Student's t].

    Bold: both intervals are without 0. None if there is nothing to compare.
    """
    ends = ends_of(folder, read_measures(folder, runs))
    others = [arm for arm in ends if arm != COMPARED]
    if COMPARED not in ends or not others:
        return None
    rows = []
    for arm in others:
        seeds = [seed for seed in ends[COMPARED] if seed in ends[arm]]
        pair = [[ends[name][seed] for seed in seeds] for name in (COMPARED, arm)]
        cells = [difference_cell(*pair, name) if seeds else "–" for name in MEASURES]
        rows.append([f"{COMPARED} − {arm}", str(len(seeds)), *cells])
    return markdown_table(["difference", "seeds", *MEASURES], rows)


def difference_cell(rows: list[dict], others: list[dict], name: str) -> str:
    found, form = estimate(rows, name, minus=others), "+" + form_of(name)
    intervals = [(found.low, found.high)]
    if 2 <= len(rows) <= MOST_SEEDS:
        intervals.append(seed_interval(found.by_seed))
    cell = f"{found.value:{form}} " + " ".join(f"[{low:{form}}, {high:{form}}]" for low, high in intervals)
    return f"**{cell}**" if all(low > 0 or high < 0 for low, high in intervals) else cell
