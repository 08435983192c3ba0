"""Every figure, drawn from the rows that runs have written:  python -m lab.figures RUNS

RUNS is the folder that run_gsm8k.py writes: RUNS/<arm>/seed-<k>/metrics.jsonl has one row per
update, samples.jsonl some rollouts, and measures.jsonl (with --measures) one number per problem. A
setting is a list of arms that are compared (lab/experiments.py). Its tables (lab/tables.py) are
printed, and its figures are written to RUNS/figures/, each as PNG and as PDF:

    skill              skill-figure1 (three rollouts of one problem), skill-figure2
    language           language-figure2, language-figure3 (the language of the solutions)
    granularity        by schedule, and by the probability p of the senior
    control            is it the reward that changes the senior, or imitation?
    sweep              the weights c (of wrong rollouts) and j (of the junior's tokens)
    pressure           GRPO gives the junior's tokens no weight: can the reward alone drive out the
                       jargon, and does jargon that costs the pair more go faster?
    pressure-language  as language
    rlvr               the measures of Tandem RL (Jiao et al., 2026)
    all of them        rollouts.html: a page on which to see who wrote what (lab/viewer.py)

A thick line is pooled over the seeds of an arm, a thin one is a single seed, a band is Wilson's
interval of the evaluation. To add a figure, write a function of (folder, runs, setting) that
returns the path of its PNG, and name it in FIGURES.
"""

import os
import re
import sys
import textwrap
from collections.abc import Iterable
from itertools import chain, cycle, groupby
from math import isnan, nan
from pathlib import Path

import pandas as pd

os.environ["MPLBACKEND"] = "Agg"  # draws to files, without a screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab import tables, viewer
from lab.experiments import SETTINGS
from lab.runs import errors_in_one_line, writing
from lab.tables import arms_in, by_seed, pooled, read_flags, read_runs
from metrics import has_jargon

plt.rcParams |= {"font.size": 8, "legend.fontsize": 7, "legend.frameon": False}
plt.rcParams |= {"axes.grid": True, "grid.alpha": 0.25}
WIDTH = 7.0  # inches: the text width of a paper with two columns
# The colours of Okabe and Ito (2008), which the colour-blind can tell apart.
BLUE, RED, GREEN, ORANGE, PINK, SKY = "#0072B2 #D55E00 #009E73 #E69F00 #CC79A7 #56B4E9".split()
LOOKS = [*zip((BLUE, RED, GREEN, ORANGE, PINK, SKY), "os^DvP")]
STYLES = [dict(color=c, marker=m, linestyle=line) for line in ("-", "--", ":") for c, m in LOOKS]
YLABELS = {"accuracy": "accuracy (%)", "jargon": "solutions with jargon (%)"}
LANGUAGES = {"en": ("English", STYLES[0]), "de": ("German", STYLES[3]), "fr": ("French", STYLES[4])}
# What the legends call the arms of a setting. Arms of a pair of languages are named without it.
SKILL = {"tandem": "tandem training", "solo": "standard RL"}
PRESSURE = {"grpo-tandem": "GRPO, tandem (j = 0)"}
PRESSURE |= {"grpo-shuffled": "GRPO, tandem, rewards shuffled", "grpo-solo": "GRPO, solo"}
PRESSURE |= {f"reinforce-j{j}": f"REINFORCE, tandem, j = {j}" for j in (1, 0)}
CONTROL = {"tandem": "true rewards, j = 1 (main)", "shuffled": "shuffled rewards, j = 1"}
CONTROL |= {"senior-only": "true rewards, j = 0"}
RLVR = {"rlvr-tandem": "tandem GRPO", "rlvr-solo": "solo GRPO", "rlvr-solo-kl": "solo GRPO + KL"}
RLVR |= {"rlvr-solo-16": "solo GRPO, group of 16"}

Curve = tuple[pd.DataFrame, str, str, str, dict]  # the runs of an arm, who, metric, label, style

# ------------------------------------------------------------------------------------------------
# Parts of a figure


def labels_of(arms: Iterable[str], names: dict[str, str]) -> dict[str, tuple[str, dict]]:
    """{arm: (label, style)}. A known arm has the same style in every figure, and comes first."""
    arms = dict.fromkeys(arms)
    known = names | {arm: arm for arm in arms if arm not in names}
    styled = zip(known.items(), cycle(STYLES))
    return {arm: (label, style) for (arm, label), style in styled if arm in arms}


def curves_of(runs: pd.DataFrame, labels: dict, metric: str, who: str = "senior") -> list[Curve]:
    """A curve per arm."""
    arms = {arm: runs[runs.arm == arm] for arm in labels}
    return [(arms[arm], who, metric, *labels[arm]) for arm in labels if len(arms[arm])]


def draw_curve(ax: Axes, curve: Curve) -> None:
    """A metric of an arm against updates, with a band if it is a share."""
    runs, who, metric, label, style = curve
    points = pooled(runs, who, metric)
    draw_lines(ax, by_seed(runs, who, metric), points.value, label, style)
    if points.low.notna().any():
        colour = style["color"]
        ax.fill_between(points.index, points.low, points.high, color=colour, alpha=0.2, linewidth=0)
        ax.set_ylim(-3, 103)


def draw_lines(ax: Axes, seeds: pd.DataFrame, mean: pd.Series, label: str, style: dict) -> None:
    """A thin line per seed, and a thick one over all seeds."""
    if seeds.shape[1] > 1:
        ax.plot(seeds.interpolate("index"), color=style["color"], alpha=0.4, linewidth=0.5)
    ax.plot(mean, label=label, **style, markersize=2.5, linewidth=1.2)


def draw_panel(ax: Axes, curves: list[Curve], title="senior alone", junior=True, ylabel="") -> None:
    """Curves of one metric, with a horizontal line for the junior alone, which is not trained.

    Without curves the place stays empty.
    """
    if not curves:
        ax.axis("off")
        return
    for curve in curves:
        draw_curve(ax, curve)
    metric = curves[0][2]
    if junior:
        most = max((runs for runs, *_ in curves), key=lambda runs: runs.seed.nunique())
        share, low, high = pooled(most, "junior", metric).iloc[0]
        ax.axhline(share, color="#555555", linestyle="--", linewidth=1, label="junior alone")
        ax.axhspan(low, high, color="#555555", alpha=0.1, linewidth=0)
    ax.set(xlabel="updates", ylabel=ylabel or YLABELS.get(metric, metric), title=title)


def draw_grid(rows: list[list[tuple]], height: float, **options) -> tuple[Figure, list]:
    """Rows of panels, each with the arguments of draw_panel."""
    options |= dict(layout="constrained", squeeze=False, figsize=(WIDTH, height * len(rows)))
    figure, axes = plt.subplots(len(rows), len(rows[0]), **options)
    for ax, panel in zip(axes.flat, chain(*rows)):
        draw_panel(ax, *panel)
        if "sharey" in options:
            ax.label_outer()
    return figure, axes


def add_legend(place: Axes | Figure, axes: Iterable[Axes], **options) -> None:
    """In `place`, all labels of the axes, each once."""
    pairs = [zip(*reversed(ax.get_legend_handles_labels())) for ax in axes]
    entries = dict(chain(*pairs))
    place.legend(entries.values(), entries.keys(), **options)


def seed_counts(runs: pd.DataFrame) -> str:
    """How many seeds the arms have, such as "1 or 3"."""
    return " or ".join(map(str, sorted(set(runs.groupby("arm").seed.nunique()))))


def save(figure: Figure, path: Path, runs: pd.DataFrame | None = None, caption: str = "") -> Path:
    """Write the figure as PNG, and beside it as PDF; the same rows give the same PDF.

    runs: what is pooled in it, for a caption of how many seeds there are.
    """
    if runs is not None:
        caption = f"Bands: 95 % Wilson intervals of the evaluation. {caption}"
        lines = " per arm: thin lines are single seeds, thick lines all seeds pooled. "
        counts = seed_counts(runs)
        caption = ("1 seed per arm. " if counts == "1" else f"{counts} seeds{lines}") + caption
    figure.supxlabel("\n".join(textwrap.wrap(caption, 135)), fontsize=7, color="#333333")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    plt.close(figure)
    return path


# ------------------------------------------------------------------------------------------------
# Skill: the rollouts of one problem, and accuracy and jargon

COLUMNS, GAP = 40, 2  # characters: the width of figure 1's three columns, the space between them
AUTHORS: dict[str, dict] = {"senior": {"color": BLUE}, "junior": {"color": "#8A3D00"}}
AUTHORS["junior"]["bbox"] = {"facecolor": "#FFE3B3", "edgecolor": "none", "pad": 0.6}
REASONS = ["The first sample", "Chosen: the first that went from wrong to right"]
REASONS += ["Chosen: the first that lost its <<...>>"]
REASONS += ["Chosen: the first with <<...>> that went from wrong to right"]


def sample_in(row: dict) -> dict:
    """A row of samples.jsonl, with whether it has jargon. Raises an error if it is no sample."""
    jargon = has_jargon("".join(text for author, text in row["spans"] if AUTHORS[author]))
    about = {key: row[key] for key in ("update", "who", "question", "gold", "spans")}
    return about | {"right": float(row["reward"]) == 1, "jargon": jargon}


def choose_example(folder: Path) -> tuple[list[dict], str] | None:
    """The joint rollouts of one problem, of at least three evaluations, and why this problem."""
    problems: dict[tuple, list[dict]] = {}
    for seed, samples in tables.read_seeds(folder, "tandem", "samples.jsonl", sample_in).items():
        for sample in samples:
            if sample["who"] == "tandem":
                problems.setdefault((seed, sample["question"]), []).append(sample)

    def rank(samples: list[dict]) -> int:
        first, last = samples[0], samples[-1]
        corrected, lost = first["right"] < last["right"], first["jargon"] > last["jargon"]
        return 3 if corrected and first["jargon"] else 2 if lost else int(corrected)

    best = max((found for found in problems.values() if len(found) >= 3), key=rank, default=None)
    return (best, REASONS[rank(best)]) if best else None


def wrap_spans(spans: Iterable[tuple[str, str]], columns: int) -> list[list[tuple[int, str, str]]]:
    """Wrap (author, text) spans into lines of (column, author, text), at spaces if there are any.

    >>> wrap_spans([("senior", "She sel"), ("junior", "ls 5")], columns=8)
    [[(0, 'senior', 'She')], [(0, 'senior', 'sel'), (3, 'junior', 'ls 5')]]
    """
    authors = [author for author, text in spans for _ in text]
    text, end, wrapped = "".join(text for _, text in spans), 0, []
    options = dict(expand_tabs=False, replace_whitespace=False, break_on_hyphens=False)
    parts = [part.strip() for part in text.split("\n")]
    for line in chain(*(textwrap.wrap(part, columns, **options) for part in parts)):
        start = text.index(line, end)
        end = start + len(line)
        runs = [(who, [*run]) for who, run in groupby(range(start, end), authors.__getitem__)]
        wrapped.append([(i[0] - start, who, text[i[0] : i[-1] + 1]) for who, i in runs])
    return wrapped


def figure_1(folder: Path, runs: pd.DataFrame, setting: str) -> Path | None:
    """One problem and three joint rollouts (before, during and after training) by author.

    None if no problem of the arm "tandem" was kept at three evaluations.
    """
    chosen = choose_example(folder)
    if chosen is None:
        return None
    (first, *_, last), during = chosen[0], chosen[0][len(chosen[0]) // 2]
    lines = textwrap.wrap(f"{first['question']} (Answer: {first['gold']})", 3 * COLUMNS)
    # (x, y, text, look): a character is 1 wide, and a line is 1 high.
    texts = [(0, y, line, {}) for y, line in enumerate(lines)]
    for i, (stage, sample) in enumerate(dict(before=first, during=during, after=last).items()):
        x, verdict = i * (COLUMNS + GAP), "right" if sample["right"] else "wrong"
        title = f"{stage}: update {sample['update']}, {verdict}"
        texts.append((x, len(lines) + 0.5, title, {"weight": "bold"}))
        for y, line in enumerate(wrap_spans(sample["spans"], COLUMNS), len(lines) + 2):
            texts += [(x + column, y, text, AUTHORS[author]) for column, author, text in line]
    bottom = max(y for _, y, *_ in texts) + 1.2
    texts.append((0, bottom, "blue: written by the senior", AUTHORS["senior"]))
    texts.append((29, bottom, "on orange: by the junior", AUTHORS["junior"]))
    texts.append((56, bottom, chosen[1], {"color": "#333333"}))
    return save(write_texts(texts, bottom + 0.5), folder / "figures" / "skill-figure1.png")


def write_texts(texts: list[tuple[float, float, str, dict]], bottom: float) -> Figure:
    """Monospaced texts at (x, y)."""
    width, height = 3 * COLUMNS + 2 * GAP, bottom + 0.7
    size = WIDTH * 72 / width / 0.602  # points: a character of the font is 0.602 of its size wide
    figure = plt.figure(figsize=(WIDTH, height * size * 1.5 / 72))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(bottom, -0.7))
    ax.axis("off")
    for x, y, text, look in texts:
        # A dollar sign begins no formula.
        options = dict(family="monospace", fontsize=size, va="center", parse_math=False)
        ax.text(x, y, text, **options, **look)
    return figure


def figure_2(folder: Path, runs: pd.DataFrame, setting: str) -> Path:
    """Accuracy and jargon against updates, tandem training beside standard RL."""
    labels = labels_of(runs.arm, SKILL)
    panels = [(curves_of(runs, labels, metric),) for metric in YLABELS]
    panels += [(curves_of(runs, labels, "accuracy", "tandem"), "senior and junior together")]
    figure, axes = draw_grid([panels], 2.5)
    axes[0, 1].legend()
    return save(figure, folder / "figures" / "skill-figure2.png", runs)


# ------------------------------------------------------------------------------------------------
# Languages, and control

PAIR_NOTE = "Titles: language of the senior → of the junior. Solutions of the senior alone."
NAMES = {"language": SKILL, "pressure-language": PRESSURE}
Pairs = dict[tuple[str, str], pd.DataFrame]  # {(the senior's language, the junior's): runs}


def runs_by_pair(folder: Path, runs: pd.DataFrame) -> Pairs:
    """The runs of each pair of languages, with their arms named without the pair ("tandem")."""
    pairs: dict[tuple[str, str], list] = {}
    for arm, of_arm in runs.groupby("arm", sort=False):
        flags = read_flags(folder, arm)
        pair = flags["senior_language"], flags["junior_language"]
        name = arm.removeprefix(f"{pair[0]}-{pair[1]}-")
        pairs.setdefault(pair, []).append(of_arm.assign(arm=name))
    return {pair: pd.concat(arms) for pair, arms in pairs.items()}


def language_name(code: str) -> str:
    return LANGUAGES[code][0] if code in LANGUAGES else code


def title_of(pair: tuple[str, str]) -> str:
    return " → ".join(map(language_name, pair))


def figure_2_languages(folder: Path, runs: pd.DataFrame, setting: str) -> Path:
    """Figure 2 where senior and junior speak different languages: one column per pair."""
    pairs = runs_by_pair(folder, runs)
    labels = labels_of(pd.concat(pairs.values()).arm, NAMES[setting])
    rows = [
        [(curves_of(runs, labels, metric), title_of(pair)) for pair, runs in pairs.items()]
        for metric in YLABELS
    ]
    figure, axes = draw_grid(rows, 1.9, sharex=True, sharey=True)
    add_legend(axes[1, 0], axes.flat)
    return save(figure, folder / "figures" / f"{setting}-figure2.png", runs, PAIR_NOTE)


def figure_3(folder: Path, runs: pd.DataFrame, setting: str) -> Path:
    """The languages of the senior's solutions: one column per pair, one row per way of training."""
    others = [code for code in tables.languages_in(runs) if code not in LANGUAGES]
    languages = LANGUAGES | {code: (code, style) for code, style in zip(others, STYLES[5:])}
    pairs, rows = runs_by_pair(folder, runs), []
    for arm, (label, _) in labels_of(pd.concat(pairs.values()).arm, NAMES[setting]).items():
        rows.append([])
        for pair, of_pair in pairs.items():
            of_arm = of_pair[of_pair.arm == arm]
            spoken = languages.items() if len(of_arm) else ()
            curves = [(of_arm, "senior", f"languages.{code}", *look) for code, look in spoken]
            rows[-1].append((curves, title_of(pair), False, f"{label}:\nsolutions (%)"))
    figure, axes = draw_grid(rows, max(1.9, 2.6 / len(rows)), sharex=True, sharey=True)
    add_legend(axes[0, -1], axes.flat, loc="center right")
    return save(figure, folder / "figures" / f"{setting}-figure3.png", runs, PAIR_NOTE)


def figure_control(folder: Path, runs: pd.DataFrame, setting: str) -> Path:
    """Is it the reward that changes the senior, or would it imitate its junior anyway?"""
    pairs, rows = runs_by_pair(folder, runs), []
    labels = labels_of(pd.concat(pairs.values()).arm, CONTROL)
    for (senior, junior), of_pair in pairs.items():
        title, spoken = title_of((senior, junior)), labels if senior != junior else {}
        rows.append([(curves_of(of_pair, labels, "jargon"), title, False)])
        rows[-1] += [(curves_of(of_pair, labels, "accuracy"), title)]
        rows[-1] += [(curves_of(of_pair, spoken, f"languages.{junior}"), title, False)]
        rows[-1][-1] += (f"solutions in {language_name(junior)} (%)",)
    figure, axes = draw_grid(rows, 2.2)
    # The legend stands in the place of a panel if one is free.
    free = [ax for ax in axes.flat if not ax.lines] or [axes[0, 0]]
    add_legend(free[0], axes.flat, loc="center")
    return save(figure, folder / "figures" / "control.png", runs, PAIR_NOTE)


# ------------------------------------------------------------------------------------------------
# Granularity

ORDER = ["token", "word", "redraw", "sentence", "paragraph"]  # from many handoffs to few


def groups_of(folder: Path, runs: pd.DataFrame) -> list[dict[str, str]]:
    """{arm: label} of the arms to compare by schedule (p = 0.5), and by p (mostly of "word").

    Arms whose numbers are all equal share a label such as "sentence = paragraph": in the tiny world
    every sentence is one line.
    """
    flags = {arm: read_flags(folder, arm) for arm in runs.arm.unique()}
    schedule = {arm: flags[arm]["handoff"] for arm in flags}
    p = {arm: 1.0 if flags[arm]["solo"] else flags[arm]["p"] for arm in flags}
    place = {arm: [*ORDER, schedule[arm]].index(schedule[arm]) for arm in flags}
    by_p, equal = {}, {}  # {arm: label}, {all numbers of an arm: {arm: schedule}}
    for arm in sorted(flags, key=lambda arm: (p[arm], place[arm])):
        if p[arm] == 0.5:
            numbers = runs[(runs.arm == arm) & ~runs.metric.str.startswith("seconds")]
            key = numbers.drop(columns="arm").to_csv(index=False)
            equal.setdefault(key, {})[arm] = schedule[arm]
        if p[arm] != 0.5 or schedule[arm] == "word":
            other = "" if schedule[arm] == "word" else f", {schedule[arm]}"
            by_p[arm] = f"p = {p[arm]:g}{other}"
    by_schedule = {[*same][0]: " = ".join(same.values()) for same in equal.values()}
    return [by_schedule, by_p if any(p[arm] != 0.5 for arm in by_p) else {}]


def figure_granularity(folder: Path, runs: pd.DataFrame, setting: str) -> Path:
    """Jargon, accuracy and handoffs by schedule (upper row), and by the probability p (lower)."""
    groups, rows = [labels_of(group, group) for group in groups_of(folder, runs) if group], []
    for labels in groups:
        rows.append([(curves_of(runs, labels, "jargon"), "senior alone", False)])
        rows[-1] += [(curves_of(runs, labels, "accuracy"),), ([],)]
    figure, axes = draw_grid(rows, 2.3)
    for row, labels in zip(axes, groups):
        row[0].legend()
        draw_handoffs(row[2], folder, tables.handoffs_of(runs).loc[[*labels]], labels)
    note = "Dashed line: junior alone."
    return save(figure, folder / "figures" / "granularity.png", runs, note)


def draw_handoffs(ax: Axes, folder: Path, handoffs: pd.DataFrame, labels: dict) -> None:
    """Handoffs per joint rollout before training: none in the training of a senior alone."""
    handoffs = handoffs[[not read_flags(folder, arm)["solo"] for arm in labels]]
    names = [textwrap.fill(label, 11, break_long_words=False) for label, _ in labels.values()]
    ax.axis("on")
    bars, x = handoffs.reindex([*labels], fill_value=0), range(len(names))
    ax.bar(x, bars.handoffs, color=SKY, label="all")
    ax.bar(x, bars.handoffs_inside, color=BLUE, label="inside an expression")
    # Room for the legend above the bars.
    ax.set(ylim=(0, 1.45 * ax.get_ylim()[1]), ylabel="handoffs per rollout")
    ax.set_xticks(x, names, fontsize=6.5)
    ax.set_title("together, before training")
    ax.legend(loc="upper right")


# ------------------------------------------------------------------------------------------------
# Sweep


def cells_in(arms: Iterable[str], prefix: str = "") -> dict[tuple[float, float], str]:
    """{(c, j): arm} for arms such as "c-0.3-j0.2", or "test-c0-j1" on test problems.

    The largest c comes first.
    """
    found = {arm: re.fullmatch(rf"{prefix}c(-?[\d.]+)-j([\d.]+)", arm) for arm in arms}
    cells = {(float(match[1]), float(match[2])): arm for arm, match in found.items() if match}
    return dict(sorted(cells.items(), reverse=True))


def read_cells(folder: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """A row per (c, j): updates and joint accuracy at the end, and updates until jargon is gone.

    They are nan where training diverged in any seed.
    """
    rows = []
    for (c, j), arm in cells_in(runs.arm.unique()).items():
        of_arm = runs[runs.arm == arm]
        end = pooled(of_arm, "tandem", "accuracy").iloc[-1]
        row = end.name, end.value, tables.updates_until(of_arm, tables.LOW_JARGON)
        rows.append((c, j, *([nan] * 3 if any((folder / arm).glob("seed-*/stopped.txt")) else row)))
    return pd.DataFrame(rows, columns=["c", "j", "updates", "accuracy", "until"])


def best_cell(folder: str | Path) -> tuple[float, float] | None:
    """(c, j) with the best joint accuracy on validation problems; of equals, c nearest to 0.

    Only arms that have reached the last update and have not diverged count; None without one.
    """
    cells = read_cells(Path(folder), read_runs(folder, cells_in(arms_in(Path(folder))).values()))
    finished = cells[cells.updates == cells.updates.max()]
    return tuple(cells.loc[finished.accuracy.idxmax(), ["c", "j"]]) if len(finished) else None


def figure_sweep(folder: Path, runs: pd.DataFrame, setting: str) -> Path:
    """Validation problems (upper row): a number for each c and j. Test problems: curves."""
    labels, together = {}, {}
    for ((c, j), arm), style in zip(cells_in(runs.arm.unique(), "test-").items(), cycle(STYLES)):
        main = " (main)" if (c, j) == (0, 1) else ""
        labels[arm] = f"c = {c:g}, j = {j:g}{main}, senior alone", style
        together[arm] = f"c = {c:g}, j = {j:g}, together", style | {"marker": "x"}
    accuracy = curves_of(runs, labels, "accuracy") + curves_of(runs, together, "accuracy", "tandem")
    tests = [(accuracy, "test problems"), (curves_of(runs, labels, "jargon"), "test problems")]
    figure, axes = draw_grid([[([],), ([],)], tests], 2.5)
    cells, best = read_cells(folder, runs), best_cell(folder)
    heat_map(axes[0, 0], cells.assign(value=cells.accuracy), best, "viridis")
    heat_map(axes[0, 1], cells.assign(value=cells.until), best, "viridis_r")
    axes[0, 0].set_title("joint validation accuracy at the end (%)")
    axes[0, 1].set_title(f"updates until jargon is under {tables.LOW_JARGON:g} %")
    note = "Red frame: best joint validation accuracy."
    if labels:
        note += " That cell and the main one were trained again with other seeds: lower row."
        for ax in axes[1]:
            ax.legend()
    return save(figure, folder / "figures" / "sweep.png", runs, note)


def heat_map(ax: Axes, cells: pd.DataFrame, best: tuple | None, colours: str) -> None:
    """A coloured grid of c against j with its value in each cell and a frame around the best."""
    if cells.empty:
        return
    grid = cells.pivot(index="c", columns="j", values="value").iloc[::-1]
    ax.imshow(grid, cmap=colours, aspect="auto", alpha=0.6)
    for cell in cells.itertuples():
        x, y = grid.columns.get_loc(cell.j), grid.index.get_loc(cell.c)
        text = "never" if isnan(cell.value) else f"{cell.value:.1f}".removesuffix(".0")
        ax.text(x, y, "diverged" if isnan(cell.updates) else text, ha="center", va="center")
        if (cell.c, cell.j) == best:
            frame = dict(fill=False, edgecolor=RED, linewidth=2)
            ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, **frame))
    ax.set_xticks(range(len(grid.columns)), [f"{j:g}" for j in grid.columns])
    ax.set_yticks(range(len(grid)), [f"{c:g}" for c in grid.index])
    ax.set(xlabel="j, weight of the junior's tokens", ylabel="c, weight of wrong rollouts")
    ax.axis("on")
    ax.grid(False)


# ------------------------------------------------------------------------------------------------
# Pressure, and the measures of Tandem RL

DOSE_STYLES = [(SKY, "P"), (BLUE, "X"), ("#00304D", "*")]  # from light to dark
MEASURES = {
    "solo": "solo accuracy\n(%)",
    "handoff": "handoff robustness\n(%)",
    "drift": "drift from the junior\n(nats per token)",
    "legibility": "legibility: cross-entropy\n(nats per token)",
}


def figure_pressure(folder: Path, runs: pd.DataFrame, setting: str) -> Path:
    """Jargon and accuracy against updates, and how fast jargon goes by how much it costs."""
    labels, doses = labels_of(runs.arm, PRESSURE), tables.read_doses(folder)
    rows = [[(curves_of(runs, labels, "jargon"), "senior alone", False)]]
    rows[0] += [(curves_of(runs, labels, "accuracy"),)]
    rows += [[(curves_of(runs, labels, "accuracy", "tandem"), "senior and junior together"), ([],)]]
    figure, axes = draw_grid(rows, 2.5)
    add_legend(figure, axes.flat, loc="outside upper center", ncols=3)
    if len(doses):
        draw_doses(axes[1, 1], doses)
    note = "Lower right: one point per seed." if len(doses) else ""
    return save(figure, folder / "figures" / "pressure.png", runs, note)


def draw_doses(ax: Axes, doses: pd.DataFrame) -> None:
    """A point per seed: the cost of jargon before training, and the updates until it is low.

    A seed whose jargon is not low at the last update is at the top; one that has not been trained
    as long is not drawn.
    """
    ax.axis("on")
    last = doses["update"][doses.who == "senior"].max()
    top = 1.35 * last or 1.0
    for (share, of_share), (colour, marker) in zip(doses.groupby("arm"), cycle(DOSE_STYLES)):
        costs, until, ends = zip(*tables.costs_and_updates(of_share))
        y = [top if isnan(low) and end == last else low for low, end in zip(until, ends)]
        look = dict(color=colour, markersize=6, alpha=0.6)
        ax.plot(costs, y, marker, label=f"{100 * share:g} %", **look)
    ticks = list(range(0, last + 1, max(1, last // 4)))
    ax.set_yticks([*ticks, top], [*map(str, ticks), f"not\nwithin {last}"])
    # Room for the legend above the points.
    ax.set(ylim=(-0.05 * top, 1.55 * top), title="GRPO, tandem, by base")
    ax.set_xlabel("cost of jargon before training (points of accuracy)")
    ax.set_ylabel(f"updates until jargon < {tables.LOW_JARGON:g} %")
    seen = "annotated solutions that the base has seen"
    ax.legend(loc="upper center", ncols=3, title=seen, title_fontsize=7)


def figure_rlvr(folder: Path, runs: pd.DataFrame, setting: str) -> Path | None:
    """Four measures at the last update (upper row) and against updates; None without measures."""
    measured = tables.read_measures(folder, runs.arm.unique())
    if measured.empty:
        return None
    labels, ends = labels_of(measured.arm, RLVR), measured[measured.finished]
    figure, axes = plt.subplots(2, len(MEASURES), figsize=(WIDTH, 4.2), layout="constrained")
    for (upper, lower), (name, title) in zip(axes.T, MEASURES.items()):
        for x, (arm, (label, style)) in enumerate(labels.items()):
            draw_end(upper, x, ends.problems[ends.arm == arm], name, style)
            of_arm = measured[measured.arm == arm]
            scale = 1 if name in tables.IN_NATS else 100
            means = of_arm.assign(value=[scale * table[name].mean() for table in of_arm.problems])
            course = means.pivot(index="update", columns="seed", values="value")
            draw_lines(lower, course, course.dropna().mean(axis=1), label, style)
        when = f"update {ends['update'].max()}" if len(ends) else "no run has finished"
        upper.set(xlim=(-0.7, len(labels) - 0.3), xticks=[], xlabel=when)
        upper.set_title(title, fontsize=7)
        lower.set_xlabel("updates")
    add_legend(figure, axes[1], loc="outside upper center", ncols=4)
    caption = f"Seeds per arm: {seed_counts(measured)}. Small points and thin lines are single "
    caption += "seeds, markers and thick lines means over all seeds. Bars: 95 % bootstrap "
    caption += f"intervals over seeds and problems. {tables.unfinished(measured)}"
    return save(figure, folder / "figures" / "rlvr.png", caption=caption)


def draw_end(ax: Axes, x: float, ends: pd.Series, name: str, style: dict) -> None:
    """A measure at the last update: a bar for its interval, and beside it a point per seed."""
    if len(ends):
        value, (low, high), seeds = tables.estimate(ends, name)
        ax.vlines(x, low, high, color=style["color"], linewidth=1.5)
        ax.plot([x], [value], style["marker"], color=style["color"], markersize=4.5)
        ax.plot([x - 0.3] * len(seeds), seeds, ".", color=style["color"], markersize=4, alpha=0.5)


# ------------------------------------------------------------------------------------------------
# Everything

FIGURES = {"skill": [figure_1, figure_2], "granularity": [figure_granularity]}
FIGURES |= dict.fromkeys(["language", "pressure-language"], [figure_2_languages, figure_3])
FIGURES |= {"control": [figure_control], "sweep": [figure_sweep], "pressure": [figure_pressure]}
FIGURES |= {"rlvr": [figure_rlvr]}
# What is printed after the table of a setting.
TABLES = {"granularity": tables.table_of_handoffs, "pressure": tables.table_of_doses}
TABLES["rlvr"] = tables.table_of_measures


def arms_of(folder: Path, setting: str) -> list[str]:
    """The arms of a setting; of the sweep also those on test problems that lie in the folder."""
    tests = cells_in(arms_in(folder), "test-").values() if setting == "sweep" else []
    return [*SETTINGS[setting], *tests]


def draw(folder: Path, setting: str) -> None:
    """Draw the figures of one setting into folder/figures/ and print its tables."""
    arms = arms_of(folder, setting)
    runs = read_runs(folder, arms)
    everybody = "senior, junior and both together"
    if runs.empty:
        print(f"{folder}: no arm of {setting} has evaluated {everybody}: there is nothing to draw")
        return
    for arm in arms_in(folder):
        if arm in arms and arm not in set(runs.arm):
            print(f"{folder / arm} is left out: not every seed has evaluated {everybody}")
    further = TABLES[setting](folder, runs) if setting in TABLES else None
    print("\n\n".join(filter(None, [tables.table(runs), further])))
    if setting not in FIGURES:
        print(f"{setting} has no figure: add a function to FIGURES in lab/figures.py")
    for draw_figure in FIGURES.get(setting, []):
        path = draw_figure(folder, runs, setting)
        if path:
            print(path)


def draw_all(folder: Path, settings: Iterable[str]) -> None:
    """Draw the figures of these settings, and the page of all rollouts in the folder."""
    for setting in settings:
        draw(folder, setting)
    viewer.draw_page(folder)


def main(folder: str) -> None:
    """Draw every setting of which the folder holds an arm; in one line, what cannot be used."""
    place, present = Path(folder), arms_in(Path(folder))
    known = {setting: set(arms_of(place, setting)) for setting in SETTINGS}
    settings = [setting for setting, arms in known.items() if arms & set(present)]
    if not settings:
        remedy = "run run_gsm8k.py first, or name its --out folder"
        sys.exit(f"{folder} has no <arm>/seed-<k>/metrics.jsonl of a known setting: {remedy}")
    with errors_in_one_line():
        draw_all(place, settings)
    for arm in set(present) - set.union(*known.values()):
        print(f"{place / arm} is in no setting of lab/experiments.py and is not drawn")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
