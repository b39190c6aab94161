"""Tables of members: what happens to each member of a request body or of a checkpoint's file.

They stand in the documentation, one markdown table under each heading, with three columns: the member's path, its
handling, and how. A path is dotted; `[]` is any element of a list, `{}` any value of a mapping, and
`[type=function]` or `(type=function)` the variant of a union that has this value.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANDLINGS = ("honoured", "refused", "harmless")

_HEADING = re.compile(r"#+ (?P<title>.+)")
_ROW = re.compile(r"\| `(?P<path>[^`]+)` \| (?P<handling>\w+) \| (?P<how>.*) \|")
_TEST = re.compile(r"(?P<file>tests/[\w/]+\.py)::(?P<name>\w+)")


@dataclass(frozen=True)
class Member:
    """One row. `how` names the test of an honoured member, and the reason for a harmless or a refused one."""

    path: str
    handling: str
    how: str


def read_tables(document: str) -> dict[str, dict[str, Member]]:
    """The tables of docs/`document`, by the text of the heading above each; every table maps paths to members.

    Raises ValueError at a row that is not of the form, a handling that does not exist, or a path named twice.
    """
    tables: dict[str, dict[str, Member]] = {}
    title = ""
    for number, line in enumerate((ROOT / "docs" / document).read_text().splitlines(), 1):
        if heading := _HEADING.fullmatch(line):
            title = heading["title"]
        elif line.startswith("| `"):
            row = _ROW.fullmatch(line)
            if row is None or row["handling"] not in HANDLINGS:
                raise ValueError(f"docs/{document}:{number} is not a row of a table of members: {line}")
            table = tables.setdefault(title, {})
            if row["path"] in table:
                raise ValueError(f"docs/{document}:{number} names {row['path']} for the second time")
            table[row["path"]] = Member(row["path"], row["handling"], row["how"].strip())
    return tables


def faults_of(member: Member) -> list[str]:
    """What is wrong with one row: an honoured member without a test that exists, another one without a reason."""
    if member.handling != "honoured":
        return [] if len(member.how.split()) >= 2 else [f"{member.path}: {member.handling} without a reason"]
    tests = list(_TEST.finditer(member.how))
    if not tests:
        return [f"{member.path}: honoured without the name of a test"]
    return [f"{member.path}: there is no {found[0]}" for found in tests if not _exists(found["file"], found["name"])]


def _exists(file: str, name: str) -> bool:
    path = ROOT / file
    if not path.is_file():
        return False
    nodes = ast.walk(ast.parse(path.read_text()))
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name for node in nodes)
