"""Every figure, drawn from the rows that runs have written:  python -m lab.figures RUNS

RUNS is the folder that run_gsm8k.py writes: RUNS/<arm>/seed-<k>/metrics.jsonl has one row per
update, samples.jsonl some rollouts, and measures.jsonl (arms of rlvr) one number per problem. A
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
    credit             who writes, whose words are scored, and are the rewards true?
    rlvr               the measures of Tandem RL (Jiao et al., 2026): differences between arms
    all of them        rollouts.html: a page on which to see who wrote what (lab/viewer.py), and
                       evaluations.csv: a row per evaluation, shares from 0 to 1

There are four kinds of figures: curves, rollouts by author (figure_1), a heat map and forest plots.
A new setting gets curves like those of skill-figure2. For another figure, write a function of
(folder, runs) that returns it, and name it in FIGURES.
"""

import os
import re
import sys
import textwrap
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

os.environ["MPLBACKEND"] = "Agg"  # draws to files, without a screen
import matplotlib.pyplot as plt

from lab import experiments, tables, viewer
from lab.runs import Refused, errors_in_one_line, replace_file, writing
from lab.tables import arms_in, by_seed, pooled, read_flags, read_runs

WIDTH, SIZE = 7.0, 8  # inches: the text width of a paper with two columns; points: of every text
plt.rcParams |= {"font.size": SIZE, "axes.titlesize": SIZE, "axes.grid": True, "grid.alpha": 0.25}
# Hinting would change the widths of the characters.
plt.rcParams |= {"legend.frameon": False, "text.hinting": "none"}
# The colours of Okabe and Ito (2008), which the colour-blind can tell apart.
COLOURS = "#0072B2 #D55E00 #009E73 #E69F00 #CC79A7 #56B4E9 #000000".split()
BLUE, RED, GREEN, ORANGE, PINK, SKY = COLOURS[:6]
GREY = "#555555"  # of the junior alone, and of schedules

# Label, colour and marker of an arm in every figure; the arms of a pair of languages look like
# those without it. Two arms have the same colour only if they never meet in a figure.
ARMS: dict[str, tuple] = {
    "tandem": ("tandem training", BLUE, "o"),
    "solo": ("standard RL", RED, "s"),
    "imitation": ("imitation only", GREEN, "^"),
    "shuffled": ("shuffled rewards", ORANGE, "D"),
    "senior-only": ("tandem, j = 0", PINK, "v"),
    "reinforce-j1": ("REINFORCE, j = 1", BLUE, "o"),
    "reinforce-j0": ("REINFORCE, j = 0", PINK, "v"),
    "reinforce-junior": ("only junior scored", ORANGE, "D"),
    "reinforce-imitation": ("only junior writes", GREEN, "^"),
    "grpo-tandem": ("GRPO, tandem", SKY, "P"),
    "grpo-solo": ("GRPO, solo", RED, "s"),
    "grpo-shuffled": ("GRPO, shuffled", ORANGE, "D"),
    "rlvr-solo": ("solo GRPO", RED, "s"),
    "rlvr-solo-kl-0.02": ("solo GRPO, KL 0.02", GREEN, "^"),
    "rlvr-solo-kl-0.1": ("solo GRPO, KL 0.1", SKY, "P"),
    "rlvr-solo-kl": ("solo GRPO, KL 0.5", PINK, "v"),
    "rlvr-solo-16": ("solo GRPO, groups of 16", ORANGE, "D"),
}
LANGUAGES = {"en": "English", "de": "German", "fr": "French"}


def look_of(arm: str) -> tuple[str, str, str]:
    """An arm that is not in ARMS has its name, and colour and marker by a checksum of it."""
    chosen = zlib.crc32(arm.encode())
    colour = ORANGE if arm.endswith("-shuffled") else COLOURS[chosen % 7]
    own = arm, colour, "os^Dv"[chosen % 5]
    return ARMS.get(arm) or ARMS.get(arm.removesuffix("-shuffled"), own)


def models_and_problems(folder: Path, runs: pd.DataFrame) -> str:
    flags = read_flags(folder, runs.arm.iloc[0])
    senior, junior, problems = (Path(flags[key]).name for key in ("senior", "junior", "problems"))
    return f"Senior: {senior}. Junior: {junior}. Problems: {problems}"


def describe(folder: Path, runs: pd.DataFrame) -> str:
    """The beginning of a caption: the models, the problems, n, and the seeds."""
    seeds = " or ".join(map(str, sorted(set(runs.groupby("arm").seed.nunique()))))
    about = f"{models_and_problems(folder, runs)}, {runs.n.max():.0f} solutions per point and seed"
    return f"{about}. Seeds per arm: {seeds}. "


def caption(figure: plt.Figure, text: str) -> plt.Figure:
    """Write the text below the figure."""
    figure.supxlabel(textwrap.fill(text, 116), fontsize=SIZE, color=GREY, x=0.01, ha="left")
    return figure


def add_legend(figure: plt.Figure, **options) -> None:
    """One legend above all panels, with every label once."""
    entries: dict = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles))
    figure.legend(entries.values(), entries, loc="outside upper center", **options)


# ------------------------------------------------------------------------------------------------
# Curves: shares against updates

FAR = 3  # seeds disagree if they differ by more than this many intervals at some update
BANDS = "Band: 95\u00a0% Wilson interval of all seeds pooled. Where seeds are further apart than "
BANDS += f"{FAR} times the width of this interval, each seed has a thin line instead."
# {title of a panel: (who, metric)}
SKILL = {"with jargon, senior alone": ("senior", "jargon")}
SKILL |= {"right, both together": ("tandem", "accuracy")}
SKILL |= {"right, senior alone": ("senior", "accuracy")}
PAIR = {"with jargon": ("senior", "jargon"), "right": ("senior", "accuracy")}
PAIR |= {"in the junior's language": ("senior", "languages.{junior}")}
SPOKEN = {f"in {name}": ("senior", f"languages.{code}") for code, name in LANGUAGES.items()}


def draw_curve(ax: plt.Axes, runs: pd.DataFrame, who: str, metric: str, look: tuple) -> None:
    """A metric of an arm; in a panel of accuracy also that of the junior, which is not trained."""
    label, colour, marker = look
    if metric == "accuracy" and not ax.lines:
        share, low, high = pooled(runs, "junior", "accuracy").loc[0]
        ax.axhline(share, color=GREY, linestyle="--", linewidth=1, label="junior alone")
        ax.axhspan(low, high, color=GREY, alpha=0.1)
    points, seeds = pooled(runs, who, metric), 100 * by_seed(runs, who, metric)
    # A seed that is still running has fewer rows than the others.
    apart = (seeds.max(axis=1) - seeds.min(axis=1))[points.index]
    if (apart > FAR * (points.high - points.low)).any():
        lines, width = seeds.interpolate("index", limit_area="inside"), 0.7
    else:
        lines, width = points[["value"]], 1.4
        ax.fill_between(points.index, points.low, points.high, color=colour, alpha=0.2)
    ax.plot(lines, color=colour, label=label, marker=marker, markersize=2 * width, linewidth=width)


def curves(folder: Path, runs: pd.DataFrame, metrics: dict, also: tuple = ()) -> plt.Figure:
    """All arms, and those in `also`: a column of panels per metric, a row per pair of languages."""
    runs, pairs = read_runs(folder, [*runs.arm.unique(), *also]), {}
    for arm in runs.arm.unique():
        flags = read_flags(folder, arm)
        pairs.setdefault((flags["senior_language"], flags["junior_language"]), []).append(arm)
    figure = plt.figure(figsize=(WIDTH, 1.1 + 1.2 * len(pairs)), layout="constrained")
    axes = figure.subplots(len(pairs), len(metrics), sharex="row", sharey=True, squeeze=False)
    for row, ((senior, junior), arms) in zip(axes, pairs.items()):
        languages = " → ".join(LANGUAGES.get(code, code) for code in (senior, junior))
        row[0].set(ylabel=f"{languages}\nsolutions (%)", ylim=(-3, 103), yticks=range(0, 101, 25))
        for ax, (who, metric) in zip(row, metrics.values()):
            for arm in arms:
                look = look_of(arm.removeprefix(f"{senior}-{junior}-"))
                draw_curve(ax, runs[runs.arm == arm], who, metric.format(junior=junior), look)
    for top, bottom, title in zip(axes[0], axes[-1], metrics):
        top.set_title(title)
        bottom.set_xlabel("updates")
    add_legend(figure, ncols=5, columnspacing=1)
    about = "Left: languages of senior → junior. Solutions of the senior alone, if not said. "
    return caption(figure, describe(folder, runs) + about + BANDS)


# ------------------------------------------------------------------------------------------------
# Figure 1: the rollouts of one problem by author

COLUMNS, LINE = 31, 0.16  # characters in each of the three columns; inches: the height of a line
AUTHORS = {"senior": (0.80, 0.89, 0.97), "junior": (1.0, 0.84, 0.60)}  # red, green, blue
# The words that fit into a column, or as much as does of a long one.
WORDS = re.compile(rf"\S(?:.{{0,{COLUMNS - 2}}}\S)?(?!\S)|\S{{1,{COLUMNS}}}")


def wrap(tokens: Iterable[list]) -> list[tuple[str, list[str]]]:
    """The lines of a rollout: [(the text, the author of each character), ...].

    >>> wrap([["senior", "I s"], ["junior", "ell"]])
    [('I sell', ['senior', 'senior', 'senior', 'junior', 'junior', 'junior'])]
    """
    authors = [author for author, text, *_ in tokens for _ in text]
    lines = WORDS.finditer("".join(text for _, text, *_ in tokens))
    return [(line[0], authors[slice(*line.span())]) for line in lines]


def figure_1(folder: Path, runs: pd.DataFrame) -> plt.Figure | None:
    """One problem and three joint rollouts by author: before, during and after training.

    The second is the first whose verdict or jargon differs from those before training, or else the
    middle one. None if no problem of the arm "tandem" was kept at three evaluations.
    """
    chosen = viewer.choose_example(folder)
    if chosen is None:
        return None
    (question, gold), (first, *between, last), why = chosen
    changed = [r for r in between if any(r[key] != first[key] for key in ("right", "jargon"))]
    shown = first, [*changed, between[len(between) // 2]][0], last
    wrapped = [wrap(rollout["tokens"]) for rollout in shown]
    rows = max(1, *map(len, wrapped))
    options = dict(layout="constrained", subplot_kw=dict(xticks=[], yticks=[], frame_on=False))
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 1.1 + LINE * rows), **options)
    problem = textwrap.fill(f"{question} (Answer: {gold})", 116)
    # A dollar sign begins no formula.
    figure.suptitle(problem, fontsize=SIZE, x=0.01, ha="left", parse_math=False)
    note = f"Blue: the senior's words; orange: the junior's. {why} "
    caption(figure, f"{note}Arm: tandem. {models_and_problems(folder, runs)}.")
    figure.draw_without_rendering()  # after which the width of the axes is known
    # Points: a character of the font is 0.602 of its size wide.
    size = 72 * WIDTH * axes[0].get_position().width / COLUMNS / 0.602
    look = dict(family="monospace", fontsize=size, va="center", parse_math=False, in_layout=False)
    for ax, rollout, lines in zip(axes, shown, wrapped):
        when = f"update {rollout['update']}" if rollout["update"] else "before training"
        verdict = "right" if rollout["right"] else "wrong"
        ax.set_title(f"{when}: {verdict}", weight="bold", loc="left")
        cells = np.ones((rows, COLUMNS, 3))  # white
        for y, (line, authors) in enumerate(lines):
            cells[y, : len(line)] = [AUTHORS[author] for author in authors]
            ax.text(0, y, line, **look)
        ax.imshow(cells, extent=(0, COLUMNS, rows - 0.5, -0.5), aspect="auto")
    return figure


# ------------------------------------------------------------------------------------------------
# Forest plots


def forest(ax: plt.Axes, rows: dict[str, list[tuple]]) -> None:
    """Rows of points (value, intervals, look), from above. The bar of a first interval is thick."""
    for i, points in enumerate(rows.values()):
        for k, (value, intervals, (label, colour, marker)) in enumerate(points):
            for (low, high), width in zip(intervals, (3, 1)):
                ax.hlines(i + k / 6, low, high, color=colour, linewidth=width)
            ax.plot(value, i + k / 6, marker, color=colour, label=label, markersize=5)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.2, -0.25)


EARLY = 8  # jargon is compared at this update, or at the last evaluation before it


def granularity(folder: Path, runs: pd.DataFrame) -> plt.Figure:
    """Jargon early in training and accuracy at its end, ordered by handoffs before training."""
    handoffs = {}
    for arm, of_arm in runs.groupby("arm"):
        handoffs[arm] = 0.0 if arm == "solo" else pooled(of_arm, "tandem", "handoffs").value[0]
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.3), sharey=True, layout="constrained")
    axes[0].set_ylabel("arm: handoffs per rollout before training")
    early = runs[runs["update"] <= EARLY]["update"].max()
    labels = f"with jargon at update {early} (%)", "right at the end (%)"
    for ax, metric, last, label in zip(axes, ("jargon", "accuracy"), (early, None), labels):
        rows = {}
        for arm in sorted(handoffs, key=handoffs.get, reverse=True):
            value, low, high = pooled(runs[runs.arm == arm], "senior", metric).loc[:last].iloc[-1]
            look = ARMS.get(arm, (arm, GREY, "o"))
            rows[f"{arm}: {handoffs[arm]:.1f}"] = [(value, [(low, high)], look)]
        forest(ax, rows)
        ax.set(xlabel=label, xlim=(-3, 103))
    note = "Senior alone; the arm tandem tosses a coin per word. Bars: 95\u00a0% Wilson intervals."
    return caption(figure, describe(folder, runs) + note)


SHARES = {"solo": "right alone", "pass@4": "pass@4 alone", "handoff": "handoff robustness"}
SHARES |= {"word": "right, a coin per word", "retention": "retention"}
NATS = {"legibility": "the junior's cross-entropy", "drift": "drift from the junior"}


def rlvr(folder: Path, runs: pd.DataFrame) -> plt.Figure | None:
    """Tandem GRPO minus each other arm, measure by measure; None without such a pair."""
    pairs = tables.pairs_of(tables.read_ends(folder, runs.arm.unique()))
    if not pairs:
        return None
    options = dict(height_ratios=[len(SHARES), len(NATS)], layout="constrained")
    figure, axes = plt.subplots(2, figsize=(WIDTH, 4.4), **options)
    for ax, names, unit in zip(axes, (SHARES, NATS), ("points", "nats per token")):
        rows = {}
        for name, label in names.items():
            rows[label] = [(*tables.estimate(name, *pairs[arm])[:2], look_of(arm)) for arm in pairs]
        forest(ax, rows)
        ax.axvline(0, color=GREY, linewidth=0.8)
        ax.set_xlabel(unit)
    add_legend(figure, ncols=3, title="tandem GRPO minus")
    note = "95\u00a0% intervals, thick: bootstrap over seeds and problems; thin: Student's over "
    return caption(figure, describe(folder, runs) + note + "seeds.")


# ------------------------------------------------------------------------------------------------
# Heat map: the sweep over c and j

LOW_JARGON = 5  # percent
ADVISED = [(c, j) for c in (-0.3, -0.5) for j in (0.2, 0.35)]  # by the paper's Appendix E


def sweep(folder: Path, runs: pd.DataFrame) -> plt.Figure | None:
    """Joint accuracy at the end, and how soon the jargon goes, for each c and j."""
    cells = []
    for arm, of_arm in runs.groupby("arm"):
        # A cell in which training diverged stays empty.
        if not list(Path(folder, arm).glob("seed-*/stopped.txt")):
            accuracy = pooled(of_arm, "tandem", "accuracy").value.iloc[-1]
            jargon = pooled(of_arm, "senior", "jargon").value
            # The first evaluation with little jargon; nan if there is none.
            until = min(jargon.index[jargon < LOW_JARGON], default=np.nan)
            weights = experiments.ARMS[arm]
            cells.append([weights["wrong_weight"], weights["junior_weight"], accuracy, until])
    if not cells:
        return None
    cells = pd.DataFrame(cells, columns=["c", "j", "accuracy", "until"])
    cells = cells.sort_values(["c", "j"], ascending=False)
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.6), layout="constrained")
    axes[0].set_title("right at the end, both together (%)")
    axes[1].set_title(f"updates until jargon is under {LOW_JARGON} %, senior alone")
    for ax, name, colours in zip(axes, ("accuracy", "until"), ("viridis", "viridis_r")):
        grid = cells.pivot(index="c", columns="j", values=name)[::-1]
        ax.imshow(grid, cmap=colours, aspect="auto", alpha=0.6)
        for _, cell in cells.iterrows():
            x, y = grid.columns.get_loc(cell.j), grid.index.get_loc(cell.c)
            text = "never" if np.isnan(cell[name]) else f"{cell[name]:.3g}"
            ax.text(x, y, text, ha="center", va="center")
            edge = "black" if (cell.c, cell.j) in ADVISED else "none"
            edge = RED if cell.accuracy == cells.accuracy.max() else edge
            ax.add_patch(plt.Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, edgecolor=edge))
        ax.set_xticks(range(len(grid.columns)), [f"{j:g}" for j in grid.columns])
        ax.set_yticks(range(len(grid)), [f"{c:g}" for c in grid.index])
        ax.set(xlabel="j, weight of the junior's tokens", ylabel="c, weight of wrong rollouts")
        ax.grid(False)
    note = "Validation problems. Red: the best cells of the left panel. Black: what the paper "
    return caption(figure, describe(folder, runs) + note + "advises. Empty: training diverged.")


# ------------------------------------------------------------------------------------------------
# Everything

skill, pair = partial(curves, metrics=SKILL), partial(curves, metrics=PAIR)
spoken = partial(curves, metrics=SPOKEN, also=("de-fr-imitation",))


def credit(folder: Path, runs: pd.DataFrame, end: str) -> plt.Figure | None:
    """The arms with true rewards, or those with shuffled ones, whose names have this end."""
    runs = runs[runs.arm.str.endswith("-shuffled") == bool(end)]
    if runs.empty:
        return None
    figure = pair(folder, runs)
    figure.axes[0].set_title(f"with jargon{', shuffled rewards' if end else ''}")
    return figure


# {setting: {name of the file: function}}
FIGURES: dict[str, dict] = {
    "skill": {"skill-figure1": figure_1, "skill-figure2": partial(skill, also=("imitation",))},
    "language": {"language-figure2": pair, "language-figure3": spoken},
    "granularity": {"granularity": granularity},
    "control": {"control": pair},
    "sweep": {"sweep": sweep},
    "pressure": {"pressure": skill},
    "pressure-language": {"pressure-language": pair},
    "credit": {f"credit{end}": partial(credit, end=end) for end in ("", "-shuffled")},
    "rlvr": {"rlvr": rlvr},
}


def save(figure: plt.Figure, path: Path) -> Path:
    """Write the figure as PNG, and beside it as PDF; the same rows give the same PDF."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    plt.close(figure)
    return path


def draw_all(folder: Path, settings: Iterable[str]) -> None:
    """Write the figures of these settings, the page of rollouts and all evaluations as CSV into
    folder/figures/."""
    for setting in settings:
        runs = read_runs(folder, experiments.SETTINGS[setting])
        for name, function in FIGURES.get(setting, {setting: skill}).items():
            if len(runs) and (figure := function(folder, runs)):
                print(save(figure, folder / "figures" / f"{name}.png"))
    viewer.draw_page(folder)
    csv = tables.evaluations(folder).to_csv(index=False)
    replace_file(folder / "figures" / "evaluations.csv", csv.encode())


@errors_in_one_line()
def main(folder: Path) -> None:
    """Print the tables and draw the figures of every setting of which the folder has most arms.

    If there is none, of every setting of which it has an arm: settings share arms.
    """
    found = {name: read_runs(folder, arms) for name, arms in experiments.SETTINGS.items()}
    found = {setting: runs for setting, runs in found.items() if len(runs)}
    left_out = set(arms_in(folder)).difference(*(runs.arm for runs in found.values()))
    for arm in sorted(left_out):
        reason = "it is in no setting, or not every seed has evaluated senior, junior and both"
        print(f"{folder / arm} is left out: {reason}")
    if not found:
        remedy = "run run_gsm8k.py first, or name its --out folder"
        raise Refused(f"{folder} has no <arm>/seed-<k>/metrics.jsonl of a known setting: {remedy}")
    most = [s for s in found if 2 * found[s].arm.nunique() > len(experiments.SETTINGS[s])]
    for setting in most or found:
        print(tables.all_tables(folder, found[setting]))
    draw_all(folder, most or found)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
