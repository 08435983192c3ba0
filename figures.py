"""Every figure and table, drawn from metrics.jsonl and samples.jsonl alone:  python figures.py RUNS_FOLDER

A runs folder holds SETTING/ARM/seed-K/metrics.jsonl, with one row an update (see run_gsm8k.py). A share over several
seeds is pooled: all evaluated solutions of all seeds, with Wilson's 95 % interval (metrics.wilson_interval). Each seed
draws its own held-out problems. The interval is the sampling error of the evaluation. The thin lines, one a seed, show
how far specialist and training differ from seed to seed; the pretrained base is the same for all.

    skill         figure1 (one problem, three rollouts), figure2 (accuracy and jargon)
    language      figure2 and figure3 (the language of the solutions), one column a pair
    granularity   when the coin is tossed, and with which probability
    control       reward or imitation
    sweep         appendixE: the weights c and j

Not here: anything that loads a model.
"""

import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files: there need be no screen
import matplotlib.pyplot as plt

from metrics import has_jargon, wilson_interval

plt.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "legend.fontsize": 7})
WIDTH = 7.0  # inches: the text width of a paper with two columns
# Colours that stay apart for the colour-blind (Okabe and Ito, 2008), each with a marker of its own.
BLUE, RED, GREEN, ORANGE, PINK, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
STYLES = [(BLUE, "o"), (RED, "s"), (GREEN, "^"), (ORANGE, "D"), (PINK, "v"), (SKY, "P")]
JUNIOR_GREY = "#555555"
LANGUAGES = {"en": ("English", STYLES[0]), "de": ("German", STYLES[3]), "fr": ("French", STYLES[4])}
Runs = dict[str, list[list[dict]]]  # {arm: [rows of each seed]}

# ----------------------------------------------------------------------------------------------------------------------
# From files to shares


def read_runs(folder: str | Path) -> Runs:
    """The rows of every arm and seed of one setting's folder."""
    runs: Runs = {}
    for path in sorted(Path(folder).glob("*/seed-*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if rows:
            runs.setdefault(path.parts[-3], []).append(rows)
    return runs


def share_of(cell: dict, what: str) -> float:
    """A share of an evaluation: "accuracy", "jargon", or that of solutions in a language ("de")."""
    return cell[what] if what in cell else cell["languages"].get(what, 0.0)


def pooled(seeds: list[list[dict]], who: str, what: str) -> list[tuple[int, float, float, float]]:
    """(update, share, low, high) wherever every seed has evaluated `who` ("senior", "tandem", "junior")."""
    evaluations = [{row["update"]: row["eval"][who] for row in rows if who in row.get("eval", {})} for rows in seeds]
    points = []
    for update in sorted(set.intersection(*map(set, evaluations))):
        cells = [evaluation[update] for evaluation in evaluations]
        n, hits = sum(cell["n"] for cell in cells), round(sum(cell["n"] * share_of(cell, what) for cell in cells))
        points.append((update, hits / n, *wilson_interval(hits, n)))
    return points


def mean_of(seeds: list[list[dict]], name: str, update: int) -> float:
    """The mean over seeds of a number in the evaluation of joint rollouts, such as "handoffs"; 0 where nobody shared in training."""
    shares = [row["senior_share"] for rows in seeds for row in rows if "senior_share" in row]
    if shares and min(shares) == 1:
        return 0.0
    numbers = [row["eval"]["tandem"][name] for rows in seeds for row in rows if row["update"] == update]
    return sum(numbers) / len(numbers)


# ----------------------------------------------------------------------------------------------------------------------
# Parts of a figure


def curve(ax, seeds: list[list[dict]], who: str, what: str, style: tuple[str, str], label: str) -> None:
    """A share in percent against updates: thick pooled line with its band, a thin line for each seed."""
    colour, marker = style
    for seed in seeds if len(seeds) > 1 else []:
        updates, share, _, _ = zip(*pooled([seed], who, what))
        ax.plot(updates, [100 * s for s in share], color=colour, alpha=0.4, linewidth=0.5)
    updates, share, low, high = zip(*pooled(seeds, who, what))
    ax.plot(updates, [100 * s for s in share], color=colour, marker=marker, markersize=2.5, linewidth=1.2, label=label)
    ax.fill_between(updates, [100 * s for s in low], [100 * s for s in high], color=colour, alpha=0.2, linewidth=0)


def junior_line(ax, seeds: list[list[dict]], what: str) -> None:
    """The junior alone, which does not change."""
    _, share, low, high = pooled(seeds, "junior", what)[0]
    ax.axhline(100 * share, color=JUNIOR_GREY, linestyle="--", linewidth=1, label="junior alone")
    ax.axhspan(100 * low, 100 * high, color=JUNIOR_GREY, alpha=0.1, linewidth=0)


def finish(figure, axes, runs: Runs, path: Path, note: str = "") -> Path:
    """Limits, the caption (how many seeds, which band), PNG and PDF."""
    for ax in axes:
        ax.set(ylim=(-3, 103), xlabel=ax.get_xlabel() or "updates")
    counts = sorted({len(seeds) for seeds in runs.values()})
    several = counts[-1] > 1
    caption = f"{' or '.join(map(str, counts))} seed{'s' * several} an arm{': thin lines each, thick lines pooled' * several}. "
    caption += "Bands: 95 % Wilson intervals of the evaluation. " + note
    figure.supxlabel("\n".join(textwrap.wrap(caption, 135)), fontsize=7, color="#333333")
    return save(figure, path)


def save(figure, path: Path) -> Path:
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=200)
    plt.close(figure)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# One function a figure. Each returns the path of its PNG, or None where the runs that it needs are not there.

SKILL_ARMS = {"tandem": ("tandem training", STYLES[0]), "solo": ("standard RL", STYLES[1])}


def figure_1(folder: Path) -> Path | None:
    """One problem, three joint rollouts (before, during, after training), each word coloured by its author.

    The problem is the first one in samples.jsonl, seed after seed, that had jargon and came out wrong before training and
    came out right after it; else the first that went from wrong to right; else the first of all.
    """
    candidates: list[tuple[int, dict[int, dict]]] = []  # (how telling, {update: sample})
    for path in sorted(folder.glob("tandem/seed-*/samples.jsonl")):
        by_question: dict[str, dict[int, dict]] = {}
        for sample in map(json.loads, path.open(encoding="utf-8")):
            if sample["who"] == "tandem":
                by_question.setdefault(sample["question"], {})[sample["update"]] = sample
        for samples in by_question.values():
            first, last = samples[min(samples)], samples[max(samples)]
            mended = first["reward"] < last["reward"]
            candidates.append((mended + (mended and has_jargon("".join(text for _, text in first["stretches"]))), samples))
    candidates = [(telling, samples) for telling, samples in candidates if len(samples) >= 3]
    if not candidates:
        return None
    telling, rollouts = max(candidates, key=lambda candidate: candidate[0])  # the first of the most telling
    updates = sorted(rollouts)
    stages = {"before": updates[0], "during": updates[len(updates) // 2], "after": updates[-1]}

    columns, gap = 40, 2  # characters
    pages = [lines_of(rollouts[update]["stretches"], columns) for update in stages.values()]
    question = textwrap.wrap(f"{rollouts[updates[0]]['question']} (Answer: {rollouts[updates[0]]['gold']})", 3 * columns)
    rows = max(map(len, pages)) + len(question) + 3
    width = 3 * columns + 2 * gap
    points = WIDTH * 72 / width / 0.602  # of the font: a DejaVu Sans Mono character is 0.602 of its size wide
    figure = plt.figure(figsize=(WIDTH, rows * points * 1.5 / 72))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(rows - 0.3, -0.7))
    ax.axis("off")
    style = dict(family="monospace", fontsize=points, va="center", ha="left", parse_math=False)
    for y, line in enumerate(question):
        ax.text(0, y, line, **style)
    for i, (name, update) in enumerate(stages.items()):
        left, verdict = i * (columns + gap), "right" if rollouts[update]["reward"] else "wrong"
        ax.text(left, len(question) + 0.5, f"{name}: update {update}, {verdict}", weight="bold", **style)
        for y, line in enumerate(pages[i]):
            for x, author, text in line:
                box = dict(facecolor="#FFE3B3", edgecolor="none", pad=0.6) if author == "junior" else None
                ax.text(left + x, len(question) + 2 + y, text, color=BLUE if author == "senior" else "#8A3D00", bbox=box, **style)
    ax.text(0, rows - 0.8, "blue: written by the senior", color=BLUE, **style)
    ax.text(29, rows - 0.8, "on orange: by the junior", color="#8A3D00", bbox=dict(facecolor="#FFE3B3", edgecolor="none", pad=0.6), **style)
    why = ("The first sample", "Chosen: the first that went from wrong to right", "Chosen: the first with <<...>> that was mended")[telling]
    ax.text(56, rows - 0.8, why, color="#333333", **style)
    return save(figure, folder / "figure1.png")


def lines_of(stretches: list[tuple[str, str]], columns: int) -> list[list[tuple[int, str, str]]]:
    """Wrap a rollout: lines of (column, author, text), broken at spaces where there are any."""
    letters = [(letter, author) for author, text in stretches for letter in text]
    lines: list[list[tuple[str, str]]] = [[]]
    for word in re.findall(r"\n|\s?[^\s]+|\s", "".join(letter for letter, _ in letters)):
        part, letters = letters[: len(word)], letters[len(word) :]
        if word == "\n" or len(lines[-1]) + len(word) > columns:
            lines.append([])
        lines[-1] += [pair for pair in part if pair[0] != "\n" and (lines[-1] or not pair[0].isspace())]
    wrapped = []
    for line in lines:
        runs: list[tuple[int, str, str]] = []
        for x, (letter, author) in enumerate(line):
            if runs and runs[-1][1] == author:
                runs[-1] = (runs[-1][0], author, runs[-1][2] + letter)
            else:
                runs.append((x, author, letter))
        wrapped.append(runs)
    return wrapped


def figure_2(folder: Path, runs: Runs) -> Path:
    """Accuracy and jargon against updates, tandem training beside standard RL."""
    panels = [
        ("senior", "accuracy", "accuracy (%)", "senior alone"),
        ("senior", "jargon", "solutions with jargon (%)", "senior alone"),
        ("tandem", "accuracy", "accuracy (%)", "senior and junior together"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.5), layout="constrained")
    for ax, (who, what, label, title) in zip(axes, panels):
        for arm, (name, style) in SKILL_ARMS.items():
            if arm in runs:
                curve(ax, runs[arm], who, what, style, name)
        junior_line(ax, next(iter(runs.values())), what)
        ax.set(ylabel=label, title=title)
    axes[1].legend()
    return finish(figure, axes, runs, folder / "figure2.png")


def pairs_of(runs: Runs) -> list[str]:
    """The language pairs of a folder, such as "de-fr", in the order of the paper's figure: those with English first."""
    pairs = {arm.rsplit("-", 1)[0] for arm in runs if re.fullmatch(r"[a-z]{2}-[a-z]{2}-(tandem|solo)", arm)}
    return sorted(pairs, key=lambda pair: ("en" not in pair, "en-" not in pair, pair))


def title_of(pair: str) -> str:
    senior, junior = (LANGUAGES.get(language, (language, None))[0] for language in pair.split("-"))
    return f"{senior} → {junior}"


def figure_2_languages(folder: Path, runs: Runs) -> Path:
    """Figure 2 for the pairs in which senior and junior speak different languages: one column each."""
    pairs = pairs_of(runs)
    figure, axes = plt.subplots(2, len(pairs), figsize=(WIDTH, 3.8), layout="constrained", sharey=True, sharex=True, squeeze=False)
    for column, pair in zip(axes.T, pairs):
        for ax, what, label in zip(column, ("accuracy", "jargon"), ("accuracy (%)", "solutions with jargon (%)")):
            for arm, (name, style) in SKILL_ARMS.items():
                if f"{pair}-{arm}" in runs:
                    curve(ax, runs[f"{pair}-{arm}"], "senior", what, style, name)
            junior_line(ax, next(seeds for arm, seeds in runs.items() if arm.startswith(pair)), what)
            ax.set(ylabel=label if pair == pairs[0] else "", xlabel="updates" if what == "jargon" else " ")
        column[0].set_title(title_of(pair))
    axes[1, 0].legend()
    return finish(figure, axes.flat, runs, folder / "figure2.png", "Senior → junior; solutions of the senior alone.")


def figure_3(folder: Path, runs: Runs) -> Path:
    """The language of the senior's solutions against updates, one column a pair; standard RL in the lower row."""
    pairs = pairs_of(runs)
    figure, axes = plt.subplots(2, len(pairs), figsize=(WIDTH, 3.8), layout="constrained", sharey=True, sharex=True, squeeze=False)
    for column, pair in zip(axes.T, pairs):
        for ax, (arm, (name, _)) in zip(column, SKILL_ARMS.items()):
            for language, (label, style) in LANGUAGES.items():
                if f"{pair}-{arm}" in runs:
                    curve(ax, runs[f"{pair}-{arm}"], "senior", language, style, label)
            ax.set(
                ylabel=f"{name}:\nsolutions in each language (%)" if pair == pairs[0] else "", xlabel="updates" if arm == "solo" else " "
            )
        column[0].set_title(title_of(pair))
    axes[0, -1].legend(loc="center right")
    return finish(figure, axes.flat, runs, folder / "figure3.png", "Senior → junior; solutions of the senior alone.")


def merge_equal(runs: Runs, arms: dict[str, str]) -> dict[str, str]:
    """{label: arm}, where arms whose runs are the same in every number share one label, such as "token = word".

    Where each word is one token, as in the tiny world, two schedules may be one.
    """
    merged: dict[str, tuple[str, str]] = {}
    for label, arm in arms.items():
        numbers = json.dumps([[{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows] for rows in runs[arm]])
        merged[numbers] = (f"{merged[numbers][0]} = {label}", arm) if numbers in merged else (label, arm)
    return dict(merged.values())


def figure_granularity(folder: Path, runs: Runs) -> Path:
    """Jargon, accuracy and handoffs by schedule (upper row) and by the probability p of the senior (lower row)."""
    schedules = {arm: arm for arm in ("token", "word", "redraw", "sentence", "paragraph") if arm in runs}
    by_p = {f"p = {arm[2:]}": arm for arm in sorted(runs) if arm.startswith("p-")} | ({"p = 0.5": "word"} if "word" in runs else {})
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 4.6), layout="constrained")
    for row, arms in zip(axes, (merge_equal(runs, schedules), dict(sorted(by_p.items())))):
        for (label, arm), style in zip(arms.items(), STYLES):
            curve(row[0], runs[arm], "senior", "jargon", style, label)
            curve(row[1], runs[arm], "senior", "accuracy", style, label)
        junior_line(row[1], next(iter(runs.values())), "accuracy")
        row[0].set(ylabel="solutions with jargon (%)", title="senior alone")
        row[1].set(ylabel="accuracy (%)", title="senior alone")
        row[0].legend()
        for name, colour, label in (("handoffs", SKY, "all"), ("handoffs_inside", BLUE, "inside an expression")):
            row[2].bar(range(len(arms)), [mean_of(runs[arm], name, 0) for arm in arms.values()], color=colour, label=label)
        row[2].set(ylabel="handoffs a rollout", title="together, before training", ylim=(0, 1.45 * row[2].get_ylim()[1]), xlabel=" ")
        row[2].set_xticks(range(len(arms)), [label if len(label) < 9 else label.replace(" = ", "\n= ") for label in arms], fontsize=6.5)
        row[2].legend(loc="upper right")
    return finish(figure, axes[:, :2].flat, runs, folder / "granularity.png")


CONTROL_ARMS = {
    "main": ("true rewards, j = 1 (main)", STYLES[0]),
    "shuffled": ("shuffled rewards, j = 1", STYLES[1]),
    "senior-only": ("true rewards, j = 0", STYLES[2]),
}


def figure_control(folder: Path, runs: Runs) -> Path:
    """Is it the reward, or would the senior imitate its junior anyway? One row a pair."""
    groups = sorted({arm.rsplit("-", 2)[0] if arm.endswith("senior-only") else arm.rsplit("-", 1)[0] for arm in runs}, reverse=True)
    figure, axes = plt.subplots(len(groups), 3, figsize=(WIDTH, 2.2 * len(groups)), layout="constrained", squeeze=False)
    for row, group in zip(axes, groups):
        junior = group.split("-")[1] if "-" in group else None
        panels = [("jargon", "solutions with jargon (%)"), ("accuracy", "accuracy (%)")]
        panels += [(junior, f"solutions in {LANGUAGES[junior][0]} (%)")] if junior else []
        for ax, (what, label) in zip(row, panels):
            for arm, (name, style) in CONTROL_ARMS.items():
                if f"{group}-{arm}" in runs:
                    curve(ax, runs[f"{group}-{arm}"], "senior", what, style, name)
            if what == "accuracy":
                junior_line(ax, next(seeds for arm, seeds in runs.items() if arm.startswith(group)), what)
            ax.set(ylabel=label, title=title_of(group) if junior else group)
        for ax in row[len(panels) :]:
            ax.axis("off")
            ax.legend(*row[0].get_legend_handles_labels(), loc="center")
    return finish(figure, axes.flat, runs, folder / "control.png", "Solutions of the senior alone.")


# ----------------------------------------------------------------------------------------------------------------------
# The sweep


def cells_of(runs: Runs, prefix: str = "") -> dict[tuple[float, float], str]:
    """{(c, j): arm} of the sweep's grid, or of its runs on test problems (prefix "test-")."""
    found = {arm: re.fullmatch(prefix + r"c(-?[\d.]+)-j([\d.]+)", arm) for arm in runs}
    return {(float(match[1]), float(match[2])): arm for arm, match in found.items() if match}


def best_cell(folder: Path) -> tuple[float, float] | None:
    """(c, j) with the best accuracy of joint rollouts on validation problems, at the last update; c nearest 0 if equal.

    A run that was stopped or is not at its end is out of the question; None if no other is there.
    """
    runs = read_runs(folder)
    cells = {cell: arm for cell, arm in cells_of(runs).items() if not list((folder / arm).glob("seed-*/stopped.txt"))}
    ends = {cell: pooled(runs[arm], "tandem", "accuracy")[-1] for cell, arm in cells.items()}
    last = max((end[0] for end in ends.values()), default=0)
    return max((cell for cell in sorted(ends, reverse=True) if ends[cell][0] == last), key=lambda cell: ends[cell][1], default=None)


def figure_sweep(folder: Path, runs: Runs) -> Path:
    """Appendix E: joint validation accuracy and updates until jargon is gone, for each c and j; learning curves on test problems."""
    cells, tests = cells_of(runs), cells_of(runs, "test-")
    cs, js = sorted({c for c, _ in cells}, reverse=True), sorted({j for _, j in cells})
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.0), layout="constrained")
    maps = [
        ("joint validation accuracy at the end (%)", "viridis", lambda arm: 100 * pooled(runs[arm], "tandem", "accuracy")[-1][1]),
        ("updates until the senior's jargon is under 5 %", "viridis_r", lambda arm: updates_until(runs[arm], 0.05)),
    ]
    chosen = best_cell(folder)
    for ax, (title, colours, number) in zip(axes[0], maps):
        heat_map(ax, cs, js, cells, number, colours, {arm for arm in cells.values() if list((folder / arm).glob("*/stopped.txt"))})
        ax.set(title=title, xlabel="j, weight of the junior's tokens", ylabel="c, weight of wrong rollouts")
        if chosen:
            ax.add_patch(
                plt.Rectangle((js.index(chosen[1]) - 0.5, cs.index(chosen[0]) - 0.5), 1, 1, fill=False, edgecolor=RED, linewidth=2)
            )
    for ax, what, label in zip(axes[1], ("accuracy", "jargon"), ("accuracy (%)", "solutions with jargon (%)")):
        for ((c, j), arm), style in zip(sorted(tests.items(), reverse=True), STYLES):
            curve(ax, runs[arm], "senior", what, style, f"c = {c:g}, j = {j:g}{' (main)' * ((c, j) == (0, 1))}, senior alone")
            if what == "accuracy":
                curve(ax, runs[arm], "tandem", what, (style[0], "x"), f"c = {c:g}, j = {j:g}, together")
        if tests:
            junior_line(ax, next(runs[arm] for arm in tests.values()), what)
        ax.set(ylabel=label, title="test problems")
        ax.legend()
    note = "Red frame: chosen by joint validation accuracy, then trained anew with other seeds beside the main setting (lower row)."
    return finish(figure, axes[1], runs, folder / "appendixE.png", note)


def updates_until(seeds: list[list[dict]], level: float) -> float:
    """The first evaluated update at which the senior's pooled jargon is under `level`; nan if there is none."""
    return next((float(update) for update, share, _, _ in pooled(seeds, "senior", "jargon") if share < level), float("nan"))


def heat_map(ax, cs: list, js: list, cells: dict, number: Callable[[str], float], colours: str, stopped: set[str]) -> None:
    """One number a cell, written into it; "stopped" where a run was, "never" where there is no number."""
    grid = [[number(cells[c, j]) if (c, j) in cells and cells[c, j] not in stopped else float("nan") for j in js] for c in cs]
    image = ax.imshow(grid, cmap=colours, aspect="auto")
    low, high = image.get_clim()
    for y, c in enumerate(cs):
        for x, j in enumerate(js):
            value, arm = grid[y][x], cells.get((c, j))
            text = "stopped" if arm in stopped else "–" if arm is None else "never" if value != value else f"{value:.1f}".removesuffix(".0")
            dark = value == value and (value - low) / max(high - low, 1e-9) < 0.5
            ax.text(x, y, text, ha="center", va="center", color="white" if dark != colours.endswith("_r") and value == value else "black")
    ax.set_xticks(range(len(js)), [f"{j:g}" for j in js])
    ax.set_yticks(range(len(cs)), [f"{c:g}" for c in cs])
    ax.grid(False)


# ----------------------------------------------------------------------------------------------------------------------
# The table


def table(runs: Runs) -> str:
    """Each arm as Markdown: percent before -> after training, with the 95 % interval of the latter."""

    def change(points: list) -> str:
        return "{:.1f} → {:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in (points[0][1], *points[-1][1:])))

    def language(seeds: list, update: int) -> str:  # in which most solutions are written
        rows = [row for rows in seeds for row in rows if row["update"] == update]
        return max(sorted({name for row in rows for name in row["eval"]["senior"]["languages"]}), key=lambda name: total(rows, name))

    def total(rows: list, name: str) -> float:
        return sum(share_of(row["eval"]["senior"], name) for row in rows)

    head = [
        "arm",
        "seeds",
        "updates",
        "accuracy alone",
        "jargon alone",
        "accuracy together",
        "junior's accuracy",
        "language",
        "minutes a seed",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, seeds in runs.items():
        measures = [pooled(seeds, who, what) for who, what in (("senior", "accuracy"), ("senior", "jargon"), ("tandem", "accuracy"))]
        first, last = measures[0][0][0], measures[0][-1][0]
        spoken = language(seeds, first), language(seeds, last)
        share, low, high = (100 * x for x in pooled(seeds, "senior", spoken[1])[-1][1:])
        junior, seconds = pooled(seeds, "junior", "accuracy")[0], [value for rows in seeds for row in rows for value in times(row)]
        cells = [arm, len(seeds), last, *map(change, measures), "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in junior[1:]))]
        cells += [f"{spoken[0]} → {spoken[1]}, {share:.1f} [{low:.1f}, {high:.1f}]", f"{sum(seconds) / 60 / len(seeds):.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def times(row: dict) -> list[float]:
    return [value for name, value in row.items() if name.startswith("seconds")]


# ----------------------------------------------------------------------------------------------------------------------

FIGURES: dict[str, tuple[Callable, ...]] = {
    "skill": (lambda folder, runs: figure_1(folder), figure_2),
    "language": (figure_2_languages, figure_3),
    "granularity": (figure_granularity,),
    "control": (figure_control,),
    "sweep": (figure_sweep,),
}


def draw(folder: str | Path) -> None:
    """Draw the figures of one setting's folder and print its table."""
    folder = Path(folder)
    runs = {arm: seeds for arm, seeds in read_runs(folder).items() if all("eval" in rows[0] for rows in seeds)}
    if not runs:
        return
    config = json.loads(next(folder.glob("*/seed-*/config.json")).read_text())
    print(table(runs))
    for figure in FIGURES[config["flags"]["setting"]]:
        path = figure(folder, runs)
        if path:
            print(path)


def main(folder: str) -> None:
    """Draw whatever settings the folder holds: it may be runs/, runs/skill/ or results/."""
    settings = {path.parent.parent.parent for path in Path(folder).rglob("seed-*/metrics.jsonl")}
    if not settings:
        sys.exit(f"no SETTING/ARM/seed-K/metrics.jsonl below {folder}: run run_gsm8k.py first, or name its --out folder")
    for setting in sorted(settings):
        draw(setting)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__))
