"""The table of advisories in docs/security.md names tests that exist, and no test's advisory is missing there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.serving.server_process import ROOT

FOLDER = Path(__file__).parent


def rows() -> list[tuple[set[str], set[str]]]:
    """(advisories, tests) of each row."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    table = page[page.index("| advisory |"):].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")]
    return [(set(ids.split(", ")), set(re.findall(r"`(test_[a-z_]+)`", tests))) for ids, _, tests in cells]


def marked() -> dict[str, set[str]]:
    """Test -> the advisories in its decorator."""
    found: dict[str, set[str]] = {}
    for path in FOLDER.glob("test_advisories_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                calls = [d for d in node.decorator_list if isinstance(d, ast.Call) and isinstance(d.func, ast.Name)]
                found[node.name] = {argument.value for call in calls if call.func.id == "advisory"
                                    for argument in call.args if isinstance(argument, ast.Constant)}
    return found


def test_every_row_has_its_tests() -> None:
    tests = marked()
    assert len(rows()) >= 25
    for ids, names in rows():
        assert names and names <= tests.keys(), names - tests.keys()
        for name in ids:
            assert any(name in tests[test] for test in names), f"no test of its row is marked with {name}"


def test_every_marked_advisory_has_a_row() -> None:
    listed = set().union(*(ids for ids, _ in rows()))
    assert set().union(*marked().values()) == listed
    assert sum(name.startswith("CVE-") for name in listed) >= 57
