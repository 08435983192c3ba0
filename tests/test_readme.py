"""What the READMEs say is there: files, tables, and each number with its arm, update and metric."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lab import tables

HERE = Path(__file__).parent.parent
TINY, SMOL, QWEN, CONTROLS = (HERE / "results" / n for n in ("tiny", "smol", "qwen", "controls"))
PAGES = ["README.md", "results/README.md", "results/open-choices.md", "exercises.md"]
PAGES += ["results/qwen/README.md"]
PAGES = {HERE / name: (HERE / name).read_text(encoding="utf-8") for name in PAGES}
README, RESULTS, CHOICES, *_ = PAGES.values()
RESULTS_TEXT = " ".join(RESULTS.split())
# The numbers of the README in their order: folder, arm, who, metric, update.
CLAIMS = [
    ("99.0 % [94.6, 99.8]", QWEN, "tandem", "senior", "jargon", 0),
    ("0.0 % [0.0, 3.7]", QWEN, "tandem", "senior", "jargon", 5),
    ("98.0 % [93.0, 99.4]", QWEN, "solo", "senior", "jargon", 10),
    ("0.0 % [0.0, 3.7]", QWEN, "imitation", "senior", "jargon", 10),
    ("36.0 % [27.3, 45.8]", QWEN, "tandem", "senior", "accuracy", 0),
    ("19.0 % [12.5, 27.8]", QWEN, "tandem", "senior", "accuracy", 10),
    ("27.0 % [19.3, 36.4]", QWEN, "imitation", "senior", "accuracy", 10),
    ("26.0 % [18.4, 35.4]", QWEN, "solo", "senior", "accuracy", 10),
    ("13.0 % [7.8, 21.0]", QWEN, "tandem", "junior", "accuracy", 0),
    ("97.3 % [95.7, 98.4]", TINY, "tandem", "senior", "jargon", 0),
    ("0.0 % [0.0, 0.6]", TINY, "tandem", "senior", "jargon", 20),
    ("99.8 % [99.1, 100.0]", TINY, "solo", "senior", "jargon", 28),
    ("12.3 % [9.9, 15.2]", TINY, "imitation", "senior", "jargon", 8),
    ("9.8 % [7.7, 12.5]", TINY, "tandem", "senior", "jargon", 8),
    ("99.7 % [99.1, 99.9]", TINY, "grpo-solo", "senior", "jargon", 80),
]
IDEA = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
NUMBER = r"\d+\.\d % \[\d+\.\d, \d+\.\d\]"


def stated_in(text: str) -> list[str]:
    return re.findall(NUMBER, " ".join(text.split()))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[path])
    assert links
    here = [link for link in links if not link.startswith("http")]
    assert [link for link in here if not (path.parent / link).exists()] == []


def test_the_readme_states_only_these_numbers():
    assert stated_in(README) == [claim[0] for claim in CLAIMS]
    assert len(README.split()) <= 1000


def test_the_idea_can_be_pasted(tmp_path, capsys):
    """The block of Python of the README, with less to do."""
    less = {"runs/idea": str(tmp_path), '"cpu"': '"cpu", "specialist_steps": 2', "17": "2"}
    shorter = IDEA
    for long, short in less.items():
        assert long in shorter
        shorter = shorter.replace(long, short)
    exec(shorter, {})
    assert re.search(r"update 1: right \d+%, jargon \d+%\n$", capsys.readouterr().out)


@pytest.mark.parametrize(("number", "folder", "arm", "who", "metric", "update"), CLAIMS)
def test_numbers_are_those_of_the_files(number, folder, arm, who, metric, update):
    point = tables.pooled(tables.read_runs(folder, [arm]), who, metric).loc[update]
    assert number == tables.with_interval(point).replace(" [", " % [")


# ------------------------------------------------------------------------------------------------
# results/README.md and results/tables/

# What the tables call a number, {heading: (who, metric)}, followed by its update.
WHAT = {"jargon": ("senior", "jargon"), "right alone": ("senior", "accuracy")}
WHAT |= {"right together": ("tandem", "accuracy"), "junior right": ("junior", "accuracy")}
WHAT |= {"in the junior's language": ("senior", "languages.{junior}")}
WHAT |= {"handoffs": ("tandem", "handoffs"), "inside expressions": ("tandem", "handoffs_inside")}
# The percentages between the tables in their order: folder, arm, who, metric, update.
RESULTS_CLAIMS = [
    ("99.0 % [94.6, 99.8]", "qwen", "tandem", "senior", "jargon", 0),
    ("36.0 % [27.3, 45.8]", "qwen", "tandem", "senior", "accuracy", 0),
    ("13.0 % [7.8, 21.0]", "qwen", "tandem", "junior", "accuracy", 0),
    ("0.2 %", "tiny", "tandem", "senior", "jargon", 12),
    ("97.3 % [95.7, 98.4]", "tiny", "tandem", "senior", "jargon", 0),
    ("74.2 % [70.5, 77.5]", "tiny", "tandem", "senior", "accuracy", 0),
    ("50.2 % [46.2, 54.2]", "tiny", "tandem", "junior", "accuracy", 0),
    ("50.3 % [46.3, 54.3]", "tiny", "tandem", "tandem", "accuracy", 0),
    ("89.8 % [87.2, 92.0]", "tiny/dose/0.12", "grpo-tandem", "senior", "accuracy", 0),
    ("74.2 %", "controls", "reinforce-j1", "senior", "accuracy", 0),
    ("74.8 %", "controls", "de-fr-reinforce-j1", "senior", "accuracy", 0),
    ("50.8 %", "controls", "reinforce-j1", "junior", "accuracy", 0),
    ("41.0 %", "controls", "de-fr-reinforce-j1", "junior", "accuracy", 0),
    ("51.2 %", "controls", "reinforce-junior-shuffled", "senior", "accuracy", 80),
    ("53.8 %", "controls", "reinforce-imitation-shuffled", "senior", "accuracy", 80),
    ("98.7 %", "tiny", "de-en-tandem", "senior", "languages.en", 40),
    ("0.5 %", "tiny", "fr-de-tandem", "senior", "languages.en", "at its highest"),
    ("0.3 %", "tiny", "de-fr-tandem", "senior", "languages.en", "at its highest"),
    ("61.5 % [54.6, 68.0]", "smol", "tandem", "senior", "accuracy", 0),
    ("62.9 % [59.9, 65.8]", "smol/eval-500", "tandem", "senior", "accuracy", 0),
    ("61.8 % [58.7, 64.8]", "smol/eval-500", "tandem", "senior", "accuracy", 24),
    ("48.3 % [45.2, 51.4]", "smol/eval-500", "tandem", "junior", "accuracy", 0),
    ("27.5 % [21.8, 34.1]", "smol", "en-de-tandem", "junior", "accuracy", 0),
    ("0.0 % [0.0, 0.6]", "tiny", "tandem", "senior", "jargon", 20),
    ("0.0 % [0.0, 3.7]", "qwen", "tandem", "senior", "jargon", 5),
    ("99.8 % [99.1, 100.0]", "tiny", "solo", "senior", "jargon", 28),
    ("98.0 % [93.0, 99.4]", "qwen", "solo", "senior", "jargon", 10),
    ("66.2 % [62.3, 69.8]", "tiny", "tandem", "senior", "accuracy", 8),
    ("50.2 % [46.2, 54.2]", "tiny", "tandem", "junior", "accuracy", 0),
    ("19.0 % [12.5, 27.8]", "qwen", "tandem", "senior", "accuracy", 10),
    ("13.0 % [7.8, 21.0]", "qwen", "tandem", "junior", "accuracy", 0),
    ("98.7 % [97.4, 99.3]", "tiny", "de-en-tandem", "senior", "languages.en", 40),
    ("0.5 % [0.2, 1.5]", "tiny", "fr-de-tandem", "senior", "languages.en", "at its highest"),
    ("69.8 % [66.0, 73.4]", "tiny", "c-0.3-j0.2", "senior", "accuracy", 28),
    ("72.2 % [68.4, 75.6]", "tiny", "c0-j1", "senior", "accuracy", 28),
]


@cache
def runs_of(folder: str, arm: str):
    return tables.read_runs(HERE / "results" / folder, [arm])


def tables_in(text: str) -> list[list[list[str]]]:
    """The cells of every Markdown table, without the line below its headings."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    lines = [[line for line in block.splitlines() if "|---" not in line] for block in blocks]
    return [[[cell.strip() for cell in line[1:-1].split("|")] for line in block] for block in lines]


def forms_of(folder: str, arm: str, who: str, metric: str, when: int | str) -> list[str]:
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
    update = ends[when] if when in ends else int(str(when).removeprefix("at update "))
    of_seeds = ", ".join(f"{value:.1f}" for value in seeds.loc[update])
    return [f"{points.value[update]:.1f}", tables.with_interval(points.loc[update]), of_seeds]


def test_small_tables_are_measured():
    """A table of arms names its folder; a heading says what was measured, and when."""
    checked = 0
    for (corner, *headings), *rows in tables_in(RESULTS):
        for arm, *cells in rows if corner.startswith("arm in ") else ():
            for heading, cell in zip(headings, cells, strict=True):
                what, when = re.fullmatch("(.+?) (at .+|is under 5 %)", heading).groups()
                who, metric = WHAT[what]
                place = corner[7:], arm, who, metric.format(junior=arm[3:5]), when
                assert cell in forms_of(*place), (arm, heading, forms_of(*place))
                checked += 1
    assert checked > 150


def test_percentages_between_the_tables_are_measured():
    elsewhere = re.sub(r"^\| arm in .*\n(\|.*\n)+|^    .*\n", "", RESULTS, flags=re.MULTILINE)
    found = re.findall(r"\d+\.\d %(?: \[[^]]*\])?", " ".join(elsewhere.split()))
    assert found == [claim[0] for claim in RESULTS_CLAIMS]
    for number, *place in RESULTS_CLAIMS:
        assert number.replace(" %", "") in forms_of(*place)
    assert len(RESULTS.split()) <= 4100


def test_statistics_of_the_results_are_right():
    """Tandem minus imitation in de-fr, with all solutions independent and seed by seed; in how many
    seeds the senior falls below its junior."""
    below = []
    for pair in ("en-de", "de-en", "de-fr", "fr-de"):
        runs = runs_of("tiny", f"{pair}-tandem")
        senior, junior = (tables.by_seed(runs, who, "accuracy") for who in ("senior", "junior"))
        below.append((senior.min() < junior.loc[0]).sum())
    assert "in {}, {}, {} and {} of the three seeds".format(*below) in RESULTS_TEXT
    runs = [runs_of("tiny", f"de-fr-{arm}") for arm in ("tandem", "imitation")]
    seeds = np.array([tables.by_seed(of_arm, "senior", "accuracy").loc[40] for of_arm in runs])
    seeds *= 100
    gap = np.subtract(*seeds.mean(axis=1))
    width = 1.96 * np.sqrt((seeds.mean(axis=1) * (100 - seeds.mean(axis=1)) / 600).sum())
    assert f"by {gap:+.1f} points [{gap - width:+.1f}, {gap + width:+.1f}]" in RESULTS_TEXT
    assert "({:+.1f}, {:+.1f} and {:+.1f})".format(*np.subtract(*seeds)) in RESULTS_TEXT


def student_p(differences: np.ndarray) -> float:
    """Two-sided p of the mean of five differences: Student's t, four degrees of freedom."""
    t = abs(differences.mean()) / (differences.std(ddof=1) / np.sqrt(5))
    s = 1 + t**2 / 4
    return 1 - 0.75 * t / np.sqrt(s) * (1 - t**2 / (12 * s))


def test_tandem_rl_is_measured():
    """Holm's correction multiplies the smallest of 11 p by 11, the next by 10, and so on."""
    ends = tables.read_ends(TINY, ["rlvr-tandem", "rlvr-solo", "rlvr-solo-kl"])
    pairs, ps = tables.pairs_of(ends), {}
    for arm, pair in pairs.items():
        found = [np.array(tables.estimate(name, *pair)[2]) for name in tables.MEASURES]
        ps[arm] = np.sort([student_p(differences) for differences in found]) * range(11, 0, -1)
    assert f"corrected p is {ps['rlvr-solo'][0]:.2f})" in RESULTS_TEXT
    assert f"corrected p = {ps['rlvr-solo-kl'][0]:.4f})" in RESULTS_TEXT
    assert ps["rlvr-solo-kl"][1] > 0.05
    (rows,) = [rows for (corner, *_), *rows in tables_in(RESULTS) if corner == "measure"]
    assert len(rows) == 6
    for name, *_, values, difference in rows:
        form = ".4f" if name in tables.IN_NATS else ".1f"
        both = [f"{tables.estimate(name, end)[0]:{form}}" for end in pairs["rlvr-solo"]]
        value, (_, bounds), _ = tables.estimate(name, *pairs["rlvr-solo"])
        interval = ", ".join(f"{bound:+{form}}" for bound in bounds)
        assert [values, difference] == [", ".join(both), f"{value:+{form}} [{interval}]"]


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
    for arms, first, stated in (("grpo", 1, "1.3 times"), ("rlvr", 0, "Tandem RL 1.4 times")):
        seconds = [
            sum(
                row.get("seconds_rollout", 0) + row.get("seconds_update", 0)
                for seed, rows in tables.read_seeds(TINY, arm, "metrics.jsonl").items()
                for row in rows
                if seed >= first
            )
            for arm in (f"{arms}-tandem", f"{arms}-solo")
        ]
        assert stated in RESULTS_TEXT
        assert stated.endswith(f"{seconds[0] / seconds[1]:.1f} times")


def test_differences_are_measured():
    (rows,) = [rows for (corner, *_), *rows in tables_in(RESULTS) if corner == "difference"]
    runs = tables.read_runs(CONTROLS, tables.arms_in(CONTROLS))
    runs = runs.sort_values("arm", key=lambda arms: ~arms.str.endswith("-j1"), kind="stable")
    (found,) = tables_in(tables.table_of_differences(CONTROLS, runs) + "\n")
    assert len(rows) == 4
    assert [row for row in rows if row not in found] == []


def test_twins_are_those_of_the_file():
    twins = (HERE / "results/training-twins.txt").read_text()
    found = [float(share) * 2 for share in re.findall(r"any (.+)%", twins)]
    assert (
        "test problems of seeds 0 to 2, {:.0f}, {:.0f} and {:.0f} ".format(*found) in RESULTS_TEXT
    )


def full_tables(root: Path) -> str:
    """Every arm in the folders below root, with all columns."""
    parts = []
    for folder in sorted({path.parents[2] for path in root.rglob("metrics.jsonl")}):
        runs = tables.read_runs(folder, tables.arms_in(folder))
        if len(runs):
            parts += [f"# {folder.relative_to(root.parent)}", tables.table(runs)]
            parts += filter(None, [tables.table_of_measures(folder, runs)])
    return "\n\n".join(parts) + "\n"


@pytest.mark.parametrize("root", [TINY, QWEN, SMOL, CONTROLS], ids=lambda root: root.name)
def test_full_tables_are_those_of_the_files(root, tmp_path):
    committed, made = HERE / "results" / "tables" / f"{root.name}.md", tmp_path / "made.md"
    made.write_text(full_tables(root), encoding="utf-8")
    assert committed.read_text(encoding="utf-8") == made.read_text(), f"cp {made} {committed}"


def test_the_contents_lead_to_headings():
    headings = re.findall(r"^#+ (.*)", RESULTS, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", name.lower()).replace(" ", "-") for name in headings}
    linked = set(re.findall(r"\]\(#([^)]+)\)", RESULTS))
    assert len(linked) > 8
    assert linked <= anchors


def test_every_choice_that_the_paper_leaves_open_has_a_row():
    """A mark belongs to the function around it, or to the constant below it."""
    marks = 0
    for path in sorted([*HERE.glob("*.py"), *HERE.glob("lab/*.py")]):
        lines = path.read_text(encoding="utf-8").splitlines()
        for i, line in enumerate(lines):
            if line.strip().startswith("# Open in paper:"):
                marks += 1
                file = path.relative_to(HERE).as_posix()
                above = re.findall(r"^def (\w+)", "\n".join(lines[:i]), re.MULTILINE)
                names = (
                    above[-1:] if line.startswith(" ") else re.findall(r"^(\w+) =", lines[i + 1])
                )
                assert f"`{(names or ['DEFAULTS'])[0]}`, {file}" in CHOICES or file in CHOICES
    assert marks > 8
