"""The whole bundle, once, dry: on a CPU, by a Python that has little installed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu_bundle.bare import make_python

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class DryRun:
    """What `all` left: its exit status, its output, and the file's contents."""

    folder: Path
    status: int
    output: str
    data: dict[str, Any]

    def rows(self, section: str) -> list[dict[str, Any]]:
        return [row for row in self.data["rows"] if row["section"] == section]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small products, next to other test workers."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_python(tmp_path_factory.mktemp("bare") / "venv")


def bundle(python: Path | str, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON"))}
    return subprocess.run([str(python), "-m", "benchmarks.gpu", *arguments], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=timeout)  # fmt: skip


@pytest.fixture(scope="session")
def dry_run(bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> DryRun:
    folder = tmp_path_factory.mktemp("dry")
    done = bundle(bare_python, "all", "--out", str(folder), "--device", "cpu", "--profile", "tiny")
    return DryRun(folder, done.returncode, done.stdout + done.stderr, json.loads((folder / "gpu.json").read_text()))
