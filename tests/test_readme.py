"""What README.md points to is there: files, figures, tables made from the results, and a row for every open choice."""

import re
from pathlib import Path

import pytest

from lab import figures
from run_gsm8k import SETTINGS

HERE = Path(__file__).parent.parent
TINY = HERE / "results" / "tiny"
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 20
    assert [link for link in links if not link.startswith("http") and not (HERE / link).exists()] == []


@pytest.mark.parametrize("setting", ["skill", "language", "granularity", "control", "sweep"])
def test_tables_are_those_of_the_results(setting):
    """Each row is what lab/figures.py makes of the committed files. Of the sweep, only its runs on test problems have rows."""
    arms = SETTINGS[setting] if setting != "sweep" else ["test-c0-j1", "test-c-0.1-j1"]
    rows = figures.table(figures.read_runs(TINY, arms)).splitlines()
    assert len(rows) >= 4
    assert [row for row in rows if row not in README] == []
