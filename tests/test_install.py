"""What an installation must give: light imports, quick commands, a CPU build where there is no GPU, and a size."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import xllm
from serving.commands import doctor
from tests.house import ROOT
from tests.installed import installed_sizes
from tests.test_dependencies import EXTRAS, PROJECT

MAX_SERVING_BYTES = 1.2e9


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
    assert run_python("from serving.commands.cli import build_parser; build_parser().format_help()") < 1.0


def test_public_names_are_those_that_are_documented():
    assert all(hasattr(xllm, name) for name in xllm.__all__)


def test_no_cuda_build_was_pulled_onto_a_machine_without_a_gpu():
    import torch

    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    assert torch.version.cuda is None, "pip took a CUDA build of torch: make clean, then README, Installing"


def test_what_serving_needs_is_not_large():
    """With everything compiled to bytecode, which an installation for serving leaves out."""
    needed = [Requirement(text) for text in (*PROJECT["dependencies"], *EXTRAS["serve"])]
    sizes, missing = installed_sizes(needed)
    assert not missing and {"torch", "transformers", "llguidance"} <= sizes.keys()
    assert not {"pytest", "mypy", "triton", "playwright", "matplotlib"} & sizes.keys()
    assert sum(sizes.values()) < MAX_SERVING_BYTES, sorted(sizes.items(), key=lambda item: -item[1])[:12]


@pytest.mark.parametrize(("goal", "what"), [("serve", "serving"), ("chat", "serving"), ("test", "dev")])
def test_make_installs_what_its_target_needs(goal, what):
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    planned = subprocess.run(["make", "-n", goal, "VENV=none-yet", "TORCH_INDEX=an-index"], cwd=ROOT, text=True,
                             capture_output=True, check=True).stdout
    assert f"install.py --venv none-yet --torch-index 'an-index' --goal '{goal}' {what}\n" in planned
    assert planned.count("install.py") == 1


def test_kernels_can_be_compiled_before_they_are_needed(monkeypatch, capsys):
    assert doctor.compile_kernels() == 0
    if any(map(shutil.which, ("cc", "gcc", "clang"))):
        assert "CPU kernels: ready in " in capsys.readouterr().out
    monkeypatch.setenv("XLLM_NO_COMPILED_KERNELS", "1")
    assert doctor.compile_kernels() == 0
    assert "not compiled" in capsys.readouterr().out
