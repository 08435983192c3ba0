"""Every figure, drawn from the rows that runs have written:  python -m lab.figures RUNS

RUNS is the folder that run_gsm8k.py writes: RUNS/<arm>/seed-<k>/metrics.jsonl has one row per
update, samples.jsonl some rollouts, and measures.jsonl (with --measures) one number per problem. A
setting is a list of arms that are compared (lab/experiments.py). Its tables (lab/tables.py) are
printed, and its figures are written to RUNS/figures/, each as PNG and as PDF:

    skill              skill-figure1 (three rollouts of one problem), skill-figure2
    language           language-figure2, language-figure3 (the language of the solutions)
    granularity        does it matter how often the text changes hands?
    control            is it the reward that changes the senior, or imitation?
    sweep              the weights c (of wrong rollouts) and j (of the junior's tokens)
    pressure           GRPO gives the junior's tokens no weight: can the reward alone drive out the
                       jargon?
    pressure-language  the same where senior and junior speak different languages
    rlvr               the measures of Tandem RL (Jiao et al., 2026): differences between arms
    all of them        rollouts.html: a page on which to see who wrote what (lab/viewer.py)

There are four kinds of figures: curves (draw_grid), rollouts by author (figure_1), a heat map and a
forest plot of differences. To add a figure, write a function of (folder, runs) that returns it, and
name it in FIGURES.
"""

import os
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from math import isnan, nan
from pathlib import Path

import numpy as np
import pandas as pd

os.environ["MPLBACKEND"] = "Agg"  # draws to files, without a screen
import matplotlib.pyplot as plt

from lab import experiments, tables, viewer
from lab.runs import errors_in_one_line, writing
from lab.tables import arms_in, by_seed, pooled, read_flags, read_runs

WIDTH, SIZE = 7.0, 8  # inches: the text width of a paper with two columns; points: of every text
plt.rcParams |= {"font.size": SIZE, "axes.titlesize": SIZE, "legend.fontsize": SIZE}
plt.rcParams |= {"axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False}
plt.rcParams |= {"text.hinting": "none"}  # which would change the widths of the characters
# The colours of Okabe and Ito (2008), which the colour-blind can tell apart.
BLUE, RED, GREEN, ORANGE, PINK, SKY = "#0072B2 #D55E00 #009E73 #E69F00 #CC79A7 #56B4E9".split()
GREY = "#555555"  # of the junior alone, and of arms that are not below

# Label, colour and marker of an arm in every figure; the arms of a pair of languages look like
# those without it. Two arms have the same colour only if they are variants that never meet.
Look = tuple[str, str, str]
ARMS: dict[str, Look] = {
    "tandem": ("tandem training", BLUE, "o"),
    "solo": ("standard RL", RED, "s"),
    "imitation": ("imitation only", GREEN, "^"),
    "shuffled": ("shuffled rewards", ORANGE, "D"),
    "senior-only": ("tandem, j = 0", PINK, "v"),
    "reinforce-j1": ("REINFORCE, j = 1", BLUE, "o"),
    "reinforce-j0": ("REINFORCE, j = 0", PINK, "v"),
    "grpo-tandem": ("GRPO, tandem", SKY, "P"),
    "grpo-solo": ("GRPO, solo", RED, "s"),
    "grpo-shuffled": ("GRPO, shuffled", ORANGE, "D"),
    "rlvr-solo": ("solo GRPO", RED, "s"),
    "rlvr-solo-kl": ("solo GRPO with KL", PINK, "v"),
    "rlvr-solo-16": ("solo GRPO, groups of 16", ORANGE, "D"),
}
LANGUAGES = {"en": "English", "de": "German", "fr": "French"}


def look_of(arm: str) -> Look:
    return ARMS.get(arm, (arm, GREY, "o"))


def caption(figure: plt.Figure, folder: Path, runs: pd.DataFrame, text: str) -> plt.Figure:
    """Write below the figure: the models, the problems, n, the seeds, and the text."""
    flags = read_flags(folder, runs.arm.iloc[0], senior=str, junior=str, problems=str)
    senior, junior, problems = (Path(flags[key]).name for key in ("senior", "junior", "problems"))
    seeds = " or ".join(map(str, sorted(set(runs.groupby("arm").seed.nunique()))))
    about = f"Senior: {senior}. Junior: {junior}. Problems: {problems}, {runs.n.max()} solutions "
    about += f"per point and seed. Seeds per arm: {seeds}. {text}"
    figure.supxlabel(textwrap.fill(about, 116), fontsize=SIZE, color=GREY, x=0.01, ha="left")
    return figure


# ------------------------------------------------------------------------------------------------
# Curves

Curve = tuple[pd.DataFrame, str, str, Look]  # the runs of an arm, who, metric, and its look
Panels = dict[tuple[str, str], list[Curve]]  # {(label of the row, title of the column): curves}
GAP = 10  # percent: the height of a label in a panel
FAR = 3  # seeds disagree if they differ by more than this many intervals at some update
BANDS = "Band: 95\u00a0% Wilson interval of all seeds pooled. Where seeds are further apart than "
BANDS += f"{FAR} times the width of this interval, each seed has a thin line, and there is no band."


def draw_curves(ax: plt.Axes, curves: list[Curve]) -> dict[str, tuple[float, str]]:
    """Shares in percent against updates; beside accuracy that of the junior, which is not trained.

    Returns {label of a curve: (where it ends, its colour)}.
    """
    ends = {}
    for runs, who, metric, (label, colour, marker) in curves:
        points, seeds = pooled(runs, who, metric), by_seed(runs, who, metric)
        apart = seeds.max(axis=1) - seeds.min(axis=1)
        if (apart > FAR * (points.high - points.low)).any():
            lines, width = seeds.interpolate("index", limit_area="inside"), 0.7
        else:
            lines, width = points[["value"]], 1.4
            ax.fill_between(points.index, points.low, points.high, color=colour, alpha=0.2)
        ax.plot(lines, color=colour, marker=marker, linewidth=width, markersize=2 * width)
        ends[label] = lines.ffill().iloc[-1].median(), colour
    if curves and metric == "accuracy":
        share, low, high = pooled(curves[0][0], "junior", "accuracy").loc[0]
        ax.axhline(share, color=GREY, linestyle="--", linewidth=1)
        ax.axhspan(low, high, color=GREY, alpha=0.1)
        ends["junior alone"] = share, GREY
    ax.set(ylim=(-3, 103), yticks=range(0, 101, 25))
    return ends


def move_apart(heights: list[float], gap: float, top: float) -> np.ndarray:
    """Sorted heights, moved to be at least `gap` apart, between 0 and `top`.

    >>> move_apart([0, 2, 50, 74, 76], gap=10, top=100).tolist()
    [0.0, 10.0, 50.0, 70.0, 80.0]
    """
    steps = gap * np.arange(len(heights))
    free = np.array(heights) - steps
    upward, downward = np.maximum.accumulate(free), np.minimum.accumulate(free[::-1])[::-1]
    return np.clip((upward + downward) / 2 + steps, steps, top - steps[::-1])


def label_ends(ax: plt.Axes, ends: dict[str, tuple[float, str]]) -> None:
    """Labels right of the axes, as high as the ends of their curves, or nearly so."""
    labels = sorted(ends, key=lambda label: ends[label])
    heights = move_apart([ends[label][0] for label in labels], GAP, top=100)
    options = dict(xycoords=ax.get_yaxis_transform(), textcoords="offset points", va="center")
    for label, height in zip(labels, heights):
        ax.annotate(label, (1, height), (6, 0), color=ends[label][1], **options)


def draw_grid(panels: Panels) -> plt.Figure:
    """Rows of panels; a curve is labelled in the last panel of its row."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*panels))
    options = dict(sharex="col", sharey=True, squeeze=False, layout="constrained")
    size = WIDTH, 0.9 + 1.5 * len(rows)
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, **options)
    for places, row in zip(axes, rows):
        labelled: set[str] = set()
        for ax, column in zip(places[::-1], columns[::-1]):
            ends = draw_curves(ax, panels.get((row, column), []))
            label_ends(ax, {label: ends[label] for label in ends.keys() - labelled})
            labelled |= ends.keys()
        places[0].set_ylabel(row)
    for top, bottom, column in zip(axes[0], axes[-1], columns):
        top.set_title(column)
        bottom.set_xlabel("updates")
        bottom.locator_params(axis="x", integer=True)
    return figure


def draw_arms(
    folder: Path, runs: pd.DataFrame, metrics: dict, pairs: bool = False, also: Iterable[str] = ()
) -> plt.Figure:
    """Curves of all arms, and of those in `also`: a column per metric, {title: (who, metric)}.

    pairs: a row per metric instead, and a column per pair of languages.
    """
    runs, panels = read_runs(folder, [*runs.arm.unique(), *also]), defaultdict(list)
    for arm, of_arm in runs.groupby("arm", sort=False):
        flags = read_flags(folder, arm)
        senior, junior = flags["senior_language"], flags["junior_language"]
        look = look_of(arm.removeprefix(f"{senior}-{junior}-"))
        pair = f"{LANGUAGES.get(senior, senior)} → {LANGUAGES.get(junior, junior)}"
        for title, (who, metric) in metrics.items():
            place = (title, pair) if pairs else ("solutions (%)", title)
            panels[place].append((of_arm, who, metric.format(junior=junior), look))
    note = "Titles: language of the senior → of the junior; solutions of the senior alone. "
    return caption(draw_grid(panels), folder, runs, note * pairs + BANDS)


SKILL = {"with jargon, senior alone": ("senior", "jargon")}
SKILL |= {"right, both together": ("tandem", "accuracy")}
SKILL |= {"right, senior alone": ("senior", "accuracy")}
PAIRS = {"with jargon (%)": ("senior", "jargon"), "right (%)": ("senior", "accuracy")}
PAIRS |= {"in the junior's\nlanguage (%)": ("senior", "languages.{junior}")}
SPOKEN = {f"in {name} (%)": ("senior", f"languages.{code}") for code, name in LANGUAGES.items()}
by_arm = partial(draw_arms, metrics=SKILL)
by_pair = partial(draw_arms, metrics=PAIRS, pairs=True)
by_language = partial(draw_arms, metrics=SPOKEN, pairs=True)

# ------------------------------------------------------------------------------------------------
# Figure 1: the rollouts of one problem by author

COLUMNS, LINE = 31, 0.16  # characters in each of the three columns; inches: the height of a line
AUTHORS = {"senior": (0.80, 0.89, 0.97), "junior": (1.0, 0.84, 0.60)}  # red, green, blue


def wrap_spans(spans: Iterable[tuple[str, str]], columns: int) -> list[tuple[str, list[str]]]:
    """Wrap (author, text) spans into lines: [(the text, the author of each character), ...].

    >>> wrap_spans([("senior", "I s"), ("junior", "ell")], columns=4)
    [('I', ['senior']), ('sell', ['senior', 'junior', 'junior', 'junior'])]
    """
    authors = [author for author, text in spans for _ in text]
    text, end, lines = "".join(text for _, text in spans), 0, []
    options = dict(expand_tabs=False, replace_whitespace=False, break_on_hyphens=False)
    for part in text.split("\n"):
        for line in textwrap.wrap(part.strip(), columns, **options):
            start = text.index(line, end)
            end = start + len(line)
            lines.append((line, authors[start:end]))
    return lines


def figure_1(folder: Path, runs: pd.DataFrame) -> plt.Figure | None:
    """One problem and three joint rollouts by author: before, during and after training.

    The second one is the first whose verdict or jargon differs from those before training. None if
    no problem of the arm "tandem" was kept at three evaluations.
    """
    chosen = tables.choose_example(folder)
    if chosen is None:
        return None
    (first, *between, last), why = chosen
    changed = [r for r in between if any(r[key] != first[key] for key in ("right", "jargon"))]
    shown = first, [*changed, between[len(between) // 2]][0], last
    wrapped = [wrap_spans(rollout["spans"], COLUMNS) for rollout in shown]
    rows = max(1, *map(len, wrapped))
    options = dict(layout="constrained", subplot_kw=dict(xticks=[], yticks=[], frame_on=False))
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 1.1 + LINE * rows), **options)
    question = textwrap.fill(f"{first['question']} (Answer: {first['gold']})", 116)
    # A dollar sign begins no formula.
    figure.suptitle(question, fontsize=SIZE, x=0.01, ha="left", parse_math=False)
    caption(figure, folder, runs, f"Blue: written by the senior; orange: by the junior. {why}")
    figure.draw_without_rendering()  # after which the width of the axes is known
    # Points: a character of the font is 0.602 of its size wide.
    size = 72 * WIDTH * axes[0].get_position().width / COLUMNS / 0.602
    look = dict(family="monospace", fontsize=size, va="center", parse_math=False, in_layout=False)
    for ax, rollout, lines in zip(axes, shown, wrapped):
        verdict = "right" if rollout["right"] else "wrong"
        ax.set_title(f"update {rollout['update']}: {verdict}", weight="bold", loc="left")
        cells = np.ones((rows, COLUMNS, 3))  # white
        for y, (line, authors) in enumerate(lines):
            cells[y, : len(line)] = [AUTHORS[author] for author in authors]
            ax.text(0, y, line, **look)
        ax.imshow(cells, extent=(0, COLUMNS, rows - 0.5, -0.5), aspect="auto")
    return figure


# ------------------------------------------------------------------------------------------------
# How often the text changes hands

EARLY = 8  # the update at which jargon is compared


def granularity(folder: Path, runs: pd.DataFrame) -> plt.Figure | None:
    """Handoffs before training, with jargon early in training, and with accuracy at its end."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.3), sharey=True, layout="constrained")
    ticks: dict[float, str] = {}
    for arm, of_arm in runs.groupby("arm", sort=False):
        jargon, accuracy = (pooled(of_arm, "senior", name) for name in ("jargon", "accuracy"))
        late = jargon[jargon.index >= EARLY]
        if late.empty:
            continue
        flags, handoffs = read_flags(folder, arm), pooled(of_arm, "tandem", "handoffs").value
        label = flags["handoff"] + ("" if flags["p"] == 0.5 else f", p = {flags['p']:g}")
        label, handoffs = ("solo", 0.0) if flags["solo"] else (label, handoffs.get(0, nan))
        # Schedules that never differ share a place.
        ticks[handoffs] = f"{ticks[handoffs]}, {label}" if handoffs in ticks else label
        for ax, (value, low, high) in zip(axes, (late.values[0], accuracy.values[-1])):
            forest_plot(ax, [(handoffs, value, [(low, high)], look_of(arm))])
    labels = [f"{label}: {handoffs:.1f}" for handoffs, label in ticks.items()]
    axes[0].set_yticks(list(ticks), labels)
    axes[0].set_ylabel("handoffs per rollout before training")
    axes[0].set(xlabel=f"with jargon at update {EARLY} (%)", xlim=(-3, 103))
    axes[1].set(xlabel="right at the end (%)", xlim=(-3, 103))
    note = "Solutions of the senior alone. Bars: 95\u00a0% Wilson intervals of all seeds pooled."
    return caption(figure, folder, runs, note) if ticks else None


# ------------------------------------------------------------------------------------------------
# Sweep

LOW_JARGON = 5  # percent
GOOD_C, GOOD_J = (-0.5, -0.3), (0.2, 0.35)  # from, to: what the paper's Appendix E recommends


def read_cells(folder: str | Path) -> pd.DataFrame:
    """A row per (c, j): updates and joint accuracy at the end, until when there is jargon, and
    whether it is the best: that of the most right solutions together; of equals, c nearest to 0.

    Only cells at the last update may be best. Where training diverged, numbers are nan.
    """
    rows = []
    for arm, of_arm in read_runs(folder, experiments.SETTINGS["sweep"]).groupby("arm", sort=False):
        end = pooled(of_arm, "tandem", "accuracy").iloc[-1]
        jargon = pooled(of_arm, "senior", "jargon").value
        numbers = [end.name, end.value, min(jargon.index[jargon < LOW_JARGON], default=nan)]
        if any(Path(folder, arm).glob("seed-*/stopped.txt")):
            numbers = [nan] * 3
        weights = experiments.ARMS[arm]
        rows.append([weights["wrong_weight"], weights["junior_weight"], *numbers])
    cells = pd.DataFrame(rows, columns=["c", "j", "updates", "accuracy", "until"])
    cells = cells.sort_values(["c", "j"], ascending=False)
    finished = cells[cells.updates == cells.updates.max()]
    return cells.assign(best=cells.index == (finished.accuracy.idxmax() if len(finished) else -1))


def best_cell(folder: str | Path) -> tuple[float, float] | None:
    """The best (c, j) on validation problems; None without a finished cell."""
    cells = read_cells(folder)
    return next(cells.loc[cells.best, ["c", "j"]].itertuples(index=False, name=None), None)


def sweep(folder: Path, runs: pd.DataFrame) -> plt.Figure | None:
    """Joint accuracy at the end, and how soon the jargon goes, for each c and j."""
    cells = read_cells(folder)
    if cells.empty:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.6), layout="constrained")
    heat_map(axes[0], cells, "accuracy", "viridis")
    axes[0].set_title("right at the end, both together (%)")
    heat_map(axes[1], cells, "until", "viridis_r")
    axes[1].set_title(f"updates until jargon is under {LOW_JARGON} %, senior alone")
    note = (
        "Validation problems. Red: the best cell of the left panel. Black: what the paper advises."
    )
    return caption(figure, folder, runs, note)


def heat_map(ax: plt.Axes, cells: pd.DataFrame, name: str, colours: str) -> None:
    """A number per (c, j), with frames around the best cell and the paper's region."""
    grid = cells.pivot(index="c", columns="j", values=name)[::-1]
    ax.imshow(grid, cmap=colours, aspect="auto", alpha=0.6)
    for cell in cells.itertuples():
        x, y, value = grid.columns.get_loc(cell.j), grid.index.get_loc(cell.c), getattr(cell, name)
        text = "never" if isnan(value) else f"{value:.3g}"
        ax.text(x, y, "diverged" if isnan(cell.updates) else text, ha="center", va="center")
        good = GOOD_C[0] <= cell.c <= GOOD_C[1] and GOOD_J[0] <= cell.j <= GOOD_J[1]
        edge = RED if cell.best else "black" if good else "none"
        ax.add_patch(plt.Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, edgecolor=edge))
    ax.set_xticks(range(len(grid.columns)), [f"{j:g}" for j in grid.columns])
    ax.set_yticks(range(len(grid)), [f"{c:g}" for c in grid.index])
    ax.set(xlabel="j, weight of the junior's tokens", ylabel="c, weight of wrong rollouts")
    ax.grid(False)


# ------------------------------------------------------------------------------------------------
# Tandem RL: differences between arms

# Others' differences in points, tandem GRPO minus solo GRPO: Jiao et al. (2026), where each arm was
# run once, and an independent reproduction with one seed and its interval.
PAPER = "solo GRPO: Jiao et al. (2026), Qwen3-4B", GREY, "*"
AGAIN = "solo GRPO: independent reproduction", GREY, "d"
PUBLISHED = {"pass@4": [(54.85 - 55.56, [], PAPER)], "retention": [(99.8 - 94.3, [], PAPER)]}
PUBLISHED["handoff"] = [(54.74 - 52.40, [], PAPER), (-1.18, [(-3.34, 0.89)], AGAIN)]
SHARES = {"solo": "right alone", "pass@4": "pass@4 alone", "handoff": "handoff robustness"}
SHARES |= {"word": "right, a coin per word", "retention": "retention"}
NATS = {"legibility": "the junior's cross-entropy", "drift": "drift from the junior"}


def forest_plot(ax: plt.Axes, points: list[tuple]) -> None:
    """points: (height, value, intervals, look). The bar of the first interval is the thick one."""
    for height, value, intervals, (label, colour, marker) in points:
        for (low, high), width in zip(intervals, (3, 1)):
            ax.hlines(height, low, high, color=colour, linewidth=width)
        ax.plot(value, height, marker, color=colour, label=label, markersize=5)


def rlvr(folder: Path, runs: pd.DataFrame) -> plt.Figure | None:
    """Tandem GRPO minus each other arm, measure by measure; None without such a pair."""
    ends, unfinished = tables.read_ends(folder, runs.arm.unique())
    pairs = tables.pairs_of(ends)
    if not pairs:
        return None
    options = dict(height_ratios=[len(SHARES), len(NATS)], layout="constrained")
    figure, axes = plt.subplots(2, figsize=(WIDTH, 5.4), **options)
    for ax, names, unit in zip(axes, (SHARES, NATS), ("points", "nats per token")):
        for i, name in enumerate(names):
            found = [(*tables.estimate(name, *pairs[arm])[:2], look_of(arm)) for arm in pairs]
            found += PUBLISHED.get(name, [])
            forest_plot(ax, [(i + k / 6, *estimate) for k, estimate in enumerate(found)])
        ax.set_yticks([i + 1 / 6 for i in range(len(names))], names.values())
        ax.set_ylim(len(names) - 0.2, -0.25)
        ax.axvline(0, color=GREY, linewidth=0.8)
        ax.set_xlabel(unit)
    handles, labels = axes[0].get_legend_handles_labels()
    entries = dict(zip(labels, handles))
    options = dict(loc="outside upper center", ncols=2, title="tandem GRPO minus")
    figure.legend(entries.values(), entries, **options)
    note = "95\u00a0% intervals, thick: bootstrap over seeds and problems; thin: Student's over "
    note += "seeds. "
    return caption(figure, folder, runs, note + unfinished)


# ------------------------------------------------------------------------------------------------
# Everything

# {setting: {name of the file: function}}, and what is printed after the table of a setting.
FIGURES: dict[str, dict] = {
    "skill": {"skill-figure1": figure_1, "skill-figure2": partial(by_arm, also=["imitation"])},
    "language": {"language-figure2": by_pair, "language-figure3": by_language},
    "granularity": {"granularity": granularity},
    "control": {"control": by_pair},
    "sweep": {"sweep": sweep},
    "pressure": {"pressure": by_arm},
    "pressure-language": {"pressure-language": by_pair},
    "rlvr": {"rlvr": rlvr},
}
TABLES = {"granularity": tables.table_of_handoffs, "rlvr": tables.table_of_measures}


def arms_of(folder: Path, setting: str) -> list[str]:
    """The arms of a setting; of the sweep also those on test problems that lie in the folder."""
    tests = [arm for arm in arms_in(folder) if setting == "sweep" and arm.startswith("test-c")]
    return [*experiments.SETTINGS[setting], *tests]


EVERYBODY = "senior, junior and both together"


def print_tables(folder: Path, setting: str) -> None:
    """Print the tables of one setting, and which of its arms are in none of them."""
    arms = arms_of(folder, setting)
    runs = read_runs(folder, arms)
    for arm in arms_in(folder):
        if arm in arms and arm not in set(runs.arm):
            print(f"{folder / arm} is left out: not every seed has evaluated {EVERYBODY}")
    if len(runs):
        further = TABLES[setting](folder, runs) if setting in TABLES else None
        print("\n\n".join(filter(None, [tables.table(runs), further])))


def draw(folder: Path, setting: str) -> None:
    """Draw the figures of one setting into folder/figures/."""
    runs = read_runs(folder, arms_of(folder, setting))
    if runs.empty:
        print(f"{folder}: no arm of {setting} has evaluated {EVERYBODY}: there is nothing to draw")
        return
    if setting not in FIGURES:
        print(f"{setting} has no figure: add a function to FIGURES in lab/figures.py")
    for name, function in FIGURES.get(setting, {}).items():
        figure = function(folder, runs)
        if figure:
            print(save(figure, folder / "figures" / f"{name}.png"))


def save(figure: plt.Figure, path: Path) -> Path:
    """Write the figure as PNG, and beside it as PDF; the same rows give the same PDF."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    plt.close(figure)
    return path


def draw_all(folder: Path, settings: Iterable[str]) -> None:
    """Draw the figures of these settings, and the page of all rollouts in the folder."""
    for setting in settings:
        draw(folder, setting)
    viewer.draw_page(folder)


def main(folder: str) -> None:
    """Draw every setting of which the folder holds an arm; in one line, what cannot be used."""
    place, present = Path(folder), arms_in(Path(folder))
    known = {setting: set(arms_of(place, setting)) for setting in experiments.SETTINGS}
    settings = [setting for setting, arms in known.items() if arms & set(present)]
    if not settings:
        remedy = "run run_gsm8k.py first, or name its --out folder"
        sys.exit(f"{folder} has no <arm>/seed-<k>/metrics.jsonl of a known setting: {remedy}")
    with errors_in_one_line():
        for setting in settings:
            print_tables(place, setting)
        draw_all(place, settings)
    for arm in set(present) - set.union(*known.values()):
        print(f"{place / arm} is in no setting of lab/experiments.py and is not drawn")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
