"""The rules of the house on made-up trees: what breaks one is refused, by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house import (
    MAX_KERNEL_LINES,
    MAX_LINES,
    complaints_of_circles,
    complaints_of_collaborators,
    complaints_of_numbers,
    complaints_of_reach,
    complaints_of_sizes,
    complaints_of_twins,
    modules_of,
    parse,
    twin_classes,
    twin_modules,
)


class House:
    """Modules under a folder, whose tops are `xllm` and `npu_ops`."""

    def __init__(self, root: Path):
        self.root = root

    def write(self, name: str, text: str) -> House:
        """name: dotted; a trailing dot is a package's `__init__`."""
        path = self.root / (name.replace(".", "/") + ("__init__.py" if name.endswith(".") else ".py"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        parse.cache_clear()
        return self

    @property
    def modules(self) -> dict[str, Path]:
        return modules_of(self.root, ("xllm", "npu_ops"))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


# --- circles


@pytest.mark.parametrize("back", [
    "import xllm.a", "from xllm import a", "from xllm.a import f", "def g():\n    from xllm.a import f",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from xllm.a import A",
    "class B:\n    def g(self):\n        import xllm.a as it",
], ids=["plain", "from the package", "a name", "in a function", "for types", "in a method"])
def test_two_that_import_each_other(house: House, back: str) -> None:
    house.write("xllm.a", "import xllm.b\n").write("xllm.b", back)
    assert complaints_of_circles(house.modules) == ["a circle of 2: xllm.a -> xllm.b -> xllm.a"]


def test_the_way_round_a_larger_circle_is_told(house: House) -> None:
    house.write("xllm.a", "import xllm.b").write("xllm.b", "import xllm.c, xllm.d").write("xllm.c", "import xllm.a")
    house.write("xllm.d", "import json, xllm.e").write("xllm.e", "")
    assert complaints_of_circles(house.modules) == ["a circle of 3: xllm.a -> xllm.b -> xllm.c -> xllm.a"]


def test_a_package_that_hands_on_what_its_modules_have(house: House) -> None:
    """They may name each other, but not the package that is made of them."""
    house.write("xllm.kv.", "from xllm.kv.lru import LRU\nfrom xllm.kv import base").write("xllm.kv.base", "")
    house.write("xllm.kv.lru", "from xllm.kv import base\nfrom xllm.kv.base import Policy")
    house.write("xllm.core", "from xllm.kv import LRU")
    assert complaints_of_circles(house.modules) == []
    house.write("xllm.kv.lru", "from xllm.kv import base, Policy")
    assert complaints_of_circles(house.modules) == ["a circle of 2: xllm.kv -> xllm.kv.lru -> xllm.kv"]


def test_no_circle(house: House) -> None:
    house.write("xllm.a", "import xllm.b, xllm.c, torch").write("xllm.b", "import xllm.c").write("xllm.c", "")
    assert complaints_of_circles(house.modules) == []


def test_a_known_circle_may_shrink_and_must_be_taken_off_when_it_is_cut(house: House) -> None:
    house.write("xllm.a", "import xllm.b").write("xllm.b", "import xllm.a").write("xllm.c", "import xllm.a")
    known = [frozenset({"xllm.a", "xllm.b", "xllm.c"})]
    assert complaints_of_circles(house.modules, known) == []
    assert complaints_of_circles(house.modules, [frozenset({"xllm.a", "xllm.c"})]) == [
        "a circle of 2: xllm.a -> xllm.b -> xllm.a", "no circle any more, take it off the list: xllm.a, xllm.c"]


# --- names that exist twice


def test_a_module_name_that_stands_for_two_things(house: House) -> None:
    house.write("xllm.kv.rows", "").write("xllm.kv.", "").write("xllm.runner.", "").write("xllm.__main__", "")
    house.write("xllm.runner.row", "").write("npu_ops.__main__", "")
    assert complaints_of_twins(twin_modules(house.modules)) == []
    assert complaints_of_twins(twin_modules(house.modules), ["rows"]) == ["not there twice, take it off the list: rows"]
    house.write("xllm.runner.rows", "")
    assert complaints_of_twins(twin_modules(house.modules)) == [
        "rows is xllm.kv.rows and xllm.runner.rows: one of them says too little"]
    assert complaints_of_twins(twin_modules(house.modules), ["rows"]) == []


@pytest.mark.parametrize(("one", "other"), [
    ("class Step: ...", "class Step: ..."), ("class Step: ...", "Step = int | str"),
    ("Step = dict[str, int]", "Step = tuple[int, str]"),
])
def test_a_class_name_that_stands_for_two_things(house: House, one: str, other: str) -> None:
    house.write("xllm.a", one).write("npu_ops.b", other)
    assert complaints_of_twins(twin_classes(house.modules)) == [
        "Step is npu_ops.b and xllm.a: one of them says too little"]
    assert complaints_of_twins(twin_classes(house.modules), ["Step"]) == []


@pytest.mark.parametrize("text", [
    "class _Step: ...", "T = TypeVar('T')", "NAMES = A | B", "def f():\n    class Step: ...",
])
def test_names_that_are_nobody_elses_business(house: House, text: str) -> None:
    house.write("xllm.a", text).write("npu_ops.b", text)
    assert twin_classes(house.modules) == {}


# --- sizes


@pytest.mark.parametrize(("name", "most"), [
    ("xllm/core.py", MAX_LINES), ("xllm/web/app.js", MAX_LINES), ("xllm/web/app.css", MAX_LINES),
    ("npu_ops/kv.py", MAX_KERNEL_LINES), ("xllm/cpu_attention.c", MAX_KERNEL_LINES),
])
def test_a_long_file(tmp_path: Path, name: str, most: int) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text("x = 1\n" * most)
    (path.parent / "made.json").write_text("\n" * 10_000)
    assert complaints_of_sizes(tmp_path, ("xllm", "npu_ops")) == []
    path.write_text("x = 1\n" * (most + 1))
    assert complaints_of_sizes(tmp_path, ("xllm", "npu_ops")) == [
        f"{name} has {most + 1} lines, and {most} at most are allowed"]


# --- collaborators

EIGHT = "a, b, c, d, e, f, g, h: int"


@pytest.mark.parametrize(("parameters", "count"), [
    (EIGHT, 8), (f"{EIGHT}, i", 9), (f"{EIGHT}, i: int", 9), (f"{EIGHT}, *, i", 9), (f"{EIGHT}, *, i: Clock", 9),
    (f"{EIGHT}, *, i: Clock | None = None", 9), (f"{EIGHT}, *, i: list[int]", 9), (f"{EIGHT}, *, i: Callable", 9),
    (f"{EIGHT}, *rest", 9), (f"{EIGHT}, **rest", 9), (f"a, /, {EIGHT[3:]}, i", 9),
    (f"{EIGHT}, *, i: int", 8), (f"{EIGHT}, *, i: str | None = None, j: float = 0.5, k: bool, l: bytes", 8),
])
def test_what_a_class_is_built_from(house: House, parameters: str, count: int) -> None:
    house.write("xllm.a", f"class Desk:\n    def __init__(self, {parameters}):\n        pass\n"
                          "    def work(self, a, b, c, d, e, f, g, h, i, j):\n        pass\n")
    assert complaints_of_collaborators(house.modules) == [
        f"xllm.a.Desk is built from {count} collaborators, and 8 at most are allowed"] * (count > 8)


def test_a_dataclass_is_data(house: House) -> None:
    fields = "".join(f"    {letter}: int\n" for letter in "abcdefghijkl")
    house.write("xllm.a", f"from dataclasses import dataclass\n@dataclass\nclass Facts:\n{fields}")
    assert complaints_of_collaborators(house.modules) == []


def test_a_known_class_must_be_taken_off_when_it_is_mended(house: House) -> None:
    house.write("xllm.a", f"class Desk:\n    def __init__(self, {EIGHT}, i):\n        pass\n")
    assert complaints_of_collaborators(house.modules, ["xllm.a.Desk"]) == []
    house.write("xllm.b", "class Chair:\n    def __init__(self, a):\n        pass\n")
    assert complaints_of_collaborators(house.modules, ["xllm.a.Desk", "xllm.b.Chair", "xllm.c.Gone"]) == [
        "no longer so, take it off the list: xllm.b.Chair", "no longer so, take it off the list: xllm.c.Gone"]


# --- numbers


@pytest.mark.parametrize("text", [
    "MAX_WAIT_S = 10.0", "_CHUNK = 3 << 10", "LOW, HIGH = 0.25, -4.0", "SIZES = (1, 2, 4)", "A = B = 8",
    "NONE: int = -1", "class Desk:\n    WIDTH = 3", "# of a desk\n\nWIDTH = 3", "X = 'a'  # a text\nWIDTH = 3",
    "# --- sizes\nWIDTH = 3", "WIDTH = 3  # noqa", "WORD = '#'; WIDTH = 3",
])
def test_a_number_without_a_comment(house: House, text: str) -> None:
    [complaint] = complaints_of_numbers(house.write("xllm.a", text).modules)
    assert complaint.startswith("xllm.a.") and "is a number without a comment" in complaint


@pytest.mark.parametrize("text", [
    "MAX_WAIT_S = 10.0  # for disk; chosen", "# Of a desk, chosen:\n# wide enough.\nWIDTH = 3",
    "SIZES = (1, 2,\n         4)  # powers of two", "class Desk:\n    WIDTH = 3  # chosen",
    "import os\nHALF = os.cpu_count() / 2", "WIDE = 3  # chosen\nTWICE = 2 * WIDE", "FREE, HELD = range(2)",
    "NAME, NAMES, ON = 'a', ('b',), True", "KINDS = {'a': 0}",
    "from enum import IntEnum\nclass Access(IntEnum):\n    A = 0",
    "width = 3", "def f():\n    WIDTH = 3", "NO_NUMBER = ()", "Letters = 3",
])
def test_what_is_no_number_or_has_its_comment(house: House, text: str) -> None:
    assert complaints_of_numbers(house.write("xllm.a", text).modules) == []


# --- what is reached


def reach(house: House, waiting: tuple[str, ...] = ()) -> list[str]:
    return complaints_of_reach(house.modules, ["xllm.cli"], waiting)


@pytest.mark.parametrize("way", [
    "import xllm.b", "from xllm import b", "from xllm.b import f", "def g():\n    import xllm.b",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from xllm.b import B",
    "FAMILIES = {'B': 'xllm.b'}", "run([sys.executable, '-m', 'xllm.b'])", "PARSERS = {'b': 'xllm.b:Parser'}",
    "NAMES = ('b', 'c')\ndef g(name):\n    load(f'xllm.{name}')",
    "PARSERS = {'bee': 'b:Parser'}\ndef g(name):\n    load(f'xllm.{name}')",
])
def test_a_module_is_reached(house: House, way: str) -> None:
    house.write("xllm.cli", way).write("xllm.b", "")
    assert reach(house) == []


@pytest.mark.parametrize("way", [
    "", "import xllm.c", "'see xllm.b'", "def g(name):\n    load(f'xllm.{name}')",
    "NAMES = ('bb',)\ndef g(name):\n    load(f'xllm.{name}')",
])
def test_a_module_that_nothing_leads_to(house: House, way: str) -> None:
    house.write("xllm.cli", way).write("xllm.b", "import xllm.c").write("xllm.c", "")
    assert "no entry point leads to xllm.b" in reach(house)


def test_a_name_that_another_module_keeps(house: House) -> None:
    house.write("xllm.cli", "from xllm.names import NAMES\ndef g(name):\n    load(f'xllm.{name}')")
    house.write("xllm.names", "NAMES = ('a-b',)").write("xllm.a_b", "")
    assert reach(house) == []


def test_a_module_brings_its_packages(house: House) -> None:
    house.write("xllm.", "import xllm.far").write("xllm.far", "").write("xllm.cli", "")
    assert reach(house) == []
    house.write("xllm.kv.", "import xllm.unused").write("xllm.unused", "")
    assert reach(house) == ["no entry point leads to xllm.kv", "no entry point leads to xllm.unused"]


def test_what_only_its_own_kind_uses(house: House) -> None:
    """Two that import each other and nobody else does: both are told."""
    house.write("xllm.cli", "").write("xllm.b", "import xllm.c").write("xllm.c", "import xllm.b")
    assert reach(house) == ["no entry point leads to xllm.b", "no entry point leads to xllm.c"]


def test_a_waiting_module(house: House) -> None:
    house.write("xllm.cli", "import npu_ops.kv").write("npu_ops.kv", "").write("npu_ops.moe", "")
    assert reach(house, ("npu_ops.moe",)) == []
    assert reach(house, ("npu_ops.moe", "npu_ops.kv", "npu_ops.gone")) == [
        "npu_ops.gone is listed as waiting and is not there", "npu_ops.kv is used now, take it off the list"]


@pytest.mark.parametrize("use", ["kv.write()", "from npu_ops.kv import write", "f = write"])
def test_a_waiting_name_of_a_module(house: House, use: str) -> None:
    house.write("npu_ops.kv", "def write(): ...\ndef read():\n    write()")
    house.write("xllm.cli", "from npu_ops import kv\nkv.read()")
    assert reach(house, ("npu_ops.kv.write",)) == []
    house.write("xllm.more", use)  # nobody reaches it
    assert reach(house, ("npu_ops.kv.write",)) == ["no entry point leads to xllm.more"]
    assert complaints_of_reach(house.modules, ["xllm.cli", "xllm.more"], ["npu_ops.kv.write"]) == [
        "npu_ops.kv.write is used now, take it off the list"]
