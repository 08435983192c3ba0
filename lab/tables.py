"""From the files of the runs to numbers and tables: reading with pandas, pooling over seeds.

A table of runs has one row per number: arm, seed, update, who (senior, tandem, junior, or batch for
the training batch), metric, value, n. If the number is a share of n solutions, such as accuracy or
"languages.de", n says of how many; if it is a mean, such as tokens, n is 0.

Shares are pooled over the seeds of an arm. If seed k evaluated n_k solutions, the share s_k of
which is right,

    share = sum_k n_k s_k / sum_k n_k,   with Wilson's 95 % interval for sum_k n_k solutions

so that 3 of 4 and 1 of 4 make 4 of 8, or 50 % [21.5, 78.5]. The interval is the sampling error of
the evaluation; each seed draws its own held-out problems. It does not say how far training differs
from seed to seed: that is what the range in brackets says, lowest to highest seed. Means are
averaged over the seeds and have no interval.

The measures of Tandem RL (Jiao et al., 2026; lab/measures.py) have one number per problem. Their
interval is the bootstrap over seeds and problems. Two arms are compared on the same seeds, problem
by problem: if handoff is 1, 0 on the two problems of the only seed of one arm, and 0, 0 in the
other, the difference is +50 points. A difference also has Student's interval over the seeds. Of
some thirty comparisons, one or two have an interval without 0 by chance alone.

No model is run here, and no metric computed.
"""

from collections.abc import Callable, Iterable
from math import isnan, nan
from operator import index
from pathlib import Path

import numpy as np
import pandas as pd

from lab.measures import SAMPLES, T_QUANTILES, bootstrap_interval, pass_at_k, seed_interval
from lab.runs import Refused, read_back, read_rows, seed_folders, unusable
from metrics import wilson_interval

# ------------------------------------------------------------------------------------------------
# Reading

COLUMNS = ["arm", "seed", "complete", "update", "who", "metric", "value", "n"]
KINDS = dict(handoff=str, p=(int, float), solo=bool, senior_language=str, junior_language=str)


def arms_in(folder: Path) -> list[str]:
    """The names of all arms that have been run, in alphabetical order."""
    found = folder.glob("*/seed-*/metrics.jsonl")
    return sorted({path.parts[-3] for path in found if path.stat().st_size})


def read_flags(folder: str | Path, arm: str, **kinds) -> dict:
    """The flags of an arm, from its first seed: seeds differ in their seed only.

    kinds: flags that it must have, with the types of their values, else it is Refused.
    """
    path = seed_folders(folder, arm)[0] / "config.json"
    flags = read_back(path, flags=dict)["flags"]
    for name, kind in (kinds or KINDS).items():
        if not isinstance(flags.get(name), kind):
            raise unusable(path, f"it lacks the value of --{name.replace('_', '-')}")
    return flags


def read_seeds(folder: str | Path, arm: str, file: str, convert: Callable) -> dict[int, list]:
    """{seed: its converted rows}. Raises Refused if a row holds what no run writes."""
    seeds = {}
    for path in [path / file for path in seed_folders(folder, arm) if (path / file).is_file()]:
        rows = read_rows(path)
        try:
            seeds[int(path.parent.name[5:])] = [convert(row) for row in rows]
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise unusable(path, repr(error)) from error
    # A run that has just begun has an empty file.
    return {seed: rows for seed, rows in seeds.items() if rows}


def numbers_in(row: dict) -> list[tuple]:
    """(update, who, metric, value, n) for each number in a row of metrics.jsonl."""
    update = index(row["update"])
    numbers = [(update, "batch", k, v, 0) for k, v in row.items() if isinstance(v, (int, float))]
    for who, evaluation in row.get("eval", {}).items():
        # Rows of old runs lack the outcomes of the single problems.
        outcomes = {"accuracy": (), "jargon": ()} | evaluation.get("outcomes", {})
        shares = {name: evaluation[name] for name in outcomes if set(outcomes[name]) <= {0, 1}}
        shares |= {f"languages.{code}": share for code, share in evaluation["languages"].items()}
        if not (evaluation["n"] > 0 and all(0 <= share <= 1 for share in shares.values())):
            raise ValueError(f"n or a share of {who} is impossible")
        means = [k for k in evaluation if k not in {"n", "languages", "outcomes", *shares}]
        numbers += [(update, who, name, shares[name], evaluation["n"]) for name in shares]
        numbers += [(update, who, name, float(evaluation[name]), 0) for name in means]
    return numbers


def read_arm(folder: str | Path, arm: str) -> list[tuple]:
    """The cells of an arm. A seed is complete if it evaluated all three before training."""
    cells = []
    for seed, rows in read_seeds(folder, arm, "metrics.jsonl", numbers_in).items():
        complete = {"senior", "tandem", "junior"} <= {who for _, who, *_ in rows[0]}
        cells += [(arm, seed, complete, *number) for numbers in rows for number in numbers]
    return cells


def read_runs(folder: str | Path, arms: Iterable[str]) -> pd.DataFrame:
    """The runs of those arms of which every seed is complete."""
    cells = [cell for arm in dict.fromkeys(arms) for cell in read_arm(folder, arm)]
    runs = pd.DataFrame(cells, columns=COLUMNS).astype({"complete": bool})
    return runs[~runs.arm.isin(runs.arm[~runs.complete])]


def read_doses(folder: str | Path) -> pd.DataFrame:
    """grpo-tandem on several bases: `arm` is the annotated share that the base has seen.

    RUNS/dose/<share> has the bases that are not shipped. Of the shipped one, whose runs lie in the
    folder itself, only the seeds count that another base has too.
    """
    places = {float(path.name): path for path in Path(folder, "dose").glob("0.*")}
    places = sorted(({SHIPPED: Path(folder)} | places).items())
    cells = [(share, *cell[1:]) for share, at in places for cell in read_arm(at, DOSE_ARM)]
    doses = pd.DataFrame(cells, columns=COLUMNS).astype({"complete": bool})
    doses = doses[doses.complete]
    return doses[doses.seed.isin(doses.seed[doses.arm != SHIPPED])]


# ------------------------------------------------------------------------------------------------
# Pooling


def cells_of(runs: pd.DataFrame, who: str, metric: str) -> pd.DataFrame:
    """The cells of a metric, without n unless it is a share in all of them."""
    of_who = runs[runs.who == who]
    cells = of_who[of_who.metric == metric]
    if metric.startswith("languages."):
        # A language in which nobody wrote has the share 0.
        nobody = of_who[of_who.metric == "accuracy"].assign(value=0.0)
        cells = pd.concat([cells, nobody]).drop_duplicates(["arm", "seed", "update"])
    return cells if (cells.n > 0).all() else cells.assign(n=0)


def pooled(runs: pd.DataFrame, who: str, metric: str) -> pd.DataFrame:
    """A metric of an arm at every update at which each seed measured it: value, low, high.

    Shares are in percent. A mean has no interval (nan).
    """
    # Open in paper: seeds and intervals. Here: shares pooled over the seeds, Wilson's interval.
    points = {}
    for update, cells in cells_of(runs, who, metric).groupby("update"):
        # share = sum_k n_k s_k / sum_k n_k
        hits, n = round((cells.n * cells.value).sum()), int(cells.n.sum())
        if len(cells) == runs.seed.nunique():
            interval = [100 * bound for bound in wilson_interval(hits, n)] if n else [nan, nan]
            points[update] = [100 * hits / n if n else cells.value.mean(), *interval]
    return pd.DataFrame.from_dict(points, orient="index", columns=["value", "low", "high"])


def by_seed(runs: pd.DataFrame, who: str, metric: str) -> pd.DataFrame:
    """A metric of an arm: a row per update and a column per seed."""
    seeds = {seed: pooled(of_seed, who, metric).value for seed, of_seed in runs.groupby("seed")}
    return pd.DataFrame(seeds)


def updates_until(runs: pd.DataFrame, level: float) -> float:
    """The first update at which the senior's jargon is under `level` percent, or nan."""
    points = pooled(runs, "senior", "jargon")
    return min(points.index[points.value < level], default=nan)


# ------------------------------------------------------------------------------------------------
# Tables of evaluations

HEADINGS = ["arm", "seeds", "updates", "accuracy alone", "jargon alone", "accuracy together"]
HEADINGS += ["junior's accuracy", "language", "minutes per seed"]
# The numbers of metrics.count_handoffs, and what the table calls them.
HANDOFFS = {"handoffs": "handoffs", "handoffs_inside": "inside an expression"}
HANDOFFS |= {"handoffs_in_words": "inside a word", "handoffs_in_numbers": "inside a number"}


def markdown_table(headings: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([lines[0], "|---" * len(headings) + "|", *lines[1:]])


def with_interval(point: pd.Series) -> str:
    return f"{point.value:.1f} [{point.low:.1f}, {point.high:.1f}]"


def span(values: Iterable[float], form: str = ".1f") -> str:
    """The lowest and the highest value, such as " (7.0–98.5)"; nothing if there is one value."""
    values = list(values)
    return f" ({min(values):{form}}–{max(values):{form}})" if len(values) > 1 else ""


def last_cell(runs: pd.DataFrame, who: str, metric: str) -> str:
    """The last value of a metric, with its interval and the range of the seeds."""
    last = pooled(runs, who, metric).iloc[-1]
    return with_interval(last) + span(by_seed(runs, who, metric).ffill().iloc[-1])


def change(runs: pd.DataFrame, who: str, metric: str) -> str:
    """A metric before → after training."""
    points = pooled(runs, who, metric)
    if points.empty:
        return "–"
    if points.low.isna().any():
        return f"{points.value.iloc[0]:.4g} → {points.value.iloc[-1]:.4g}"
    return f"{points.value.iloc[0]:.1f} → {last_cell(runs, who, metric)}"


def language_change(runs: pd.DataFrame) -> str:
    """The language of most of the senior's solutions before → after, and the latter's share."""
    curves = {code: pooled(runs, "senior", f"languages.{code}") for code in languages_in(runs)}
    before, after = (max(curves, key=lambda code: curves[code].value.iloc[i]) for i in (0, -1))
    return f"{before} → {after}, {with_interval(curves[after].iloc[-1])}"


def languages_in(runs: pd.DataFrame) -> list[str]:
    """The codes of the languages in which the senior has written, in alphabetical order."""
    metrics = runs.metric[runs.who == "senior"].unique()
    return sorted(metric[10:] for metric in metrics if metric.startswith("languages."))


def table(runs: pd.DataFrame) -> str:
    """A Markdown table with a row per arm: percent before → after training.

    Any metric that was added to the evaluation of the senior has a column of its own.
    """
    names = [name for name in runs.metric[runs.who == "senior"].unique() if "." not in name]
    added = [name for name in names if name not in ("accuracy", "jargon", "tokens")]
    rows = []
    for arm, of_arm in runs.groupby("arm", sort=False):
        seeds, seconds = of_arm.seed.nunique(), of_arm[of_arm.metric.str.startswith("seconds")]
        updates = pooled(of_arm, "senior", "accuracy").index[-1]
        alone = [change(of_arm, "senior", name) for name in ("accuracy", "jargon", *added)]
        others = [change(of_arm, "tandem", "accuracy"), last_cell(of_arm, "junior", "accuracy")]
        others += [language_change(of_arm), f"{seconds.value.sum() / 60 / seeds:.1f}"]
        rows.append([arm, str(seeds), str(updates), *alone[:2], *others, *alone[2:]])
    return markdown_table([*HEADINGS, *added], rows)


def handoffs_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Handoffs per joint rollout before training, and where they are: a row per arm.

    nan where old runs did not tell words and numbers apart.
    """
    before = {}
    for arm, of_arm in runs.groupby("arm", sort=False):
        before[arm] = [pooled(of_arm, "tandem", name).value.get(0, nan) for name in HANDOFFS]
    return pd.DataFrame.from_dict(before, orient="index", columns=[*HANDOFFS])


def table_of_handoffs(folder: Path, runs: pd.DataFrame) -> str:
    rows = handoffs_of(runs).map(lambda count: "–" if isnan(count) else f"{count:.1f}")
    headings = ["arm, together before training", *HANDOFFS.values()]
    return markdown_table(headings, [list(row) for row in rows.itertuples()])


# ------------------------------------------------------------------------------------------------
# The table of doses: does jargon that costs more go faster?

DOSE_ARM, SHIPPED = "grpo-tandem", 0.06  # of the shipped base, ANNOTATED in lab/tiny.py
DOSE_UPDATES = (0, 24, 48, 80)  # at which the table states the jargon
LOW_JARGON = 5.0  # percent


def cost_of_jargon(runs: pd.DataFrame) -> float:
    """(senior alone + junior alone) / 2 - both together, in points of accuracy before training."""
    everybody = ("senior", "junior", "tandem")
    senior, junior, tandem = (pooled(runs, who, "accuracy").value.iloc[0] for who in everybody)
    return (senior + junior) / 2 - tandem


def costs_and_updates(runs: pd.DataFrame) -> list[tuple[float, float, int]]:
    """Per seed: the cost of jargon, the updates until it is low (or nan), and the last update."""
    seeds = [of_seed for _, of_seed in runs.groupby("seed")]
    evaluated = [of_seed["update"][of_seed.who == "senior"].max() for of_seed in seeds]
    return [(cost_of_jargon(s), updates_until(s, LOW_JARGON), u) for s, u in zip(seeds, evaluated)]


def table_of_doses(folder: Path, runs: pd.DataFrame) -> str | None:
    """A row per annotated share, with the range of the seeds in brackets; None without doses."""
    headings = ["annotated", "seeds", "updates", "cost before training"]
    headings += [f"jargon at {update}" for update in DOSE_UPDATES]
    headings += [f"under {LOW_JARGON:g} % at", "accuracy alone"]
    rows = []
    for share, of_share in read_doses(folder).groupby("arm"):
        costs, until, last = zip(*costs_and_updates(of_share))
        accuracy = pooled(of_share, "senior", "accuracy")
        row = [f"{100 * share:g} %", str(len(costs)), str(accuracy.index[-1])]
        row += [f"{cost_of_jargon(of_share):.1f}{span(costs)}"]
        row += [jargon_at(update, of_share) for update in DOSE_UPDATES]
        # A seed whose jargon has never been low has "> " its last update.
        row += [", ".join(f"> {b}" if isnan(a) else f"{a:.0f}" for a, b in zip(until, last))]
        rows.append([*row, f"{accuracy.value.iloc[0]:.1f} → {with_interval(accuracy.iloc[-1])}"])
    return markdown_table(headings, rows) if rows else None


def jargon_at(update: int, runs: pd.DataFrame) -> str:
    """The senior's jargon, such as "48.5 (2.0–98.5)"; "–" unless every seed has measured it."""
    points, seeds = pooled(runs, "senior", "jargon"), by_seed(runs, "senior", "jargon")
    known = update in points.index
    return f"{points.value[update]:.1f}{span(seeds.loc[update])}" if known else "–"


# ------------------------------------------------------------------------------------------------
# Tandem RL: the measures of lab/measures.py

COMPARED = "rlvr-tandem"  # with each of the others
PASS, RIGHT = "pass@4", f"right_of_{SAMPLES}"
CONTINUED = ["continued_25", "continued_50", "continued_75"]
IN_NATS = ("legibility", "drift", "drift_k3")  # per token; every other measure is a share
MEASURES = ["solo", PASS, "handoff", "word", "retention", *CONTINUED, *IN_NATS]


def measures_in(row: dict) -> tuple[int, pd.DataFrame]:
    """The update of a row of measures.jsonl, and its table: a row per problem."""
    # Old runs have an estimate of the drift too; pass@4 is measured before and after training.
    names = {*MEASURES} - {PASS, "retention"} - ({"drift_k3"} - {*row})
    numbers = {name: row[name] for name in names}
    if RIGHT in row:
        numbers[PASS] = [pass_at_k(right, SAMPLES, 4) for right in row[RIGHT]]
    problems = pd.DataFrame(numbers, dtype=float)
    if problems.empty or not np.isfinite(problems).all(axis=None):
        raise ValueError(f"no number for some problem at update {row['update']}")
    return index(row["update"]), problems


def read_measures(folder: str | Path, arms: Iterable[str]) -> pd.DataFrame:
    """A row per arm, seed and update with its problems, and whether the run has finished.

    Raises Refused unless all finished runs were measured at the same update on equally many of the
    same problems (a seed always draws the same ones).
    """
    rows = []
    for arm in arms:
        for seed, found in read_seeds(folder, arm, "measures.jsonl", measures_in).items():
            flags = read_flags(folder, arm, updates=int, problems=str, validation=bool)
            drawn = flags["problems"] + " (validation)" * flags["validation"]
            for update, problems in found:
                finished = update >= flags["updates"]
                how = f"update {update}, {len(problems)} problems of {drawn}"
                rows.append((arm, seed, update, finished, how, problems))
                if finished and PASS not in problems:
                    path = Path(folder, arm, f"seed-{seed}", "measures.jsonl")
                    raise unusable(path, f"its last row lacks {RIGHT}")
    columns = ["arm", "seed", "update", "finished", "how", "problems"]
    measured = pd.DataFrame(rows, columns=columns).astype({"finished": bool})
    alike = measured[measured.finished].drop_duplicates("how")
    if len(alike) > 1:
        listed = "; ".join(alike.arm + " seed " + alike.seed.astype(str) + ": " + alike.how)
        raise Refused(f"{folder}: runs that were not measured alike cannot be compared ({listed})")
    return measured


def unfinished(measured: pd.DataFrame) -> str:
    """A sentence that names the seeds that have not finished; empty if all have."""
    finished = measured.groupby(["arm", "seed"], sort=False).finished.any()
    names = [f"{arm} seed {seed}" for arm, seed in finished.index[~finished]]
    return f"Left out at the end, because not finished: {', '.join(names)}." if names else ""


def estimate(ends: pd.Series, name: str, minus: pd.Series | None = None) -> tuple:
    """A measure at the end: its value, its interval (low, high), and its value in every seed.

    ends: the problems of S seeds. minus: those of the same seeds of another arm, whose measure is
    subtracted. Shares are in percent. Without a right solution, retention is nan.
    """
    columns = ["handoff", "solo"] if name == "retention" else [name]
    arms = [ends] if minus is None else [ends, minus]
    # The numbers of both arms on a problem stay side by side: (S, N, K) or (S, N, 2K).
    values = [np.stack([problems[columns] for problems in arm]) for arm in arms]

    def measure(means: np.ndarray) -> float:
        value = means[0] / (means[1] or nan) if name == "retention" else means[0]
        return float(value if name in IN_NATS else 100 * value)

    def statistic(means: np.ndarray) -> float:
        first, *other = map(measure, np.split(means, len(arms)))
        return first - other[0] if other else first

    values = np.concatenate(values, axis=2)
    seeds = [statistic(seed.mean(0)) for seed in values]
    return statistic(values.mean((0, 1))), bootstrap_interval(values, statistic), seeds


def measure_cell(ends: pd.Series, name: str, minus: pd.Series | None = None) -> str:
    """mean [95 % interval] (range of the seeds), or difference [bootstrap] [Student's t].

    A difference is bold if both intervals are without 0.
    """
    if ends.empty:
        return "–"
    value, interval, seeds = estimate(ends, name, minus)
    form = ("" if minus is None else "+") + (".4f" if name in IN_NATS else ".1f")
    by_student = minus is not None and 2 <= len(seeds) <= len(T_QUANTILES) + 1
    intervals = [interval, seed_interval(seeds)] if by_student else [interval]
    cell = " ".join([f"{value:{form}}", *(f"[{a:{form}}, {b:{form}}]" for a, b in intervals)])
    if minus is None:
        return cell + span(seeds, form)
    return f"**{cell}**" if all(low > 0 or high < 0 for low, high in intervals) else cell


def table_of_measures(folder: Path, runs: pd.DataFrame) -> str | None:
    """A row per arm at the last update, then a row per comparison with tandem GRPO.

    Arms are compared on the seeds that both have finished. None if nothing was measured.
    """
    measured = read_measures(folder, runs.arm.unique())
    old = all("drift_k3" in problems for problems in measured.problems)
    names = MEASURES if old else MEASURES[:-1]
    ends = measured[measured.finished].set_index("seed")
    ends = {arm: ends.problems[ends.arm == arm] for arm in measured.arm.unique()}
    rows = [[a, str(len(p)), *(measure_cell(p, n) for n in names)] for a, p in ends.items()]
    parts = [markdown_table(["arm", "seeds", *names], rows), unfinished(measured)]
    rows, first = [], ends.pop(COMPARED, None)
    for arm, other in ends.items() if first is not None else ():
        both = first.index.intersection(other.index)
        cells = [measure_cell(first[both], name, other[both]) for name in names]
        rows.append([f"{COMPARED} − {arm}", str(len(both)), *cells])
    parts += [markdown_table(["difference", "seeds", *names], rows)] if rows else []
    return "\n\n".join(filter(None, parts)) if len(measured) else None
