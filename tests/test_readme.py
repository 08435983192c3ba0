"""What the READMEs say is there: files, tables, and each number with its arm, update and metric."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lab import tables

HERE = Path(__file__).parent.parent
ROOTS = [HERE / "results" / name for name in ("tiny", "qwen", "smol", "controls", "questions")]
TINY, QWEN, SMOL, CONTROLS, QUESTIONS = ROOTS
PAGES = "README.md results/README.md results/open-choices.md exercises.md results/qwen/README.md"
PAGES = [*(HERE / name for name in PAGES.split()), *sorted(QUESTIONS.glob("*/README.md"))]
PAGES = {path: path.read_text(encoding="utf-8") for path in PAGES}
README, RESULTS, CHOICES, *_ = PAGES.values()
RESULTS_TEXT = " ".join(RESULTS.split())
# The numbers of a page between its tables in their order: folder, arm, who, metric, update.
STATED = {
    "README.md": """
tiny tandem senior jargon 0 | qwen tandem senior jargon 0 | tiny tandem senior jargon 20
qwen tandem senior jargon 10 | tiny imitation senior jargon 20 | qwen imitation senior jargon 10
tiny solo senior jargon 20 | qwen solo senior jargon 10 | tiny reinforce-j0 senior jargon 80
qwen/grpo grpo-tandem senior jargon 20 | tiny grpo-solo senior jargon 80
qwen/grpo grpo-solo senior jargon 20 | controls reinforce-j0-shuffled senior jargon 80
qwen imitation senior jargon 5 | qwen tandem senior accuracy 0
qwen tandem senior accuracy 20 | qwen tandem junior accuracy 0
qwen tandem tandem accuracy 0 | qwen tandem tandem accuracy 20
qwen/languages de-fr-tandem senior languages.en 0
qwen/languages de-fr-tandem senior languages.en 4
qwen/languages de-fr-tandem senior languages.fr 6
qwen/languages de-fr-imitation senior languages.en 2 | tiny tandem senior accuracy 28
tiny imitation senior accuracy 28 | tiny solo senior accuracy 28""",
    "results/README.md": """
qwen tandem senior accuracy 20 | qwen tandem senior jargon 0 | qwen tandem senior accuracy 0
qwen tandem junior accuracy 0 | qwen tandem tandem accuracy 0 | qwen tandem tandem accuracy 20
qwen/languages de-fr-tandem senior languages.fr 6
qwen/grpo grpo-tandem senior jargon 20 | qwen/grpo grpo-solo senior jargon 20
qwen/grpo grpo-solo senior accuracy 20 | qwen/grpo grpo-tandem senior accuracy 20
tiny tandem senior jargon 12
tiny tandem senior jargon 0 | tiny tandem senior accuracy 0 | tiny tandem junior accuracy 0
tiny tandem tandem accuracy 0 | controls reinforce-j1 senior accuracy 0
controls de-fr-reinforce-j1 senior accuracy 0
controls reinforce-j1 junior accuracy 0 | controls de-fr-reinforce-j1 junior accuracy 0
controls reinforce-junior-shuffled senior accuracy 80
controls reinforce-imitation-shuffled senior accuracy 80 | tiny de-en-tandem senior languages.en 40
tiny fr-de-tandem senior languages.en at its highest
tiny de-fr-tandem senior languages.en at its highest | smol tandem senior accuracy 0
smol/eval-500 tandem senior accuracy 0 | smol/eval-500 tandem senior accuracy 24
smol/eval-500 tandem junior accuracy 0
tiny tandem senior jargon 20 | qwen tandem senior jargon 5 | tiny solo senior jargon 28
qwen solo senior jargon 10 | tiny tandem senior accuracy 8 | tiny tandem junior accuracy 0
qwen tandem senior accuracy 20 | qwen tandem junior accuracy 0
tiny de-en-tandem senior languages.en 40 | qwen/languages de-fr-tandem senior languages.fr 6
tiny fr-de-tandem senior languages.en at its highest
qwen/languages de-fr-tandem senior languages.en 4 | tiny c-0.3-j0.2 senior accuracy 28
tiny c0-j1 senior accuracy 28""",
}
LONGEST = {"README.md": 1000, "results/README.md": 4100}  # words


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(HERE)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[path])
    assert links
    here = [link for link in links if not link.startswith("http")]
    assert [link for link in here if not (path.parent / link).exists()] == []


def test_the_length_of_the_files_is_right():
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in HERE.glob("*.py"))
    assert f"{round(lines, -2):,} lines with comments" in README


def test_the_idea_can_be_pasted(tmp_path, capsys):
    """The block of Python of the README, with less to do."""
    less = {"runs/idea": str(tmp_path), '"cpu"': '"cpu", "specialist_steps": 2', "17": "2"}
    shorter = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    for long, short in less.items():
        assert long in shorter
        shorter = shorter.replace(long, short)
    exec(shorter, {})
    assert re.search(r"update 1: right \d+%, jargon \d+%\n$", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------
# results/README.md and results/tables/

# What the tables call a number, {heading: (who, metric)}, followed by its update.
WHAT = {"jargon": ("senior", "jargon"), "right alone": ("senior", "accuracy")}
WHAT |= {"right together": ("tandem", "accuracy"), "junior right": ("junior", "accuracy")}
WHAT |= {"in the junior's language": ("senior", "languages.{junior}")}
WHAT |= {"handoffs": ("tandem", "handoffs"), "inside expressions": ("tandem", "handoffs_inside")}
WHAT |= {"in English": ("senior", "languages.en"), "reversed": ("senior", "reversed")}


@cache
def runs_of(folder: str, arm: str):
    return tables.read_runs(HERE / "results" / folder, [arm])


def tables_in(text: str) -> list[list[list[str]]]:
    """The cells of every Markdown table, without the line below its headings."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    lines = [[line for line in block.splitlines() if "|---" not in line] for block in blocks]
    return [[[cell.strip() for cell in line[1:-1].split("|")] for line in block] for block in lines]


def forms_of(folder: str, arm: str, who: str, metric: str, when: str) -> list[str]:
    """How a number may be stated: without or with its interval, or seed by seed."""
    runs = runs_of(folder, arm)
    points, seeds = tables.pooled(runs, who, metric), tables.by_seed(runs, who, metric)
    seeds = (100 if tables.is_share(runs, metric) else 1) * seeds.round(9)
    if when == "is under 5 %":
        firsts = [min(seed.index[seed < 5], default="never") for _, seed in seeds.items()]
        return [", ".join(map(str, firsts))]
    if when == "at its lowest":
        lowest = points.value.idxmin()
        return [f"{points.value[lowest]:.1f} at update {lowest}"]
    ends = {"at the end": points.index[-1], "at its highest": points.value.idxmax()}
    update = ends[when] if when in ends else int(when.removeprefix("at update "))
    of_seeds = ", ".join(f"{value:.1f}" for value in seeds.loc[update])
    return [f"{points.value[update]:.1f}", tables.with_interval(points.loc[update]), of_seeds]


def test_small_tables_are_measured():
    """A table of arms names its folder; a heading says what was measured, and when."""
    checked = 0
    for (corner, *headings), *rows in tables_in("\n".join(PAGES.values())):
        for arm, *cells in rows if corner.startswith("arm in ") else ():
            for heading, cell in zip(headings, cells, strict=True):
                what, when = re.fullmatch("(.+?) (at .+|is under 5 %)", heading).groups()
                who, metric = WHAT[what]
                place = corner[7:], arm, who, metric.format(junior=arm[3:5]), when
                assert cell in forms_of(*place), (arm, heading, forms_of(*place))
                checked += 1
    assert checked > 200


@pytest.mark.parametrize("name", STATED)
def test_numbers_between_the_tables_are_measured(name):
    text = PAGES[HERE / name]
    elsewhere = re.sub(r"^\| arm in .*\n(\|.*\n)+|^    .*\n", "", text, flags=re.MULTILINE)
    found = re.findall(r"\d+\.\d %(?: \[[^]]*\])?", " ".join(elsewhere.split()))
    places = STATED[name].strip().replace("\n", " | ").split(" | ")
    for number, place in zip(found, places, strict=True):
        assert number.replace(" %", "") in forms_of(*place.split(" ", 4)), place
    assert len(text.split()) <= LONGEST[name]


def test_the_senior_falls_below_its_junior():
    """In how many seeds of each pair of languages, on the way."""
    below = []
    for pair in ("en-de", "de-en", "de-fr", "fr-de"):
        runs = runs_of("tiny", f"{pair}-tandem")
        senior, junior = (tables.by_seed(runs, who, "accuracy") for who in ("senior", "junior"))
        below.append((senior.min() < junior.loc[0]).sum())
    assert "in {}, {}, {} and {} of the three seeds".format(*below) in RESULTS_TEXT


def student_p(differences: np.ndarray) -> float:
    """Two-sided p of the mean of five differences: Student's t, four degrees of freedom."""
    t = abs(differences.mean()) / (differences.std(ddof=1) / np.sqrt(5))
    s = 1 + t**2 / 4
    return 1 - 0.75 * t / np.sqrt(s) * (1 - t**2 / (12 * s))


def test_tandem_rl_is_measured():
    """Holm's correction multiplies the smallest of 10 p by 10, the next by 9, and so on."""
    ends = tables.read_ends(TINY, ["rlvr-tandem", "rlvr-solo", "rlvr-solo-kl-0.1"])
    pairs, ps = tables.pairs_of(ends), {}
    for arm, pair in pairs.items():
        found = [np.array(tables.estimate(name, *pair)[2]) for name in tables.MEASURES]
        ps[arm] = np.sort([student_p(differences) for differences in found]) * range(10, 0, -1)
    assert f"smallest corrected p, {ps['rlvr-solo'][0]:.2f}, is against tandem" in RESULTS_TEXT
    assert f"corrected p = {ps['rlvr-solo-kl-0.1'][0]:.2f})" in RESULTS_TEXT
    assert ps["rlvr-solo-kl-0.1"][1] > 0.05
    (rows,) = [t[1:] for t in tables_in(RESULTS) if (t[0][0], len(t)) == ("measure", 7)]
    for name, *_, values, difference in rows:
        form = ".4f" if name in tables.IN_NATS else ".1f"
        both = [f"{tables.estimate(name, end)[0]:{form}}" for end in pairs["rlvr-solo"]]
        value, (_, bounds), _ = tables.estimate(name, *pairs["rlvr-solo"])
        interval = ", ".join(f"{bound:+{form}}" for bound in bounds)
        assert [values, difference] == [", ".join(both), f"{value:+{form}} [{interval}]"]


def seconds_of_updates(arm: str, first_seed: int) -> float:
    """Without evaluations, over the seeds from `first_seed` on."""
    seeds = tables.read_seeds(TINY, arm, "metrics.jsonl")
    rows = [row for seed in seeds if seed >= first_seed for row in seeds[seed]]
    return sum(row.get(f"seconds_{part}", 0) for row in rows for part in ("rollout", "update"))


def test_costs_are_measured():
    benchmark = json.loads((HERE / "results/benchmark.json").read_text())
    (rows,) = [rows for (corner, *_), *rows in tables_in(RESULTS) if corner == "pair"]
    ratios = [row for part in ("tiny", "smol") for row in benchmark[part]["rows"]]
    ratios = [row for row in ratios if "of_generate" in row]
    for (pair, batch, *cells), row in zip(rows, ratios, strict=True):
        assert (pair, batch) == (row["pair"], str(row["batch"]))
        assert cells == [f"{row['of_generate'][how]:.2f}" for how in ("plain", "tandem", "solo")]
    of_full = benchmark["update"]["rows"][1]["of_full"]
    assert "{seconds:.2f} of the time and {peak_mib:.2f} of".format(**of_full) in RESULTS_TEXT
    # Seed 0 of the first two shared the machine with other programs.
    for setting, first, stated in (("grpo", 1, "1.3 times"), ("rlvr", 0, "Tandem RL 1.4 times")):
        tandem, solo = (seconds_of_updates(f"{setting}-{arm}", first) for arm in ("tandem", "solo"))
        assert stated in RESULTS_TEXT
        assert stated.endswith(f"{tandem / solo:.1f} times")


def test_differences_are_measured():
    """The first arm of each folder here is the one that others are compared with."""
    found = []
    for folder, arms in ((TINY, ["tandem", "imitation"]), (CONTROLS, tables.arms_in(CONTROLS))):
        runs = tables.read_runs(folder, sorted(arms, key=lambda arm: not arm.endswith("-j1")))
        found += tables_in(tables.table_of_differences(folder, runs) + "\n")[0]
    tables_of_differences = [t for t in tables_in(RESULTS) if t[0][0] == "difference"]
    assert [len(rows) for rows in tables_of_differences] == [2, 5]
    assert [row for rows in tables_of_differences for row in rows if row not in found] == []


def test_twins_are_those_of_the_file():
    twins = (HERE / "results/training-twins.txt").read_text()
    found = [f"{float(share) * 2:.0f}" for share in re.findall(r"any (.+)%", twins)]
    assert "test problems of seeds 0 to 2, {}, {} and {} ".format(*found) in RESULTS_TEXT


def test_gains_of_the_readers_are_those_of_the_file():
    """On the problems that the senior alone solves both times; the last column is of all."""
    folder = QUESTIONS / "readers"
    rows = map(json.loads, (folder / "readers.jsonl").read_text().splitlines())
    of_run = {(row["arm"], row["seed"]): {**row, "arm": 0} for row in rows}
    (_, first, *stated), *_ = tables_in(PAGES[folder / "README.md"])
    assert (first[0], len(stated)) == ("before training", 5)
    for name, num_seeds, *cells in [first, *stated]:
        arm, found, right = name.split()[0], [], []
        for reader in ("base_50", "other_50"):
            gains, of_arm = [], [of_run[arm, seed] for seed in range(int(num_seeds))]
            for seed, end in enumerate(of_arm):
                start = of_run["before", seed]
                both = np.multiply(start["solo"], end["solo"]).astype(bool)
                gains.append(np.subtract(end[reader], start[reader])[both].mean())
            found.append("" if arm == "before" else ", ".join(f"{100 * x:+.1f}" for x in gains))
            right.append(f"{100 * np.mean([end[reader] for end in of_arm]):.1f}")
        assert cells == [*found, ", ".join(right)]


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.name)
def test_full_tables_are_those_of_the_files(root, tmp_path):
    """Every arm in the folders below root with all columns, and all evaluations."""
    parts, evaluations = [], {}
    for folder in sorted({path.parents[2] for path in root.rglob("metrics.jsonl")}):
        runs = tables.read_runs(folder, tables.arms_in(folder))
        if len(runs):
            name = folder.relative_to(root.parent).as_posix()
            parts += [f"# {name}", tables.all_tables(folder, runs)]
            evaluations[name] = tables.evaluations(folder)
    csv = pd.concat(evaluations, names=["folder"]).droplevel(1).to_csv(lineterminator="\n")
    for ending, text in {"md": "\n\n".join(parts) + "\n", "csv": csv}.items():
        committed = HERE / "results" / "tables" / f"{root.name}.{ending}"
        (made := tmp_path / committed.name).write_text(text, encoding="utf-8")
        assert committed.read_text(encoding="utf-8") == text, f"cp {made} {committed}"


def test_the_contents_lead_to_headings():
    headings = re.findall(r"^#+ (.*)", RESULTS, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", name.lower()).replace(" ", "-") for name in headings}
    linked = set(re.findall(r"\]\(#([^)]+)\)", RESULTS))
    assert len(linked) > 8
    assert linked <= anchors


def test_every_choice_that_the_paper_leaves_open_has_a_row():
    marked = []
    for path in [*HERE.glob("*.py"), *HERE.glob("lab/*.py")]:
        marks = re.findall(r"^ *# .*Open in paper:", path.read_text(encoding="utf-8"), re.MULTILINE)
        marked += [path.relative_to(HERE).as_posix()] * len(marks)
    assert [name for name in marked if f"{name} |" not in CHOICES] == []
    assert len(marked) > 8
