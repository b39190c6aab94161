"""How a process comes to an emulated device: by its environment alone, and how the runtime is built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import emulated_npu
from tests.emulated_npu import build, environment
from tests.emulated_npu.wheel import HOME, ROOT, SITE, reason, unsupported, version

PRODUCT = ("xllm", "serving", "backends", "graph", "npu_ops", "cuda_ops")


def run(code: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment(), **more}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=90)


CHILD = """
import subprocess, sys
grandchild = "import torch, torch_npu; print((torch.ones(3, device='npu') * 2).sum().item())"
sys.exit(subprocess.run([sys.executable, "-c", grandchild]).returncode)
"""


def test_children_of_children_have_the_device() -> None:
    done = run(CHILD)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "6.0", done.stderr


def test_a_function_that_is_not_emulated_ends_the_process() -> None:
    done = run("import ctypes; ctypes.CDLL('libascendcl.so').aclopCreateAttr()")
    assert done.returncode < 0 and "aclopCreateAttr, which is not emulated" in done.stderr


def test_without_the_environment_nothing_is_changed() -> None:
    """The wheel is out of the way of every other process."""
    env = {key: value for key, value in os.environ.items() if key not in environment()}
    code = "import importlib.util, sys; print(importlib.util.find_spec('torch_npu'), 'emulated' in str(sys.meta_path))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, cwd="/")
    assert done.stdout.split() == ["None", "False"]


def test_the_product_does_not_know_the_emulator() -> None:
    files = [file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [file for file in files if re.search(r"emulated_npu|EMULATED_NPU", file.read_text())] == []


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason() is None
    monkeypatch.setattr("shutil.which", lambda tool: None if tool == "gcc" else tool)
    assert "no gcc" in str(reason())
    monkeypatch.undo()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert "riscv64" in str(unsupported())
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.11.0")
    assert "needs torch 2.13.0" in str(unsupported())
    with pytest.raises(RuntimeError, match=r"2\.11"):
        emulated_npu.environment()


def test_where_there_can_be_none_the_command_says_so_and_succeeds(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, "-m", "tests.emulated_npu", "run", "false"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("SKIPPED, no emulated NPU here: there is no gcc and no nm")


def test_the_runtime_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build.runtime()
    monkeypatch.setattr(build, "_build", lambda _: pytest.fail("it was built again"))
    assert build.runtime() == folder and folder.is_relative_to(HOME)


@pytest.mark.parametrize(
    ("source", "right", "wrong"),
    [
        ("device.c", "aclrtGetDevice(int32_t *device)", "aclrtGetDevice(int64_t *device)"),
        ("device.c", "API aclError aclInit", "API void *aclInit"),
        ("hccl_comm.c", "HcclGetRankId(HcclComm handle, uint32_t *rank)", "HcclGetRankId(HcclComm handle, int *rank)"),
    ],
)
def test_prototypes_are_those_of_the_wheel_s_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, right: str, wrong: str
) -> None:
    sources, folder = tmp_path / "acl", tmp_path / "made"
    shutil.copytree(build.SOURCES, sources)
    folder.mkdir()
    text = (sources / source).read_text()
    assert right in text
    (sources / source).write_text(text.replace(right, wrong))
    monkeypatch.setattr(build, "SOURCES", sources)
    with pytest.raises(RuntimeError, match="conflicting types"):
        build._build(folder)


def test_the_wheel_is_the_pinned_one() -> None:
    installed = [folder.name for folder in SITE.glob("torch_npu-*.dist-info")]
    assert installed == [f"torch_npu-{version()}.dist-info"]
    assert f'"torch-npu=={version()}"' in (ROOT / "pyproject.toml").read_text()
    assert not list(SITE.glob("torch")) and not list(SITE.glob("nvidia*"))  # nothing that it depends on
