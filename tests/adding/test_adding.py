"""docs/adding.md is true: one of each thing is added to a copy of the tree, touches no more source files than it says,
and works there beside all the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.adding.additions import ADDITIONS
from tests.adding.scratch import NEW, add, copy_tree, run_tests

NIGHTLY = pytest.mark.skipif(os.environ.get("ADDING_ALL") != "1", reason="in `make nightly` (ADDING_ALL=1)")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def touched(tree: Path) -> dict[str, list[str]]:
    """The source files that each addition touched."""
    return {addition.name: add(addition, tree) for addition in ADDITIONS}


def test_few_files_are_touched(touched: dict[str, list[str]]) -> None:
    for addition in ADDITIONS:
        files = touched[addition.name]
        assert 0 < len(files) <= addition.most, f"{addition.name} touches {len(files)} files: {', '.join(files)}"


def test_a_route_is_one_line_beside_its_file() -> None:
    route = next(addition for addition in ADDITIONS if addition.name == "a route")
    assert [edit.new.count("\n") - edit.old.count("\n") for edit in route.edits] == [1]


def test_every_new_file_is_added_by_something() -> None:
    files = {str(path.relative_to(NEW)) for top in NEW.iterdir() if top.name != "tests" for path in top.rglob("*.py")}
    assert files == {name for addition in ADDITIONS for name in addition.new if " = " not in name}


def test_what_was_added_works(tree: Path, touched: dict[str, list[str]]) -> None:
    run_tests(tree, ["tests/added", "--durations=12"])
