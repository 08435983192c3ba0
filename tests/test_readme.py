"""What the two READMEs say is there: files, tables and numbers of the committed results, and a row for every open choice."""

import re
from pathlib import Path

import pytest

from lab import curves, figures
from run_gsm8k import SETTINGS
from tandem import SCHEDULES

HERE = Path(__file__).parent.parent
TINY, SMOL = HERE / "results" / "tiny", HERE / "results" / "smol"
READMES = {path: path.read_text(encoding="utf-8") for path in (HERE / "README.md", HERE / "results" / "README.md")}
README, RESULTS = READMES.values()


@pytest.mark.parametrize("path", READMES)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", READMES[path])
    assert len(links) >= 10
    assert [link for link in links if not link.startswith("http") and not (path.parent / link).exists()] == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_tables_are_those_of_the_results(setting):
    """Each row is what lab/figures.py makes of the committed files."""
    rows = figures.table(curves.read_runs(TINY, figures.complete_setting(TINY, setting, SETTINGS[setting]))).splitlines()
    assert len(rows) >= 4
    assert [row for row in rows if row not in RESULTS] == []


def test_tables_of_the_taught_model_are_those_of_the_results():
    runs = curves.read_runs(SMOL, figures.arms_in(SMOL))
    trained = {arm: seeds for arm, seeds in runs.items() if seeds[0][-1]["update"] > 0}
    # Arms with the same schedule have the same handoffs before training, so the table names one of them.
    schedules = {arm: seeds for arm, seeds in runs.items() if arm == "tandem" or arm in SCHEDULES}
    rows = [*figures.table(trained).splitlines(), *figures.table_of_handoffs(SMOL, schedules).splitlines()]
    rows += figures.table(curves.read_runs(SMOL / "eval-500", ["tandem"])).splitlines()
    assert len(trained) >= 2
    assert len(schedules) == len(SCHEDULES)
    assert [row for row in rows if row not in RESULTS] == []


def test_percentages_are_those_of_the_results():
    """Every "97.8 % [96.3, 98.7]" is what some arm has measured at some update."""
    measured = set()
    for folder in (TINY, SMOL, *(SMOL / name for name in ("eval-500", "untaught/generated", "untaught/gsm8k"))):
        for seeds in curves.read_runs(folder, figures.arms_in(folder)).values():
            languages = [f"languages.{code}" for code in figures.languages_written(seeds)]
            for who in ("senior", "tandem", "junior"):
                for metric in ("accuracy", "jargon", *languages):
                    measured |= {f"{p.value:.1f} % [{p.low:.1f}, {p.high:.1f}]" for p in curves.pooled(seeds, who, metric)}
    stated = {number for text in READMES.values() for number in re.findall(r"\d+\.\d % \[\d+\.\d, \d+\.\d\]", " ".join(text.split()))}
    assert len(stated) > 15
    assert stated - measured == set()


def test_differences_in_the_readme_are_those_of_the_tables():
    """Every interval with a sign, such as [-3.6, +0.7], stands in a table of results/README.md, which is held to the files above."""
    stated = set(re.findall(r"\[[-+][\d.]+, [-+][\d.]+\]", README))
    assert len(stated) >= 3
    assert [interval for interval in stated if interval not in RESULTS] == []


def test_every_choice_that_the_paper_leaves_open_has_a_row():
    """A mark in the code belongs to the function around it, or to the constant below it, and the README names that."""
    marks = 0
    for path in sorted([*HERE.glob("*.py"), *HERE.glob("lab/*.py")]):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if line.strip().startswith("# Open in paper:"):
                above = [match[1] for match in (re.match(r"def (\w+)", before) for before in lines[:number]) if match]
                name = above[-1] if line.startswith(" ") else re.match(r"(\w+) =", lines[number + 1])[1]
                file = path.relative_to(HERE).as_posix()
                assert f"`{name}` in [{file}]({file})" in README
                marks += 1
    assert marks > 8


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
