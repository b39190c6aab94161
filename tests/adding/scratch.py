"""A copy of the tree to which things are added, and which of its source files that touches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.house import ROOT

NEW = Path(__file__).parent / "new"  # files as they lie in the tree to which they are added
PRODUCT = ("backends", "cuda_ops", "graph", "npu_ops", "serving", "xllm")
COPIED = (*PRODUCT, "benchmarks", "tests", "tools", "pyproject.toml")
LARGE = "xllm/bundled/model.safetensors"


@dataclass(frozen=True)
class Edit:
    """`new` instead of `old` in a file, where `old` stands `times` times."""

    path: str
    old: str
    new: str
    times: int = 1


def after(path: str, line: str, *added: str) -> Edit:
    """Lines below one that is there."""
    return Edit(path, f"{line}\n", "".join(f"{each}\n" for each in (line, *added)))


@dataclass(frozen=True, kw_only=True)
class Addition:
    """One thing that is added. new: its files, by their places in the tree; "there = here" where the file is one of
    ours. most: source files that it may touch, new ones included."""

    name: str
    most: int
    new: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()


def copy_tree(to: Path) -> Path:
    """All that runs and is tested. What is large is linked."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=lambda folder, names: [
                each for each in names if each == "__pycache__" or (Path(folder) / each) == ROOT / LARGE])
        else:
            shutil.copy(ROOT / name, to / name)
    (to / LARGE).symlink_to(ROOT / LARGE)
    shutil.copytree(NEW / "tests", to / "tests", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def sources(root: Path) -> dict[str, str]:
    """The text of every source file of the product."""
    return {str(path.relative_to(root)): path.read_text() for top in PRODUCT
            for path in (root / top).rglob("*") if path.suffix in (".py", ".c", ".h", ".json", ".js")}


def add(addition: Addition, root: Path) -> list[str]:
    """Add it to a tree. Returns the source files that are new or changed. Raises LookupError if a place is gone."""
    before = sources(root)
    for name in addition.new:
        there, _, here = name.partition(" = ")
        assert not (root / there).exists(), there
        shutil.copy(ROOT / here if here else NEW / there, root / there)
    for edit in addition.edits:
        text = (root / edit.path).read_text()
        if text.count(edit.old) != edit.times:
            raise LookupError(f"{addition.name}: {edit.path} has {text.count(edit.old)} times, not {edit.times}: "
                              f"{edit.old!r}")
        (root / edit.path).write_text(text.replace(edit.old, edit.new))
    now = sources(root)
    return sorted(name for name in now if now[name] != before.get(name))


def run_tests(root: Path, arguments: Sequence[str], **environment: str) -> str:
    """Run pytest in the tree; returns what it says. Fails if it fails."""
    variables = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", *arguments], cwd=root,
                          env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
