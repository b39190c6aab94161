"""What the wheel holds: it is built from a copy of the tracked files, and read."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from tests.house import ROOT

TOPS = ("xllm", "backends", "graph", "serving", "cuda_ops", "npu_ops")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def tracked(*folders: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders],
                            cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in tracked(*TOPS, "pyproject.toml", "README.md", "LICENSE"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-W", "ignore", "-c", BUILD, str(built)]
    subprocess.run(build, cwd=source, capture_output=True, check=True, timeout=120)
    return zipfile.ZipFile(next(built.glob("xllm_engine-*.whl")))


def test_it_holds_our_packages_whole_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == set(tracked(*TOPS))


def test_each_package_says_that_it_is_typed(wheel: zipfile.ZipFile) -> None:
    assert {f"{top}/py.typed" for top in TOPS} <= set(wheel.namelist())


def test_its_name_is_ours_and_its_command_checks_for_shadows(wheel: zipfile.ZipFile) -> None:
    texts = {PurePosixPath(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "Name: xllm-engine\n" in texts["METADATA"]
    assert "xllm = xllm.__main__:main\n" in texts["entry_points.txt"]
    assert {Path(name).parts[0] for name in texts["top_level.txt"].split()} == set(TOPS)
