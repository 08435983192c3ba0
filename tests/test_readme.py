"""What the READMEs say is there: files, tables, and each number with its arm, update and metric."""

import re
from pathlib import Path

import pytest

from lab import figures, tables
from lab.experiments import SETTINGS
from tandem import SCHEDULES

HERE = Path(__file__).parent.parent
TINY, SMOL, QWEN = (HERE / "results" / name for name in ("tiny", "smol", "qwen"))
PAGES = ["README.md", "results/README.md", "results/open-choices.md", "exercises.md"]
PAGES += ["results/qwen/README.md"]
PAGES = {HERE / name: (HERE / name).read_text(encoding="utf-8") for name in PAGES}
README, RESULTS, CHOICES, *_ = PAGES.values()
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


@pytest.mark.parametrize("setting", SETTINGS)
def test_tables_are_those_of_the_results(setting):
    """Each row is what lab/figures.py makes of the committed files."""
    runs = tables.read_runs(TINY, figures.arms_of(TINY, setting))
    rows = tables.table(runs).splitlines()
    assert len(rows) >= 4
    assert [row for row in rows if row not in RESULTS] == []


def test_tables_of_the_taught_model_are_those_of_the_results():
    runs = tables.read_runs(SMOL, tables.arms_in(SMOL))
    trained = runs[runs.arm.isin(runs.arm[runs["update"] > 0])]
    rows = tables.table(trained).splitlines()
    rows += tables.table(tables.read_runs(SMOL / "eval-500", ["tandem"])).splitlines()
    schedules = runs[runs.arm.isin(["tandem", *SCHEDULES])]
    rows += tables.table_of_handoffs(SMOL, schedules).splitlines()
    assert len(rows) >= 10
    assert [row for row in rows if row not in RESULTS] == []


def test_percentages_in_the_results_are_measured():
    """Every "97.8 % [96.3, 98.7]" is what some arm has measured at some update."""
    measured = set()
    further = ("eval-500", "untaught/generated", "untaught/gsm8k")
    for folder in (TINY, SMOL, *(SMOL / name for name in further)):
        for _, runs in tables.read_runs(folder, tables.arms_in(folder)).groupby("arm"):
            names = ["accuracy", "jargon"]
            names += [f"languages.{code}" for code in tables.languages_in(runs)]
            for who in ("senior", "tandem", "junior"):
                for name in names:
                    points = tables.pooled(runs, who, name).iterrows()
                    measured |= {tables.with_interval(point) for _, point in points}
    stated = {number.replace(" %", "") for number in stated_in(RESULTS)}
    assert len(stated) > 10
    assert stated - measured == set()


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
