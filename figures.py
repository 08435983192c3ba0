"""Every figure and the table, drawn from metrics.jsonl alone:  python figures.py RUNS_FOLDER

A runs folder holds SETTING/ARM/seed-K/metrics.jsonl, with one row an update (see run_gsm8k.py). A share over several
seeds is pooled: all evaluated solutions of all seeds, with Wilson's 95 % interval (metrics.wilson_interval). Each seed
is evaluated on held-out problems of its own. The interval is the sampling error of the evaluation; how far training
itself differs from seed to seed is what the thin lines show.

Not here: anything that loads a model.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files: there need be no screen
import matplotlib.pyplot as plt

from metrics import wilson_interval

ARMS = {  # colours that stay apart for the colour-blind (Okabe and Ito, 2008)
    "tandem": ("tandem training", "#0072B2", "o"),
    "solo": ("standard RL", "#D55E00", "s"),
}
JUNIOR_GREY = "#555555"


def read_runs(folder: str | Path) -> dict[str, list[list[dict]]]:
    """{arm: [rows of each seed]} of one setting's folder."""
    runs: dict[str, list[list[dict]]] = {}
    for path in sorted(Path(folder).glob("*/seed-*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        runs.setdefault(path.parts[-3], []).append(rows)
    return runs


def pooled(seeds: list[list[dict]], who: str, what: str) -> list[tuple[int, float, float, float]]:
    """(update, share, low, high) wherever every seed has evaluated `who` ("senior", "tandem", "junior")."""
    evaluations = [{row["update"]: row["eval"][who] for row in rows if who in row.get("eval", {})} for rows in seeds]
    points = []
    for update in sorted(set.intersection(*map(set, evaluations))):
        cells = [evaluation[update] for evaluation in evaluations]
        n, hits = sum(cell["n"] for cell in cells), round(sum(cell["n"] * cell[what] for cell in cells))
        points.append((update, hits / n, *wilson_interval(hits, n)))
    return points


def figure_2(folder: str | Path) -> Path:
    """Accuracy and jargon against updates, tandem beside standard RL; PNG and PDF in `folder`."""
    runs = read_runs(folder)
    panels = [
        ("senior", "accuracy", "accuracy (%)", "senior alone"),
        ("senior", "jargon", "solutions with jargon (%)", "senior alone"),
        ("tandem", "accuracy", "accuracy (%)", "senior and junior together"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.3), layout="constrained")
    for ax, (who, what, label, title) in zip(axes, panels):
        for arm, (name, colour, marker) in ARMS.items():
            if arm in runs:
                for seed in runs[arm]:
                    updates, share, _, _ = zip(*pooled([seed], who, what))
                    ax.plot(updates, [100 * s for s in share], color=colour, alpha=0.4, linewidth=0.6)
                updates, share, low, high = zip(*pooled(runs[arm], who, what))
                ax.plot(updates, [100 * s for s in share], color=colour, marker=marker, markersize=3, label=name)
                ax.fill_between(updates, [100 * s for s in low], [100 * s for s in high], color=colour, alpha=0.2, lw=0)
        _, share, low, high = pooled(next(iter(runs.values())), "junior", what)[0]
        ax.axhline(100 * share, color=JUNIOR_GREY, linestyle="--", linewidth=1, label="junior alone")
        ax.axhspan(100 * low, 100 * high, color=JUNIOR_GREY, alpha=0.1, lw=0)
        ax.set(xlabel="updates", ylabel=label, title=title, ylim=(-3, 103))
        ax.grid(alpha=0.25)
    axes[1].legend(frameon=False, fontsize=8)
    seeds = max(map(len, runs.values()))
    figure.suptitle(
        f"{seeds} seed{'s' * (seeds > 1)}: thin lines each, thick lines pooled; bands: 95 % Wilson intervals of the evaluation", fontsize=9
    )
    path = Path(folder) / "figure2.png"
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=200)
    plt.close(figure)
    return path


def table(folder: str | Path) -> str:
    """Start, update 20 and end of each arm in percent, with 95 % intervals, as Markdown."""
    runs = read_runs(folder)
    lines = ["| arm | measure | start | update 20 | end |", "|---|---|---|---|---|"]
    measures = [
        ("senior", "accuracy", "accuracy, senior alone"),
        ("senior", "jargon", "jargon, senior alone"),
        ("tandem", "accuracy", "accuracy, together"),
    ]

    def cell(points: list, update: int) -> str:
        found = [point for point in points if point[0] == update]
        return "–" if not found else "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * x for x in found[0][1:]))

    for arm, seeds in runs.items():
        for who, what, label in measures:
            points = pooled(seeds, who, what)
            last = points[-1][0]
            lines.append(f"| {arm} | {label} | {cell(points, 0)} | {cell(points, 20)} | {cell(points, last)} (update {last}) |")
    for what in ("accuracy", "jargon"):
        lines.append(f"| junior | {what}, alone | {cell(pooled(next(iter(runs.values())), 'junior', what), 0)} | | |")
    return "\n".join(lines)


def main(folder: str) -> None:
    """Draw whatever settings the folder holds: it may be runs/, runs/skill/ or results/."""
    settings = {path.parent.parent.parent for path in Path(folder).rglob("seed-*/metrics.jsonl")}
    if not settings:
        sys.exit(f"no SETTING/ARM/seed-K/metrics.jsonl below {folder}: run run_gsm8k.py first, or name its --out folder")
    for setting in sorted(settings):
        print(f"{figure_2(setting)}\n{table(setting)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__))
