"""Every figure and table, drawn from the rows that runs have written, and from nothing else:  python -m lab.figures RUNS

RUNS is the folder that run_gsm8k.py writes: RUNS/<arm>/seed-<k>/metrics.jsonl has one row per update, samples.jsonl has some rollouts
and measures.jsonl (with --measures) one number per problem. A setting is a list of arms that are compared. Its figures are written
to RUNS/figures/, each as PNG and as PDF:

    skill         skill-figure1 (three rollouts of one problem), skill-figure2 (accuracy and jargon)
    language      language-figure2 (accuracy and jargon), language-figure3 (the language of the solutions), one column per pair
    granularity   granularity: jargon, accuracy and handoffs by schedule, and by the probability p of the senior
    control       control: is it the reward that changes the senior, or imitation?
    sweep         sweep: the weights c (of wrong rollouts) and j (of the junior's tokens)
    pressure, pressure-language, rlvr      see lab/figures_rl.py
    all of them   rollouts.html: a page on which to see who wrote what (lab/viewer.py)

How seeds are pooled, and what the intervals and the thin lines are, stands at the top of lab/curves.py.
This file neither loads a model nor computes a metric.
"""

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle, groupby
from math import isnan, nan
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from lab import viewer
from lab.curves import (
    BLUE,
    RED,
    SKY,
    STYLES,
    WIDTH,
    Point,
    Rows,
    Runs,
    Style,
    add_caption_and_save,
    add_legend,
    draw_arms,
    draw_curve,
    draw_junior,
    is_sample,
    labels_and_styles,
    markdown_table,
    pooled,
    read_checked,
    read_flags,
    read_runs,
    save,
    updates_until,
    with_interval,
)
from lab.figures_rl import (
    PRESSURE_ARMS,
    figure_pressure,
    figure_rlvr,
    table_of_differences,
    table_of_doses,
    table_of_measures,
)
from lab.runs import seed_folders
from metrics import has_jargon

# The known languages, and the styles of any other one.
LANGUAGE_STYLES = {"en": ("English", STYLES[0]), "de": ("German", STYLES[3]), "fr": ("French", STYLES[4])}
OTHER_LANGUAGE_STYLES = [STYLES[1], STYLES[2], *STYLES[5:]]

# ----------------------------------------------------------------------------------------------------------------------
# Skill. A function below that is named after a figure draws it and returns the path of the PNG.

SKILL_ARMS = {"tandem": "tandem training", "solo": "standard RL"}
COLUMNS, GAP = 40, 2  # characters: the width of each of figure 1's three columns, and the space between them
AUTHOR_LOOK = {
    "senior": {"color": BLUE},
    "junior": {"color": "#8A3D00", "bbox": {"facecolor": "#FFE3B3", "edgecolor": "none", "pad": 0.6}},
}


def figure_1(folder: Path, runs: Runs) -> Path | None:
    """One problem and three joint rollouts (before, during and after training), each span coloured by its author.

    None if the arm "tandem" has no problem whose rollout was kept at three evaluations.
    """
    chosen = choose_example([path / "samples.jsonl" for path in seed_folders(folder, "tandem") if (path / "samples.jsonl").is_file()])
    if chosen is None:
        return None
    rollouts, reason = chosen
    updates = sorted(rollouts)
    stages = {"before": updates[0], "during": updates[len(updates) // 2], "after": updates[-1]}

    # An invisible coordinate system in which a character is 1 wide and a line is 1 high.
    question = textwrap.wrap(f"{rollouts[updates[0]]['question']} (Answer: {rollouts[updates[0]]['gold']})", 3 * COLUMNS)
    texts = {stage: wrap_spans(rollouts[update]["spans"], COLUMNS) for stage, update in stages.items()}
    width, height = 3 * COLUMNS + 2 * GAP, max(map(len, texts.values())) + len(question) + 3
    font_size = WIDTH * 72 / width / 0.602  # points: a character of DejaVu Sans Mono is 0.602 of its size wide
    figure = plt.figure(figsize=(WIDTH, height * font_size * 1.5 / 72))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height - 0.3, -0.7))
    ax.axis("off")

    # The question, the three rollouts beside each other, and the legend.
    for y, line in enumerate(question):
        write_text(ax, 0, y, line, font_size)
    for i, (stage, update) in enumerate(stages.items()):
        left, verdict = i * (COLUMNS + GAP), "right" if rollouts[update]["reward"] == 1 else "wrong"
        write_text(ax, left, len(question) + 0.5, f"{stage}: update {update}, {verdict}", font_size, weight="bold")
        for y, line in enumerate(texts[stage]):
            for x, author, text in line:
                write_text(ax, left + x, len(question) + 2 + y, text, font_size, **AUTHOR_LOOK[author])
    write_text(ax, 0, height - 0.8, "blue: written by the senior", font_size, **AUTHOR_LOOK["senior"])
    write_text(ax, 29, height - 0.8, "on orange: by the junior", font_size, **AUTHOR_LOOK["junior"])
    write_text(ax, 56, height - 0.8, reason, font_size, color="#333333")
    return save(figure, folder / "figures" / "skill-figure1.png")


def write_text(ax: Axes, x: float, y: float, text: str, font_size: float, **look) -> None:
    """Monospaced text, in which dollar signs are not read as TeX."""
    ax.text(x, y, text, family="monospace", fontsize=font_size, va="center", ha="left", parse_math=False, **look)


def choose_example(files: list[Path]) -> tuple[dict[int, dict], str] | None:
    """The joint rollouts of one problem, {update: sample}, and the reason for choosing it; None if there is no candidate.

    Candidates are the problems with samples of at least three evaluations, in the order of the files. First choice is one that was
    wrong and had jargon before training and was right after it, then one that has lost its jargon, then one that was wrong before
    and right after it, then any.
    """
    candidates = []
    for path in files:
        by_question: dict[str, dict[int, dict]] = {}
        for sample in read_checked(path, is_sample):
            if sample["who"] == "tandem":
                by_question.setdefault(sample["question"], {})[sample["update"]] = sample
        candidates += [samples for samples in by_question.values() if len(samples) >= 3]
    corrected = [samples for samples in candidates if samples[min(samples)]["reward"] < samples[max(samples)]["reward"]]
    with_jargon = [samples for samples in corrected if sample_has_jargon(samples[min(samples)])]
    lost_jargon = [s for s in candidates if sample_has_jargon(s[min(s)]) and not sample_has_jargon(s[max(s)])]
    for samples, reason in (
        (with_jargon, "Chosen: the first with <<...>> that went from wrong to right"),
        (lost_jargon, "Chosen: the first that lost its <<...>>"),
        (corrected, "Chosen: the first that went from wrong to right"),
        (candidates, "The first sample"),
    ):
        if samples:
            return samples[0], reason
    return None


def sample_has_jargon(sample: dict) -> bool:
    return has_jargon("".join(text for _, text in sample["spans"]))


def wrap_spans(spans: Iterable[tuple[str, str]], columns: int) -> list[list[tuple[int, str, str]]]:
    """Wrap a rollout of (author, text) spans into lines of (column, author, text), at spaces where there are any.

    >>> wrap_spans([("senior", "She sel"), ("junior", "ls 5")], columns=8)
    [[(0, 'senior', 'She')], [(0, 'senior', 'sel'), (3, 'junior', 'ls 5')]]
    """
    characters = [(character, author) for author, text in spans for character in text]
    lines: list[list[tuple[str, str]]] = [[]]
    start = 0
    # A word is a line break, or up to `columns` characters with the space before them.
    for word in re.findall(rf"\n|\s?\S{{1,{columns - 1}}}|\s", "".join(character for character, _ in characters)):
        pairs = characters[start : start + len(word)]
        start += len(word)
        if word == "\n" or len(lines[-1]) + len(word) > columns:
            lines.append([])
        if not lines[-1]:
            # A line begins without a space, and without the line break that opened it.
            pairs = [pair for pair in pairs if not pair[0].isspace()]
        lines[-1] += pairs
    return [merge_characters(line) for line in lines]


def merge_characters(line: list[tuple[str, str]]) -> list[tuple[int, str, str]]:
    """From a line of (character, author) to its spans (column, author, text)."""
    spans, column = [], 0
    for author, pairs in groupby(line, key=lambda pair: pair[1]):
        text = "".join(character for character, _ in pairs)
        spans.append((column, author, text))
        column += len(text)
    return spans


def figure_2(folder: Path, runs: Runs) -> Path:
    """Accuracy and jargon against updates, tandem training beside standard RL."""
    panels = [
        ("senior", "accuracy", "accuracy (%)", "senior alone"),
        ("senior", "jargon", "solutions with jargon (%)", "senior alone"),
        ("tandem", "accuracy", "accuracy (%)", "senior and junior together"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.5), layout="constrained")
    for ax, (who, metric, ylabel, title) in zip(axes, panels):
        draw_arms(ax, runs, labels_and_styles(runs, SKILL_ARMS), who, metric)
        draw_junior(ax, runs, metric)
        ax.set(xlabel="updates", ylabel=ylabel, title=title)
    axes[1].legend()
    return add_caption_and_save(figure, runs, folder / "figures" / "skill-figure2.png")


# ----------------------------------------------------------------------------------------------------------------------
# Languages

PAIR_NOTE = "Titles: language of the senior → language of the junior. Solutions of the senior alone."


def runs_by_pair(folder: Path, runs: Runs) -> dict[str, Runs]:
    """{pair: {name: seeds}}: the arms of each pair of languages (senior-junior, as in "de-fr"), named without the pair."""
    pairs: dict[str, Runs] = {}
    for arm, seeds in runs.items():
        flags = read_flags(folder, arm)
        pair = f"{flags['senior_language']}-{flags['junior_language']}"
        name = arm.removeprefix(f"{pair}-")
        if name in pairs.setdefault(pair, {}):
            # "de-fr-mine" and "mine" may both be of this pair.
            name = arm
        pairs[pair][name] = seeds
    return pairs


def language_name(code: str) -> str:
    return LANGUAGE_STYLES[code][0] if code in LANGUAGE_STYLES else code


def title_of(pair: str) -> str:
    senior, junior = pair.split("-")
    return f"{language_name(senior)} → {language_name(junior)}"


def names_of(pairs: dict[str, Runs], known: dict[str, str]) -> list[str]:
    """The names of the arms of all pairs, each once: the known ones first."""
    names = dict.fromkeys(name for runs in pairs.values() for name in runs)
    return [name for name in known if name in names] + [name for name in names if name not in known]


def figure_2_languages(folder: Path, runs: Runs, known: dict[str, str] = SKILL_ARMS, setting: str = "language") -> Path:
    """Figure 2 where senior and junior speak different languages: one column per pair."""
    pairs = runs_by_pair(folder, runs)
    labels = labels_and_styles(names_of(pairs, known), known)
    figure, axes = plt.subplots(2, len(pairs), figsize=(WIDTH, 3.8), layout="constrained", sharey=True, sharex=True, squeeze=False)
    for column, (pair, arms) in zip(axes.T, pairs.items()):
        column[0].set_title(title_of(pair))
        for ax, metric in zip(column, ("accuracy", "jargon")):
            draw_arms(ax, arms, labels, "senior", metric)
            draw_junior(ax, arms, metric)
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[1, 0].set_ylabel("solutions with jargon (%)")
    label_updates(axes)
    add_legend(axes[1, 0], axes.flat)
    return add_caption_and_save(figure, runs, folder / "figures" / f"{setting}-figure2.png", PAIR_NOTE)


def label_updates(axes) -> None:
    """Label the x axes of the lowest row. The blank labels above it keep all panels of equal height."""
    for ax in axes.flat:
        ax.set_xlabel(" ")
    for ax in axes[-1]:
        ax.set_xlabel("updates")


def figure_3(folder: Path, runs: Runs, known: dict[str, str] = SKILL_ARMS, setting: str = "language") -> Path:
    """The languages of the senior's solutions against updates: one column per pair, one row for each way of training."""
    pairs = runs_by_pair(folder, runs)
    names, languages = names_of(pairs, known), languages_to_draw(runs)
    # A single row needs room for its label.
    size = (WIDTH, max(2.6, 1.9 * len(names)))
    figure, axes = plt.subplots(len(names), len(pairs), figsize=size, layout="constrained", sharey=True, sharex=True, squeeze=False)
    for column, (pair, arms) in zip(axes.T, pairs.items()):
        column[0].set_title(title_of(pair))
        for ax, name in zip(column, names):
            if name in arms:
                for code, (language, style) in languages.items():
                    draw_curve(ax, arms[name], "senior", f"languages.{code}", style, language)
    for ax, name in zip(axes[:, 0], names):
        ax.set_ylabel(f"{known.get(name, name)}:\nsolutions (%)")
    label_updates(axes)
    add_legend(axes[0, -1], axes.flat, loc="center right")
    return add_caption_and_save(figure, runs, folder / "figures" / f"{setting}-figure3.png", PAIR_NOTE)


def languages_to_draw(runs: Runs) -> dict[str, tuple[str, Style]]:
    """{code: (name, style)}: the known languages, and any other one in which a senior has written a solution."""
    written = {code for seeds in runs.values() for code in languages_written(seeds)}
    others = zip(sorted(written - set(LANGUAGE_STYLES)), cycle(OTHER_LANGUAGE_STYLES))
    return LANGUAGE_STYLES | {code: (code, style) for code, style in others}


def languages_written(seeds: list[Rows]) -> list[str]:
    """The codes of the languages in which the senior has written, in alphabetical order."""
    return sorted({code for evaluation in senior_evaluations(seeds) for code in evaluation["languages"]})


def senior_evaluations(seeds: list[Rows]) -> list[dict]:
    return [row["eval"]["senior"] for rows in seeds for row in rows if "senior" in row.get("eval", {})]


# ----------------------------------------------------------------------------------------------------------------------
# Granularity

SCHEDULE_ORDER = ("token", "word", "redraw", "sentence", "paragraph")  # from many handoffs to few


def figure_granularity(folder: Path, runs: Runs) -> Path:
    """Jargon, accuracy and handoffs by schedule (upper row) and by the probability p of the senior (lower row)."""
    flags = {arm: read_flags(folder, arm) for arm in runs}
    groups = [merge_equal(runs, distinct_labels(schedule_labels(flags))), distinct_labels(probability_labels(flags))]
    groups = [group for group in groups if group]
    figure, axes = plt.subplots(len(groups), 3, figsize=(WIDTH, 2.3 * len(groups)), layout="constrained", squeeze=False)
    for row, group in zip(axes, groups):
        of_group = {label: runs[arm] for label, arm in group.items()}
        solo = {label for label, arm in group.items() if flags[arm]["solo"]}
        for ax, metric, ylabel in zip(row, ("jargon", "accuracy"), ("solutions with jargon (%)", "accuracy (%)")):
            draw_arms(ax, of_group, labels_and_styles(of_group, {}), "senior", metric)
            ax.set(xlabel="updates", ylabel=ylabel, title="senior alone")
        row[0].legend()
        draw_junior(row[1], runs, "accuracy")
        draw_handoffs(row[2], of_group, solo)
    return add_caption_and_save(figure, runs, folder / "figures" / "granularity.png", "Dashed line: junior alone.")


def probability_of(flags: dict) -> float:
    """The probability with which a coin names the senior in training."""
    return 1.0 if flags["solo"] else flags["p"]


def schedule_labels(flags: dict[str, dict]) -> dict[str, str]:
    """{arm: schedule} of the arms with p = 0.5, a schedule that is not in SCHEDULE_ORDER last."""
    arms = [arm for arm in flags if probability_of(flags[arm]) == 0.5]
    order = [*SCHEDULE_ORDER, *(flags[arm]["handoff"] for arm in arms)]
    return {arm: flags[arm]["handoff"] for arm in sorted(arms, key=lambda arm: order.index(flags[arm]["handoff"]))}


def probability_labels(flags: dict[str, dict]) -> dict[str, str]:
    """{arm: "p = 0.25"} of the arms with another p than 0.5, and of those with p = 0.5 that have the schedule of one of them."""
    schedules = {flags[arm]["handoff"] for arm in flags if probability_of(flags[arm]) != 0.5}
    labels = {}
    for arm in sorted(flags, key=lambda arm: probability_of(flags[arm])):
        if flags[arm]["handoff"] in schedules:
            labels[arm] = f"p = {probability_of(flags[arm]):g}"
            if len(schedules) > 1 and not flags[arm]["solo"]:
                labels[arm] += f", {flags[arm]['handoff']}"
    return labels


def distinct_labels(labels: dict[str, str]) -> dict[str, str]:
    """From {arm: label} to {label: arm}. Arms that would share a label have their names added to it."""
    given = list(labels.values())
    return {label if given.count(label) == 1 else f"{label} ({arm})": arm for arm, label in labels.items()}


def merge_equal(runs: Runs, arms: dict[str, str]) -> dict[str, str]:
    """{label: arm}, where arms whose rows are equal in every number but the seconds share one label, such as "token = word".

    Two schedules may give identical rollouts: in the tiny world nearly every word is one token and every sentence one line.
    """
    equal: dict[str, list[str]] = {}  # {all numbers of an arm: the labels of the arms that have them}
    for label, arm in arms.items():
        numbers = [[{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows] for rows in runs[arm]]
        equal.setdefault(json.dumps(numbers), []).append(label)
    return {" = ".join(labels): arms[labels[0]] for labels in equal.values()}


def draw_handoffs(ax: Axes, runs: Runs, solo: set[str]) -> None:
    """Bars: the mean number of handoffs per joint rollout before training.

    It is 0 for the arms in `solo`, whose senior is trained alone, though their evaluation of the pair has handoffs.
    """
    for metric, colour, label in (("handoffs", SKY, "all"), ("handoffs_inside", BLUE, "inside an expression")):
        heights = [0.0 if arm in solo else pooled(seeds, "tandem", metric)[0].value for arm, seeds in runs.items()]
        ax.bar(range(len(runs)), heights, color=colour, label=label)
    # Room for the legend above the bars.
    ax.set(ylabel="handoffs per rollout", title="together, before training", ylim=(0, 1.45 * ax.get_ylim()[1]), xlabel=" ")
    # The no-break space keeps "= 0.25" on one line when a label such as "p = 0.25, redraw" is wrapped.
    names = [textwrap.fill(label.replace("= ", "=\N{NO-BREAK SPACE}"), 11, break_long_words=False) for label in runs]
    ax.set_xticks(range(len(runs)), names, fontsize=6.5)
    ax.legend(loc="upper right")


# The numbers of metrics.count_handoffs, and what the table calls them.
HANDOFFS = {"handoffs": "handoffs", "handoffs_inside": "inside an expression", "handoffs_in_words": "inside a word"}
HANDOFFS |= {"handoffs_in_numbers": "inside a number"}


def table_of_handoffs(folder: Path, runs: Runs) -> str:
    """A Markdown table with a row per arm: handoffs per joint rollout before training, and where they are.

    Runs that were made before words and numbers were told apart have no numbers in the last columns.
    """
    rows = []
    for arm, seeds in runs.items():
        counts = [[of_seed[0]["eval"]["tandem"].get(name) for of_seed in seeds] for name in HANDOFFS]
        rows.append([arm, *("–" if None in values else f"{sum(values) / len(values):.1f}" for values in counts)])
    return markdown_table(["arm, together before training", *HANDOFFS.values()], rows)


# ----------------------------------------------------------------------------------------------------------------------
# Control

CONTROL_ARMS = {
    "tandem": "true rewards, j = 1 (main)",
    "shuffled": "shuffled rewards, j = 1",
    "senior-only": "true rewards, j = 0",
}


def figure_control(folder: Path, runs: Runs) -> Path:
    """Is it the reward that changes the senior, or would it imitate its junior anyway? One row per pair of languages."""
    pairs = runs_by_pair(folder, runs)
    labels = labels_and_styles((name for arms in pairs.values() for name in arms), CONTROL_ARMS)
    figure, axes = plt.subplots(len(pairs), 3, figsize=(WIDTH, 2.2 * len(pairs)), layout="constrained", squeeze=False)
    unused = []
    for row, (pair, arms) in zip(axes, pairs.items()):
        senior, junior = pair.split("-")
        panels = [("jargon", "solutions with jargon (%)"), ("accuracy", "accuracy (%)")]
        if senior != junior:
            panels.append((f"languages.{junior}", f"solutions in {language_name(junior)} (%)"))
        for ax, (metric, ylabel) in zip(row, panels):
            draw_arms(ax, arms, labels, "senior", metric)
            ax.set(xlabel="updates", ylabel=ylabel, title=title_of(pair))
        draw_junior(row[1], arms, "accuracy")
        unused += list(row[len(panels) :])
    for ax in unused:
        ax.axis("off")
    # The legend stands in the place of a panel if one is free.
    add_legend(unused[0] if unused else axes[0, 0], axes.flat, loc="center")
    return add_caption_and_save(figure, runs, folder / "figures" / "control.png", PAIR_NOTE)


# ----------------------------------------------------------------------------------------------------------------------
# Sweep

Cell = tuple[float, float]  # (c, j): the weight of wrong rollouts, the weight of the junior's tokens


def cells_of(arms: Iterable[str], prefix: str = "") -> dict[Cell, str]:
    """{(c, j): arm} for the arms of the grid, such as "c-0.3-j0.2", or with the prefix "test-" for those on test problems."""
    matches = {arm: re.fullmatch(re.escape(prefix) + r"c(-?[\d.]+)-j([\d.]+)", arm) for arm in arms}
    return {(float(match[1]), float(match[2])): arm for arm, match in matches.items() if match}


def arms_in(folder: Path) -> list[str]:
    """The names of all arms that have been run, in alphabetical order."""
    return sorted({path.parts[-3] for path in folder.glob("*/seed-*/metrics.jsonl") if path.stat().st_size})


def has_diverged(folder: Path, arm: str) -> bool:
    """Whether training was stopped in any seed, because it diverged."""
    return any(Path(folder, arm).glob("seed-*/stopped.txt"))


def best_cell(folder: str | Path) -> Cell | None:
    """(c, j) with the best accuracy of joint rollouts on validation problems after training; of equals, the one with c nearest to 0.

    Only arms that have reached the last update and have not diverged count; None if there is none.
    """
    folder = Path(folder)
    cells = {cell: arm for cell, arm in cells_of(arms_in(folder)).items() if not has_diverged(folder, arm)}
    runs = read_runs(folder, cells.values())
    ends = {cell: pooled(runs[arm], "tandem", "accuracy")[-1] for cell, arm in cells.items() if arm in runs}
    last = max((end.update for end in ends.values()), default=0)
    finished = sorted((cell for cell in ends if ends[cell].update == last), reverse=True)  # c nearest to 0 first
    return max(finished, key=lambda cell: ends[cell].value, default=None)


def figure_sweep(folder: Path, runs: Runs) -> Path:
    """Upper row: joint validation accuracy, and updates until jargon is gone, for each c and j. Lower row: curves on test problems."""
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.0), layout="constrained")
    cells, tests = cells_of(runs), cells_of(runs, "test-")
    diverged = {cell for cell, arm in cells.items() if has_diverged(folder, arm)}
    accuracy = {cell: pooled(runs[arm], "tandem", "accuracy")[-1].value for cell, arm in cells.items()}
    no_jargon = {cell: updates_until(runs[arm], 5.0) for cell, arm in cells.items()}
    axes[0, 0].set_title("joint validation accuracy at the end (%)")
    axes[0, 1].set_title("updates until jargon is under 5 %")
    for ax, numbers, colours in zip(axes[0], (accuracy, no_jargon), ("viridis", "viridis_r")):
        if numbers:
            heat_map(ax, numbers, diverged, best_cell(folder), colours)
    for ax, metric, ylabel in zip(axes[1], ("accuracy", "jargon"), ("accuracy (%)", "solutions with jargon (%)")):
        if tests:
            draw_tests(ax, {cell: runs[arm] for cell, arm in tests.items()}, metric)
        ax.set(xlabel="updates", ylabel=ylabel, title="test problems", ylim=(-3, 103))
    note = "Red frame: best joint validation accuracy."
    if tests:
        note += " That cell and the main one were trained again with other seeds: lower row."
    return add_caption_and_save(figure, runs, folder / "figures" / "sweep.png", note)


def heat_map(ax: Axes, numbers: dict[Cell, float], diverged: set[Cell], chosen: Cell | None, colours: str) -> None:
    """A coloured grid of c against j with its number in each cell and a frame around the chosen cell."""
    cs, js = sorted({c for c, _ in numbers}, reverse=True), sorted({j for _, j in numbers})
    shown = {cell: number for cell, number in numbers.items() if cell not in diverged}
    image = ax.imshow([[shown.get((c, j), nan) for j in js] for c in cs], cmap=colours, aspect="auto")
    for y, c in enumerate(cs):
        for x, j in enumerate(js):
            # A cell without a number is white.
            value = shown.get((c, j), nan)
            red, green, blue, _ = image.to_rgba(value)
            is_light = isnan(value) or red + green + blue > 1.5
            ax.text(x, y, cell_text(numbers, diverged, (c, j)), ha="center", va="center", color="black" if is_light else "white")
    if chosen in numbers:
        corner = js.index(chosen[1]) - 0.5, cs.index(chosen[0]) - 0.5
        ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor=RED, linewidth=2))
    ax.set_xticks(range(len(js)), [f"{j:g}" for j in js])
    ax.set_yticks(range(len(cs)), [f"{c:g}" for c in cs])
    ax.set(xlabel="j, weight of the junior's tokens", ylabel="c, weight of wrong rollouts")
    ax.grid(False)


def cell_text(numbers: dict[Cell, float], diverged: set[Cell], cell: Cell) -> str:
    if cell not in numbers:
        return "–"
    if cell in diverged:
        return "diverged"
    if isnan(numbers[cell]):
        return "never"
    return f"{numbers[cell]:.1f}".removesuffix(".0")


def draw_tests(ax: Axes, tests: dict[Cell, list[Rows]], metric: str) -> None:
    """The arms on test problems: the senior alone, and for accuracy also both together."""
    ordered = sorted(tests.items(), reverse=True)
    for ((c, j), seeds), style in zip(ordered, cycle(STYLES)):
        name = f"c = {c:g}, j = {j:g}"
        main = " (main)" if (c, j) == (0, 1) else ""
        draw_curve(ax, seeds, "senior", metric, style, f"{name}{main}, senior alone")
        if metric == "accuracy":
            draw_curve(ax, seeds, "tandem", metric, style._replace(marker="x"), f"{name}, together")
    draw_junior(ax, {name: seeds for name, (_, seeds) in enumerate(ordered)}, metric)
    ax.legend()


# ----------------------------------------------------------------------------------------------------------------------
# The table

HEADINGS = ["arm", "seeds", "updates", "accuracy alone", "jargon alone", "accuracy together", "junior's accuracy", "language"]
IN_EVERY_EVALUATION = ("n", "accuracy", "jargon", "languages", "tokens")


def table(runs: Runs) -> str:
    """A Markdown table with a row per arm: percent before → after training, with the 95 % interval of the latter.

    With several seeds, the lowest and the highest single seed follow in brackets: the interval is the sampling error of the
    evaluation and says nothing about how far seeds disagree.

    Any number that was added to the evaluation of the senior has a column of its own, before → after, as a mean over seeds.
    """
    added = added_metrics(runs)
    headings = [*HEADINGS, "minutes per seed", *added]
    return markdown_table(headings, [table_row(arm, seeds, added) for arm, seeds in runs.items()])


def added_metrics(runs: Runs) -> list[str]:
    """The names of the numbers that somebody has added to the evaluation of the senior (metrics.summarise)."""
    evaluations = [evaluation for seeds in runs.values() for evaluation in senior_evaluations(seeds)]
    numbers = dict.fromkeys(name for evaluation in evaluations for name, value in evaluation.items() if isinstance(value, (int, float)))
    return [name for name in numbers if name not in IN_EVERY_EVALUATION]


def table_row(arm: str, seeds: list[Rows], added: list[str]) -> list[str]:
    """What the table says of an arm, in the order of the headings."""
    measured = [("senior", "accuracy"), ("senior", "jargon"), ("tandem", "accuracy")]
    curves = [pooled(seeds, who, metric) for who, metric in measured]
    junior = pooled(seeds, "junior", "accuracy")[0]
    ranges = [range_over_seeds(seeds, who, metric) for who, metric in measured]
    seconds = sum(value for rows in seeds for row in rows for key, value in row.items() if key.startswith("seconds"))
    return [
        arm,
        str(len(seeds)),
        str(curves[0][-1].update),
        *(f"{points[0].value:.1f} → {with_interval(points[-1])}{spread}" for points, spread in zip(curves, ranges)),
        with_interval(junior) + range_over_seeds(seeds, "junior", "accuracy"),
        language_change(seeds),
        f"{seconds / 60 / len(seeds):.1f}",
        *(mean_change(pooled(seeds, "senior", metric)) for metric in added),
    ]


def range_over_seeds(seeds: list[Rows], who: str, metric: str) -> str:
    """The lowest and the highest seed at the last evaluation, such as " (7.0–98.5)"; nothing if there is one seed."""
    values = [pooled([rows], who, metric)[-1].value for rows in seeds]
    return f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""


def mean_change(points: list[Point]) -> str:
    return f"{points[0].value:.4g} → {points[-1].value:.4g}" if points else "–"


def language_change(seeds: list[Rows]) -> str:
    """The language of most of the senior's solutions before → after training, and the share of the latter."""
    curves = {code: pooled(seeds, "senior", f"languages.{code}") for code in languages_written(seeds)}
    before = max(curves, key=lambda code: curves[code][0].value)
    after = max(curves, key=lambda code: curves[code][-1].value)
    return f"{before} → {after}, {with_interval(curves[after][-1])}"


# ----------------------------------------------------------------------------------------------------------------------
# Everything

PRESSURE_LANGUAGE = {"known": PRESSURE_ARMS, "setting": "pressure-language"}
FIGURES: dict[str, list[Callable[[Path, Runs], Path | None]]] = {
    "skill": [figure_1, figure_2],
    "language": [figure_2_languages, figure_3],
    "granularity": [figure_granularity],
    "control": [figure_control],
    "sweep": [figure_sweep],
    "pressure": [figure_pressure],
    "pressure-language": [partial(draw_figure, **PRESSURE_LANGUAGE) for draw_figure in (figure_2_languages, figure_3)],
    "rlvr": [figure_rlvr],
}
# What is printed after the table of a setting.
TABLES: dict[str, list[Callable[[Path, Runs], str | None]]] = {
    "granularity": [table_of_handoffs],
    "pressure": [table_of_doses],
    "rlvr": [table_of_measures, table_of_differences],
}


def draw(folder: str | Path, setting: str, arms: Iterable[str]) -> None:
    """Draw the figures of one setting into folder/figures/ and print its tables.

    Only arms in which senior, tandem and junior were evaluated are drawn. Of the sweep, the arms on test problems are drawn too.
    """
    folder = Path(folder)
    arms = complete_setting(folder, setting, arms)
    runs = read_runs(folder, arms)
    if not runs:
        print(f"{folder}: no arm of {setting} in which senior, junior and both together were evaluated, so there is nothing to draw")
        return
    for arm in arms_in(folder):
        if arm in arms and arm not in runs:
            print(f"{folder / arm} is left out: not every seed has evaluated senior, junior and both together")
    further = [make_table(folder, runs) for make_table in TABLES.get(setting, [])]
    print("\n\n".join([table(runs), *filter(None, further)]))
    if setting not in FIGURES:
        print(f"{setting} has no figure: add a function to FIGURES in lab/figures.py")
    for draw_figure in FIGURES.get(setting, []):
        path = draw_figure(folder, runs)
        if path:
            print(path)


def draw_all(folder: Path, settings: Iterable[str]) -> None:
    """Draw the figures of these settings, and the page of all rollouts in the folder."""
    # Imported late, because the runner itself imports this module.
    from run_gsm8k import SETTINGS

    for setting in settings:
        draw(folder, setting, SETTINGS[setting])
    viewer.draw_page(folder)


def complete_setting(folder: Path, setting: str, arms: Iterable[str]) -> list[str]:
    """The arms of a setting, with those on test problems that lie in the folder: their names depend on the outcome of the sweep."""
    arms = list(arms)
    if setting == "sweep":
        tests = cells_of(arms_in(folder), "test-")
        arms += [tests[cell] for cell in sorted(tests, reverse=True)]
    return arms


def main(folder: str) -> None:
    """Draw every setting of which the folder holds an arm. Exits with one line if a file in it cannot be used."""
    # Imported late, because the runner itself imports this module.
    from run_gsm8k import SETTINGS

    present = arms_in(Path(folder))
    known = {setting: complete_setting(Path(folder), setting, arms) for setting, arms in SETTINGS.items()}
    settings = [setting for setting, arms in known.items() if any(arm in present for arm in arms)]
    if not settings:
        sys.exit(f"{folder} has no <arm>/seed-<k>/metrics.jsonl of a known setting: run run_gsm8k.py first, or name its --out folder")
    try:
        draw_all(Path(folder), settings)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for arm in present:
        if not any(arm in arms for arms in known.values()):
            print(f"{Path(folder, arm)} is in no setting of run_gsm8k.py and is not drawn")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
