"""What is said where something is missing: every case is really made, in processes with another environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npu_ops import compat
from serving.commands.doctor import HINT, MISSING, OK, cann_findings, cann_version
from tests.emulated_npu.wheel import ROOT, SITE
from tests.npu.engines import IS_REAL

pytestmark = pytest.mark.skipif(IS_REAL, reason="takes the emulator's environment apart")


def without_cann(*first: Path) -> dict[str, str]:
    """The wheel installed, as on a machine that has nothing else for it."""
    hidden = ("LD_LIBRARY_PATH", "ASCEND_HOME_PATH", "ASCEND_OPP_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, (*first, SITE, ROOT)))}


def run(code: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True,
                          timeout=120, cwd=ROOT)


def doctor(env: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-m", "serving.commands.cli", "doctor"], env=env, capture_output=True,
                          text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr  # the CPU path works all the same
    return done.stdout


def line_of(report: str, what: str) -> str:
    return next(line for line in report.splitlines() if line[8:].startswith(what))


OPEN = "from backends import get_backend; get_backend('npu')"


def test_the_wheel_without_cann() -> None:
    assert "Failed to load the backend extension: torch_npu" in run("import torch", without_cann()).stderr
    done = run("import xllm, torch; print(torch.ones(2).sum()); " + OPEN, without_cann())
    assert done.stdout.strip() == "tensor(2.)"
    failed = done.stderr.strip().splitlines()[-1]
    assert failed.startswith("backends.backend.BackendError: the npu backend: torch_npu cannot be loaded: the CANN "
                             "toolkit is not installed, or its set_env.sh was not sourced in this shell (libhccl.so")
    report = doctor(without_cann())
    assert line_of(report, "torch-npu").startswith("ok") and "2.13.0" in line_of(report, "torch-npu")
    assert line_of(report, "CANN").startswith("missing") and "install the CANN toolkit" in line_of(report, "CANN")
    assert line_of(report, "npu backend").startswith("missing") and "libhccl.so" in line_of(report, "npu backend")
    assert "the CPU path works" in report


def test_a_version_that_does_not_go_with_torch(tmp_path: Path) -> None:
    """The metadata of another version in front of the wheel's."""
    info = tmp_path / "torch_npu-2.10.0.post4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.10.0.post4\n")
    failed = run("import xllm; " + OPEN, without_cann(tmp_path)).stderr
    assert "torch_npu 2.10.0.post4 is made for torch 2.10, and this is torch 2.13" in failed
    assert "pip install torch==2.10.*" in failed


@pytest.mark.parametrize("version", ["2.7.1.post11", "2.15.0"])
def test_versions_that_nobody_looked_at(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: version)
    with pytest.raises(compat.NpuMissing, match=f"torch_npu {version} is not supported: 2.10.0.post4 to 2.14"):
        compat.load()


def test_no_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: None)
    with pytest.raises(compat.NpuMissing, match=r"pip install 'xllm-engine\[npu\]'"):
        compat.load()


def test_no_device() -> None:
    failed = run("import xllm; " + OPEN, {**os.environ, "EMULATED_NPU_DEVICES": "0"}).stderr
    assert "needs an Ascend NPU and its driver, and torch_npu sees none" in failed


def test_all_is_well() -> None:
    report = doctor({**os.environ, "EMULATED_NPU_DEVICES": "2", "HCCL_OP_EXPANSION_MODE": "AIV"})
    assert line_of(report, "npu backend").startswith("ok") and "Ascend910B1" in line_of(report, "npu backend")
    assert line_of(report, "npu group") == f"{'ok':8}{'npu group':22}2 devices, so up to 2 ranks, by hccl"
    exchanges = line_of(report, "exchanges")
    assert exchanges.startswith("hint") and "HCCL_OP_EXPANSION_MODE=AIV: AIV goes with --graph-mode off" in exchanges


@pytest.mark.parametrize(("message", "words"), [
    ("libatb.so: cannot open shared object file", "NNAL"),
    ("libascend_hal.so: cannot open shared object file", "mount its lib64"),
    ("Two accelerators cannot be used at the same time", "CPU build of torch"),
    ("something else", "something else"),
])
def test_what_errors_of_the_import_mean(message: str, words: str) -> None:
    assert words in compat.explain(message)


# --- CANN's own state


def cann(folder: Path, text: str, name: str = "aarch64-linux/ascend_toolkit_install.info") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return folder


def finding(version: str, folder: Path, monkeypatch: pytest.MonkeyPatch, home: str = "") -> tuple[str, str]:
    if home:
        monkeypatch.setenv("ASCEND_HOME_PATH", home)
    else:
        monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    found = list(cann_findings(version, (folder,)))
    assert len(found) == 1
    return found[0].state, found[0].detail


def test_an_environment_that_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, detail = finding("2.10.0.post4", tmp_path, monkeypatch)
    assert state == MISSING and f"source {tmp_path}/set_env.sh" in detail
    state, detail = finding("2.10.0.post4", tmp_path / "none", monkeypatch)
    assert state == MISSING and "install the CANN toolkit" in detail
    state, detail = finding("2.10.0.post4", tmp_path, monkeypatch, str(tmp_path / "gone"))
    assert state == MISSING and "does not exist" in detail


@pytest.mark.parametrize(("version", "torch_npu", "state"), [
    ("9.1.0", "2.10.0.post4", OK), ("9.0.1", "2.10.0.post2", OK), ("8.5.0", "2.10.0.post4", MISSING),
    ("9.1.0", "2.13.0", HINT),
])
def test_pairs_of_versions(version: str, torch_npu: str, state: str, tmp_path: Path,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    home = cann(tmp_path, f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100R001\n")
    found, detail = finding(torch_npu, tmp_path, monkeypatch, str(home))
    assert found == state and version in detail
    assert ("561002" in detail) == (state == MISSING)


def test_where_cann_states_its_version(tmp_path: Path) -> None:
    assert cann_version(cann(tmp_path / "a", "version=9.1.0\n")) == "9.1.0"
    assert cann_version(cann(tmp_path / "b", "runtime_running_version=[9.0.0:9.0.0]\n", "version.cfg")) == "9.0.0"
    assert cann_version(cann(tmp_path / "c", "Version=8.5.RC1\n", "compiler/version.info")) == "8.5.RC1"
    assert cann_version(tmp_path) is None
