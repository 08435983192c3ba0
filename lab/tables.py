"""From the files of the runs to numbers and tables: reading with pandas, pooling over seeds.

A table of runs has one row per evaluation: arm, seed, update, who (senior, tandem or junior), n,
and a column per metric, such as accuracy, tokens or languages.de; outcomes.accuracy has the list of
the single problems. A metric is a share if all its outcomes are 0 or 1, and else a mean. Rows of
"training" have only the seconds that an update took, with its evaluation.

Shares are pooled over the seeds of an arm. If seed k evaluated n_k solutions, the share s_k of
which is right,

    share = sum_k n_k s_k / sum_k n_k,   with Wilson's 95 % interval for sum_k n_k solutions

so that 3 of 4 and 1 of 4 make 4 of 8, or 50 % [21.5, 78.5]. The interval is the sampling error of
the evaluation; each seed draws its own held-out problems, which overlap if there are few (and the
interval is then too narrow). It does not say how far training differs from seed to seed: that is
what the range in brackets says, lowest to highest seed. Means are averaged over the seeds and have
no interval.

The measures of Tandem RL (Jiao et al., 2026; lab/measures.py) have one number per problem. Their
interval is the bootstrap over seeds and problems. Two arms are compared on the same seeds, problem
by problem: if handoff is 1, 0 on the two problems of the only seed of one arm, and 0, 0 in the
other, the difference is +50 points. A difference also has Student's interval over the seeds. The
outcomes of evaluations are compared in the same way (table_of_differences). Of some thirty
comparisons, one or two have an interval without 0 by chance alone.

No model is run here, and no metric computed.
"""

from collections.abc import Collection, Iterable
from math import nan
from pathlib import Path

import numpy as np
import pandas as pd

from lab.measures import SAMPLES, T_QUANTILES, bootstrap_interval, pass_at_k, seed_interval
from lab.runs import Refused, read_back, read_rows, seed_folders
from metrics import wilson_interval

# ------------------------------------------------------------------------------------------------
# Reading

COLUMNS = ["arm", "seed", "update", "who", "n"]


def arms_in(folder: Path) -> list[str]:
    """The names of all arms that have been run, in alphabetical order."""
    found = folder.glob("*/seed-*/metrics.jsonl")
    return sorted({path.parts[-3] for path in found if path.stat().st_size})


def read_flags(folder: str | Path, arm: str) -> dict:
    """The flags of an arm, from its first seed."""
    return read_back(seed_folders(folder, arm)[0] / "config.json", flags=dict)["flags"]


def read_seeds(folder: str | Path, arm: str, file: str) -> dict[int, list[dict]]:
    """{seed: the rows of its file}. A seed without the file, or with an empty one, is left out."""
    paths = {int(path.name[5:]): path / file for path in seed_folders(folder, arm)}
    seeds = {seed: read_rows(path) for seed, path in paths.items() if path.is_file()}
    return {seed: rows for seed, rows in seeds.items() if rows}


def read_runs(folder: str | Path, arms: Iterable[str]) -> pd.DataFrame:
    """The runs of those arms of which every seed evaluated all three before training."""
    found = []
    for arm in dict.fromkeys(arms):
        seeds = read_seeds(folder, arm, "metrics.jsonl")
        first = [rows[0].get("eval", {}).keys() for rows in seeds.values()]
        if not all(evaluated >= {"senior", "tandem", "junior"} for evaluated in first):
            continue
        for seed, rows in seeds.items():
            for row in rows:
                about = {"arm": arm, "seed": seed, "update": row["update"]}
                seconds = sum(row[name] for name in row if name.startswith("seconds"))
                found.append(about | {"who": "training", "seconds": seconds})
                found += [about | {"who": who} | of for who, of in row.get("eval", {}).items()]
    return pd.json_normalize(found) if found else pd.DataFrame(columns=COLUMNS)


def evaluations(folder: Path) -> pd.DataFrame:
    """Every evaluation of all arms in the folder, without the outcomes of the single problems."""
    runs = read_runs(folder, arms_in(folder))
    return runs[runs.who != "training"].astype({"n": int}).filter(regex=r"^(?!outcomes\.|seconds)")


# ------------------------------------------------------------------------------------------------
# Pooling


def is_share(runs: pd.DataFrame, metric: str) -> bool:
    """Whether a metric is a share of n solutions, and not a mean."""
    # Rows of old runs lack the outcomes of the single problems.
    if metric in ("accuracy", "jargon") or metric.startswith("languages."):
        return True
    outcomes = runs.get(f"outcomes.{metric}")
    return outcomes is not None and outcomes.explode().dropna().isin([0, 1]).all()


def by_seed(runs: pd.DataFrame, who: str, metric: str) -> pd.DataFrame:
    """A metric of an arm: a row per update and a column per seed, nan where it was not measured."""
    cells = runs[runs.who == who].reindex(columns=["update", "seed", metric])
    if metric.startswith("languages."):
        cells = cells.fillna(0.0)  # nobody wrote in this language
    return cells.pivot(index="update", columns="seed", values=metric)


def pooled(runs: pd.DataFrame, who: str, metric: str) -> pd.DataFrame:
    """A metric of an arm at every update at which each seed measured it: value, low, high.

    Shares are in percent. A mean has no interval (nan).
    """
    # Open in paper: seeds and intervals. Here: shares pooled over the seeds, Wilson's interval.
    values = by_seed(runs, who, metric).dropna()
    if not is_share(runs, metric):
        return pd.DataFrame({"value": values.mean(axis=1), "low": nan, "high": nan})
    # share = sum_k n_k s_k / sum_k n_k
    sizes = by_seed(runs, who, "n").loc[values.index]
    hits, n = (sizes * values).sum(axis=1).round(), sizes.sum(axis=1)
    intervals = pd.DataFrame(map(wilson_interval, hits, n), values.index, ["low", "high"])
    return (100 * hits / n).to_frame("value").join(100 * intervals)


# ------------------------------------------------------------------------------------------------
# Tables of evaluations

HEADINGS = ["arm", "seeds", "updates", "accuracy alone", "jargon alone", "accuracy together"]
HEADINGS += ["junior's accuracy", "language", "minutes per seed"]
KNOWN = {*COLUMNS, "accuracy", "jargon", "tokens"}  # metrics that have a column, or need none


def markdown_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head, *lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([head, "|---" * len(list(headings)) + "|", *lines])


def with_interval(point: pd.Series) -> str:
    return f"{point.value:.1f} [{point.low:.1f}, {point.high:.1f}]"


def span(values: Collection[float], form: str = ".1f") -> str:
    """The lowest and the highest value, such as " (7.0–98.5)"; nothing if there is one value."""
    return f" ({min(values):{form}}–{max(values):{form}})" if len(values) > 1 else ""


def last_cell(runs: pd.DataFrame, who: str, metric: str) -> str:
    """The last value of a share, with its interval and the range of the seeds."""
    points = pooled(runs, who, metric)
    seeds = 100 * by_seed(runs, who, metric).loc[points.index[-1]]
    return with_interval(points.iloc[-1]) + span(seeds.round(9))


def change(runs: pd.DataFrame, who: str, metric: str) -> str:
    """A metric before → after training."""
    values = pooled(runs, who, metric).value
    if values.empty:
        return "–"
    if not is_share(runs, metric):
        return f"{values.iloc[0]:.4g} → {values.iloc[-1]:.4g}"
    return f"{values.iloc[0]:.1f} → {last_cell(runs, who, metric)}"


def language_change(runs: pd.DataFrame) -> str:
    """The language of most of the senior's solutions before → after, and the latter's share."""
    spoken = runs[runs.who == "senior"].filter(regex="^languages").dropna(axis=1, how="all")
    curves = {n.removeprefix("languages."): pooled(runs, "senior", n) for n in sorted(spoken)}
    before, after = (max(curves, key=lambda code: curves[code].value.iloc[i]) for i in (0, -1))
    return f"{before} → {after}, {with_interval(curves[after].iloc[-1])}"


def table(runs: pd.DataFrame) -> str:
    """A Markdown table with a row per arm: percent before → after training.

    Other metrics have columns too: the senior's value or, where only the pair has one, the pair's.
    """
    rows, added = [], {}  # {metric: who}
    for who in ("tandem", "senior"):
        measured = runs[runs.who == who].dropna(axis=1, how="all").columns
        added |= {name: who for name in measured if name not in KNOWN and "." not in name}
    for arm, of_arm in runs.groupby("arm", sort=False):
        seeds, updates = of_arm.seed.nunique(), pooled(of_arm, "senior", "accuracy").index[-1]
        row = [arm, f"{seeds}", f"{updates}", *(change(of_arm, *end) for end in ENDS.values())]
        row += [last_cell(of_arm, "junior", "accuracy"), language_change(of_arm)]
        row += [f"{of_arm.seconds.sum() / 60 / seeds:.1f}"]
        rows.append(row + [change(of_arm, who, name) for name, who in added.items()])
    return markdown_table([*HEADINGS, *added], rows)


# ------------------------------------------------------------------------------------------------
# Comparisons, problem by problem

ENDS = {"right alone": ("senior", "accuracy"), "jargon alone": ("senior", "jargon")}
ENDS |= {"right together": ("tandem", "accuracy")}
ALIKE = ["senior_language", "junior_language", "updates", "eval_problems", "problems", "validation"]


def read_outcomes(folder: str | Path, arm: str) -> pd.DataFrame:
    """ENDS of an arm on every problem, of seeds that have finished: a row per (seed, problem)."""
    updates, cells = read_flags(folder, arm)["updates"], {}
    for seed, rows in read_seeds(folder, arm, "metrics.jsonl").items():
        # Old rows lack the outcomes.
        if rows[-1]["update"] == updates and "outcomes" in rows[-1]["eval"]["senior"]:
            ends = [rows[-1]["eval"][who]["outcomes"][metric] for who, metric in ENDS.values()]
            cells |= {(seed, problem): outcomes for problem, outcomes in enumerate(zip(*ends))}
    index = pd.MultiIndex.from_tuples(cells, names=["seed", "problem"])
    return pd.DataFrame(cells.values(), index, columns=list(ENDS))


def table_of_differences(folder: Path, runs: pd.DataFrame) -> str:
    """Every arm minus the first one with its languages, problems and number of updates.

    On the seeds that both have finished; "" if there are none.
    """
    outcomes = {arm: read_outcomes(folder, arm) for arm in runs.arm.unique()}
    first, pairs = {}, {}
    for arm in outcomes:
        flags = read_flags(folder, arm)
        other = first.setdefault(tuple(flags[name] for name in ALIKE), arm)
        both = outcomes[arm].index.intersection(outcomes[other].index)
        if other != arm and len(both):
            pairs[f"{arm} − {other}"] = outcomes[arm].loc[both], outcomes[other].loc[both]
    return table_of_cells("difference", pairs, ENDS)


# ------------------------------------------------------------------------------------------------
# Tandem RL: the measures of lab/measures.py

COMPARED = "rlvr-tandem"  # with each of the others
PASS, RIGHT = "pass@4", f"right_of_{SAMPLES}"
CONTINUED = ["continued_25", "continued_50", "continued_75"]
IN_NATS = ("legibility", "drift")  # per token; every other measure is a share
MEASURES = ["solo", PASS, "handoff", "word", "retention", *CONTINUED, *IN_NATS]


def read_ends(folder: str | Path, arms: Iterable[str]) -> dict[str, pd.DataFrame]:
    """{arm: its measures after training, a row per (seed, problem)}, of seeds that have finished.

    Raises Refused unless all were measured after the same updates on equally many of the same
    problems (a seed always draws the same ones).
    """
    ends, measured = {}, set()
    for arm in arms:
        flags, seeds = read_flags(folder, arm), read_seeds(folder, arm, "measures.jsonl")
        last = {seed: pd.DataFrame(rows[-1]) for seed, rows in seeds.items()}
        last = {seed: end for seed, end in last.items() if end["update"][0] == flags["updates"]}
        if last:
            ends[arm] = pd.concat(last, names=["seed", "problem"])
            ends[arm][PASS] = [pass_at_k(right, SAMPLES, 4) for right in ends[arm][RIGHT]]
            measured.add(tuple(flags[flag] for flag in ("updates", "problems", "eval_problems")))
    if len(measured) > 1:
        raise Refused(f"{folder}: runs that were not measured alike cannot be compared: {measured}")
    return ends


def pairs_of(ends: dict[str, pd.DataFrame]) -> dict[str, tuple]:
    """{arm: (tandem GRPO, this arm)}, each on the seeds that both have finished."""
    pairs = {}
    for arm, other in ends.items() if COMPARED in ends else ():
        both = ends[COMPARED].index.intersection(other.index)
        if arm != COMPARED and len(both):
            pairs[arm] = ends[COMPARED].loc[both], other.loc[both]
    return pairs


def estimate(name: str, *arms: pd.DataFrame) -> tuple[float, list[tuple], list[float]]:
    """A measure at the end: its value, its intervals, and its value in every seed.

    arms: an arm of read_ends or a pair of pairs_of, whose difference is taken. The intervals are
    the bootstrap's and, of a difference, Student's. Shares are in percent. Without a right
    solution, retention is nan.
    """
    columns = ["handoff", "solo"] if name == "retention" else [name]
    # (S, N, K), or (S, N, 2K): the numbers of both arms on a problem stay side by side.
    values = np.concatenate([arm[columns].to_numpy(float) for arm in arms], axis=1)
    values = values.reshape(arms[0].index.unique("seed").size, -1, values.shape[1])

    def measure(means: np.ndarray) -> float:
        value = means[0] / (means[1] or nan) if name == "retention" else means[0]
        return float(value if name in IN_NATS else 100 * value)

    def statistic(means: np.ndarray) -> float:
        first, *other = map(measure, np.split(means, len(arms)))
        return first - sum(other)

    by_seed = [statistic(seed.mean(0)) for seed in values]
    intervals = [bootstrap_interval(values, statistic)]
    if len(arms) == 2 and 2 <= len(by_seed) <= len(T_QUANTILES) + 1:
        intervals.append(seed_interval(by_seed))
    return statistic(values.mean((0, 1))), intervals, by_seed


def measure_cell(name: str, *arms: pd.DataFrame) -> str:
    """mean [95 % interval] (range of the seeds), or difference [bootstrap] [Student's t].

    A difference is bold if both intervals are without 0.
    """
    value, intervals, by_seed = estimate(name, *arms)
    form = ("+" if len(arms) == 2 else "") + (".4f" if name in IN_NATS else ".1f")
    cell = " ".join([f"{value:{form}}", *(f"[{a:{form}}, {b:{form}}]" for a, b in intervals)])
    if len(arms) == 1:
        return cell + span(by_seed, form)
    without_0 = [low > 0 or high < 0 for low, high in intervals]
    return f"**{cell}**" if without_0 == [True, True] else cell


def table_of_cells(heading: str, compared: dict[str, tuple], names: Collection[str]) -> str:
    """A row per arm or pair of arms, a column per measure; "" without rows."""
    rows = []
    for row, arms in compared.items():
        seeds = arms[0].index.unique("seed").size
        rows.append([row, f"{seeds}", *(measure_cell(name, *arms) for name in names)])
    return markdown_table([heading, "seeds", *names], rows) if rows else ""


def table_of_measures(folder: Path, runs: pd.DataFrame) -> str:
    """A row per arm at the last update, then a row per comparison; "" if nothing was measured."""
    ends = read_ends(folder, runs.arm.unique())
    arms = {arm: (end,) for arm, end in ends.items()}
    pairs = {f"{COMPARED} − {arm}": pair for arm, pair in pairs_of(ends).items()}
    parts = table_of_cells("arm", arms, MEASURES), table_of_cells("difference", pairs, MEASURES)
    return "\n\n".join(filter(None, parts))


def all_tables(folder: Path, runs: pd.DataFrame) -> str:
    """What the runs show, how the arms differ, and what Tandem RL measures."""
    parts = table(runs), table_of_differences(folder, runs), table_of_measures(folder, runs)
    return "\n\n".join(filter(None, parts))
