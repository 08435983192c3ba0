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

The example of the page and of figure 1 is chosen here as well. No model is run here, and no metric
computed.
"""

from collections.abc import Callable, Iterable
from math import isnan, nan
from operator import index
from pathlib import Path

import numpy as np
import pandas as pd

from lab.measures import SAMPLES, T_QUANTILES, bootstrap_interval, pass_at_k, seed_interval
from lab.runs import Refused, read_back, read_rows, seed_folders, unusable
from metrics import has_jargon, wilson_interval

# ------------------------------------------------------------------------------------------------
# Reading

COLUMNS = ["arm", "seed", "update", "who", "metric", "value", "n"]
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


def read_runs(folder: str | Path, arms: Iterable[str]) -> pd.DataFrame:
    """The runs of those arms of which every seed evaluated all three before training."""
    cells = []
    for arm in dict.fromkeys(arms):
        seeds = read_seeds(folder, arm, "metrics.jsonl", numbers_in)
        evaluated = [{who for _, who, *_ in rows[0]} for rows in seeds.values()]
        if all({"senior", "tandem", "junior"} <= everybody for everybody in evaluated):
            for seed, rows in seeds.items():
                cells += [(arm, seed, *number) for numbers in rows for number in numbers]
    return pd.DataFrame(cells, columns=COLUMNS)


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
    """A share of an arm in percent: a row per update and a column per seed."""
    cells = cells_of(runs, who, metric)
    return (100 * cells.pivot(index="update", columns="seed", values="value")).round(9)


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


def table_of_handoffs(folder: Path, runs: pd.DataFrame) -> str:
    """Handoffs per joint rollout before training, and where they are: a row per arm.

    "–" where old runs did not tell words and numbers apart.
    """
    rows = []
    for arm, of_arm in runs.groupby("arm", sort=False):
        counts = [pooled(of_arm, "tandem", name).value.get(0, nan) for name in HANDOFFS]
        rows.append([arm, *("–" if isnan(count) else f"{count:.1f}" for count in counts)])
    return markdown_table(["arm, together before training", *HANDOFFS.values()], rows)


# ------------------------------------------------------------------------------------------------
# The example: the first kept problem of the highest rank, on the page of rollouts and in Figure 1

EXAMPLES = {
    3: "the senior alone is right, the pair wrong with jargon, and in the end right without jargon",
    2: "the pair is wrong before training and right after it",
    1: "the pair loses its jargon",
    0: "none of this is so",
}


def sample_in(row: dict) -> dict:
    """A row of samples.jsonl, with whether it has jargon. Raises an error if it is no sample."""
    about = {key: row[key] for key in ("update", "who", "question", "gold", "spans")}
    if not {author for author, _ in row["spans"]} <= {"senior", "junior"}:
        raise ValueError("an author is unknown")
    text = "".join(text for _, text in row["spans"])
    return about | {"right": float(row["reward"]) == 1, "jargon": has_jargon(text)}


def rank_example(rollouts: list[dict]) -> int:
    """How plainly the rollouts of one problem show what training does: a key of EXAMPLES.

    rollouts: "who" wrote each, and whether it is "right" and has "jargon", in the order of updates.
    """
    alone = [rollout for rollout in rollouts if rollout["who"] == "senior"]
    joint = [rollout for rollout in rollouts if rollout["who"] == "tandem"]
    if not alone or not joint:
        return 0
    corrected = joint[-1]["right"] and not joint[0]["right"]
    lost = joint[0]["jargon"] and not joint[-1]["jargon"]
    best = corrected and lost and alone[0]["right"]
    return 3 if best else 2 if corrected else int(lost)


def choose_example(folder: Path) -> tuple[list[dict], str] | None:
    """The joint rollouts of the first problem of the highest rank, and how it was chosen.

    None if no problem of the arm "tandem" was kept at three evaluations.
    """
    problems: dict[tuple, list[dict]] = {}
    for seed, samples in read_seeds(folder, "tandem", "samples.jsonl", sample_in).items():
        for sample in samples:
            problems.setdefault((seed, sample["question"]), []).append(sample)
    kept = [p for p in problems.values() if sum(r["who"] == "tandem" for r in p) >= 3]
    ranks = [rank_example(rollouts) for rollouts in kept]
    if not ranks:
        return None
    best = max(ranks)
    why = f"Example: the first of {len(ranks)} kept problems such that {EXAMPLES[best]} "
    why += f"({ranks.count(best)} of them)."
    return [r for r in kept[ranks.index(best)] if r["who"] == "tandem"], why


# ------------------------------------------------------------------------------------------------
# Tandem RL: the measures of lab/measures.py

COMPARED = "rlvr-tandem"  # with each of the others
PASS, RIGHT = "pass@4", f"right_of_{SAMPLES}"
CONTINUED = ["continued_25", "continued_50", "continued_75"]
IN_NATS = ("legibility", "drift", "drift_k3")  # per token; every other measure is a share
MEASURES = ["solo", PASS, "handoff", "word", "retention", *CONTINUED, *IN_NATS]

Ends = dict[int, pd.DataFrame]  # {seed: a row per problem, a column per measure}


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


def read_ends(folder: str | Path, arms: Iterable[str]) -> tuple[dict[str, Ends], str]:
    """The measures of every arm at the last update, and a sentence on runs that have not finished.

    Raises Refused unless all were measured at the same update on equally many of the same problems
    (a seed always draws the same ones).
    """
    ends: dict[str, Ends] = {}
    unfinished, alike = [], {}  # alike: {how a run was measured: the first such run}
    for arm in arms:
        for seed, rows in read_seeds(folder, arm, "measures.jsonl", measures_in).items():
            flags = read_flags(folder, arm, updates=int, problems=str, validation=bool)
            (update, problems), run = rows[-1], f"{arm} seed {seed}"
            if update < flags["updates"]:
                unfinished.append(run)
                continue
            if PASS not in problems:
                path = Path(folder, arm, f"seed-{seed}", "measures.jsonl")
                raise unusable(path, f"its last row lacks {RIGHT}")
            drawn = flags["problems"] + " (validation)" * flags["validation"]
            alike.setdefault(f"update {update}, {len(problems)} problems of {drawn}", run)
            ends.setdefault(arm, {})[seed] = problems
    if len(alike) > 1:
        listed = "; ".join(f"{run}: {how}" for how, run in alike.items())
        raise Refused(f"{folder}: runs that were not measured alike cannot be compared ({listed})")
    note = f"Left out at the end, because not finished: {', '.join(unfinished)}."
    return ends, note if unfinished else ""


def pairs_of(ends: dict[str, Ends]) -> dict[str, tuple[list, list]]:
    """{arm: (tandem GRPO, this arm)}, each on the seeds that both have finished."""
    first, pairs = ends.get(COMPARED, {}), {}
    for arm, other in ends.items():
        both = [seed for seed in first if seed in other and arm != COMPARED]
        if both:
            pairs[arm] = [first[seed] for seed in both], [other[seed] for seed in both]
    return pairs


def estimate(name: str, *arms: list) -> tuple[float, list[tuple], list[float]]:
    """A measure at the end: its value, its intervals, and its value in every seed.

    arms: the problems of the S seeds of an arm, or of two, whose difference is taken. The intervals
    are the bootstrap's and, of a difference, Student's. Shares are in percent. Without a right
    solution, retention is nan.
    """
    columns = ["handoff", "solo"] if name == "retention" else [name]
    # The numbers of both arms on a problem stay side by side: (S, N, K) or (S, N, 2K).
    values = [np.stack([problems[columns] for problems in seeds]) for seeds in arms]
    values = np.concatenate(values, axis=2)

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


def measure_cell(name: str, *arms: list) -> str:
    """mean [95 % interval] (range of the seeds), or difference [bootstrap] [Student's t].

    A difference is bold if both intervals are without 0.
    """
    value, intervals, by_seed = estimate(name, *arms)
    form = ("+" if len(arms) == 2 else "") + (".4f" if name in IN_NATS else ".1f")
    cell = " ".join([f"{value:{form}}", *(f"[{a:{form}}, {b:{form}}]" for a, b in intervals)])
    if len(arms) == 1:
        return cell + span(by_seed, form)
    return f"**{cell}**" if all(low > 0 or high < 0 for low, high in intervals) else cell


def table_of_measures(folder: Path, runs: pd.DataFrame) -> str | None:
    """A row per arm at the last update, then a row per comparison; None if nothing was measured."""
    ends, unfinished = read_ends(folder, runs.arm.unique())
    if not ends:
        return None
    old = all("drift_k3" in problems for seeds in ends.values() for problems in seeds.values())
    names = MEASURES if old else MEASURES[:-1]
    arms = {arm: [list(seeds.values())] for arm, seeds in ends.items()}
    pairs = {f"{COMPARED} − {arm}": pair for arm, pair in pairs_of(ends).items()}
    parts = []
    for heading, compared in [("arm", arms), ("difference", pairs)]:
        rows = [
            [row, str(len(of_row[0])), *(measure_cell(name, *of_row) for name in names)]
            for row, of_row in compared.items()
        ]
        parts.append(markdown_table([heading, "seeds", *names], rows) if rows else "")
    return "\n\n".join(filter(None, [parts[0], unfinished, parts[1]]))
