"""docs/adding.md is true: one of each thing is added to a copy of the tree, touches no more source files than it says,
and works there beside all the others."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.adding.additions import ADDITIONS
from tests.adding.scratch import NEW, add, copy_tree, run_tests
from tests.house import ROOT


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


def test_the_table_in_the_docs_says_so(touched: dict[str, list[str]]) -> None:
    rows = dict(re.findall(r"^\| (an? .+?) \| (\d+)", (ROOT / "docs/adding.md").read_text(), re.MULTILINE))
    assert {name: str(len(files)) for name, files in touched.items()} == {
        name: number for name, number in rows.items() if name != "a block size"}


def test_a_route_is_one_line_beside_its_file() -> None:
    route = next(addition for addition in ADDITIONS if addition.name == "a route")
    assert [edit.new.count("\n") - edit.old.count("\n") for edit in route.edits] == [1]


def test_every_new_file_is_added_by_something() -> None:
    files = {str(path.relative_to(NEW)) for top in NEW.iterdir() if top.name != "tests" for path in top.rglob("*.py")}
    assert files == {name for addition in ADDITIONS for name in addition.new if " = " not in name}


@pytest.mark.skipif(os.environ.get("ADDING_ALL") != "1", reason="in `make nightly` (ADDING_ALL=1)")
def test_the_tree_with_all_of_it_is_in_order(tree: Path, touched: dict[str, list[str]]) -> None:
    """The draw on interpreted CUDA kernels; and the rules of the house, those of single files on the new ones."""
    run_tests(tree, ["tests/added/test_sampling.py"], TRITON_INTERPRET="1")
    new = [Path(name.partition(" = ")[0]).stem for addition in ADDITIONS for name in addition.new]
    rules = "circle or too_long or too_many or two_things or loose or reached or asks or listed"
    run_tests(tree, ["tests/test_house.py", "-k", " or ".join([rules, *(f".{name}]" for name in new)])])


def test_what_was_added_works(tree: Path, touched: dict[str, list[str]]) -> None:
    run_tests(tree, ["tests/added"])
