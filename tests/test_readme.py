"""What README.md points to is there: files, figures, and the lines of code behind each choice that the paper leaves open."""

import re
from pathlib import Path

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")
LINES = re.findall(r"\[([a-z_0-9]+\.py):(\d+)\]\(\1#L\2\) `([^`]+)`", README)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 20
    assert [link for link in links if not link.startswith("http") and not (HERE / link).exists()] == []


def test_lines_hold_what_is_said():
    assert len(LINES) > 10
    for file, number, name in LINES:
        line = (HERE / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert name in line, f"{file}:{number} is now {line!r}"


def test_every_choice_that_the_paper_leaves_open_has_a_row():
    """A row names the line of the mark, or of the function in which it stands."""
    rows = {(file, int(number)) for file, number, _ in LINES}
    for path in HERE.glob("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if "Open in paper:" in line:
                assert any(path.name == file and -2 <= number - row <= 12 for file, row in rows), f"{path.name}:{number} has no row"
