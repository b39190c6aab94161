"""On a GPU a tensor of the CPU must not meet one of the device: tried with a device that is only claimed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.gpu_bundle.conftest import ROOT


def test_no_case_mixes_memories() -> None:
    """In a process of its own, which has a device more than torch knows."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu_bundle.elsewhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=150,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    mixed = [line.partition(":")[0] for line in found.pop("mixed")]
    assert mixed == ["add", "fill", "choose", "put"], "what mixes them must be found, and nothing else"
    assert found == {"ops": [], "micro": []}
