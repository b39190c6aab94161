"""What an installation must give: light imports, quick commands, and a CPU build where there is no GPU."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import xllm


def run_python(code: str) -> float:
    """The fastest of three runs in seconds: start-up, not what else the machine does."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return min(times)


def test_importing_xllm_is_cheap():
    """The interpreter's own start is taken off; the goal is 0.3 s, the bound leaves room for a busy machine."""
    assert run_python("import xllm") - run_python("pass") < 0.3


def test_help_is_quick():
    assert run_python("from serving.cli import build_parser; build_parser().format_help()") < 1.0


def test_public_names_are_those_that_are_documented():
    assert all(hasattr(xllm, name) for name in xllm.__all__)


def test_no_cuda_build_was_pulled_onto_a_machine_without_a_gpu():
    import torch

    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    assert torch.version.cuda is None, "pip took a CUDA build of torch; see requirements/constraints.txt"
