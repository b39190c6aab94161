"""The CPU backend: registry, memory, and the build of its kernels."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends import get_backend
from backends.backend import Backend, BackendError
from backends.control_groups import usable_cpus
from backends.cpu import build as cpu_build
from backends.cpu.build import load_kernels
from backends.cpu.kernels import Kernels
from backends.cpu.memory import available_bytes
from backends.reference import REFERENCE
from xllm import env


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_registry() -> None:
    cpu = get_backend("auto", compiled=False)
    assert isinstance(cpu, Backend)
    assert cpu.name == "cpu"
    assert cpu.default_dtype(torch.bfloat16) is torch.float32
    for name in ("cuda", "npu"):
        with pytest.raises(BackendError, match=name):
            get_backend(name)
    with pytest.raises(BackendError, match="unknown device 'tpu'"):
        get_backend("tpu")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs procfs")
def test_kv_cache_takes_memory_when_it_is_touched() -> None:
    cpu = get_backend("cpu", compiled=False)
    before = resident_bytes()
    cache = cpu.allocate_kv_cache(cpu.kv_cache_shape(65536, 16, 16, 64), torch.float32)
    assert cache.nbytes == 4 << 30
    assert resident_bytes() - before < 64 << 20
    assert cache.data_ptr() % 64 == 0
    assert cache[-1].abs().max() == 0


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_available_memory_without_limits(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 60 kB\n")
    assert available_bytes(tmp_path) == 60 * 1024
    assert available_bytes() > 0


def test_available_memory_under_version_2_limits(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemAvailable: 60000 kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/outer/inner\n")
    groups = tmp_path / "sys/fs/cgroup"
    for folder, limit, used, cached in (("outer/inner", "max", 1, 0), ("outer", "9000", 5000, 300)):
        write(groups / folder / "memory.max", f"{limit}\n")
        write(groups / folder / "memory.current", f"{used}\n")
        write(groups / folder / "memory.stat", f"anon 10\ninactive_file {cached}\n")
    assert available_bytes(tmp_path) == 9000 - 5000 + 300


def test_available_memory_under_version_1_limits(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemAvailable: 60000 kB\n")
    write(tmp_path / "proc/self/cgroup", "4:cpu,memory:/not/visible/here\n2:pids:/\n")
    for name, text in (("limit_in_bytes", "7000"), ("usage_in_bytes", "6500"), ("stat", "inactive_file 0")):
        write(tmp_path / f"sys/fs/cgroup/memory/memory.{name}", text)
    assert available_bytes(tmp_path) == 500


@pytest.mark.parametrize(("quota", "num_cpus"), [("max 100000", None), ("100000000 100000", None), ("100000 100000", 1),
                                                 ("199999 100000", 1), ("50000 100000", 1)])
def test_usable_processors_under_version_2_quotas(tmp_path: Path, quota: str, num_cpus: int | None) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/outer/inner\n")
    write(tmp_path / "sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n")
    write(tmp_path / "sys/fs/cgroup/outer/cpu.max", f"{quota}\n")
    assert usable_cpus(tmp_path) == (num_cpus or usable_cpus(tmp_path / "none"))


@pytest.mark.parametrize(("quota", "num_cpus"), [("-1", None), ("150000", 1)])
def test_usable_processors_under_version_1_quotas(tmp_path: Path, quota: str, num_cpus: int | None) -> None:
    write(tmp_path / "proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/not/visible/here\n")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", f"{quota}\n")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert usable_cpus(tmp_path) == (num_cpus or usable_cpus(tmp_path / "none"))


def test_usable_processors_without_quotas(tmp_path: Path) -> None:
    """A process that was bound to one processor has one."""
    assert 1 <= usable_cpus(tmp_path) <= (os.cpu_count() or 1)
    code = ("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
            "from backends.control_groups import usable_cpus; print(usable_cpus())")
    bound = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert bound.stdout == "1\n"


def build(cache_dir: Path) -> bool:
    """Without optimisation, which takes most of the time and has no part in who publishes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_build, "FLAGS", ("-O0", *cpu_build.FLAGS[1:]))
        return load_kernels(cache_dir) is not None


def test_concurrent_builds_publish_one_library(tmp_path: Path) -> None:
    if not any(map(shutil.which, cpu_build.COMPILERS)):
        pytest.skip("no C compiler here")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(build, [tmp_path / "cache"] * 2) == [True, True]
    published = list((tmp_path / "cache").iterdir())
    assert [p.suffix for p in published] == [".so"]
    assert not published[0].stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    modified = published[0].stat().st_mtime_ns
    assert build(tmp_path / "cache")
    assert published[0].stat().st_mtime_ns == modified


@pytest.mark.parametrize("compiler", [None, "/bin/false", "/nonexistent/cc"])
def test_without_a_working_compiler(
    compiler: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_build.shutil, "which", lambda _: compiler)
    with caplog.at_level(logging.WARNING):
        cpu = get_backend("cpu", cache_dir=tmp_path)
    assert len(caplog.records) == 1
    assert "plain torch" in caplog.text
    assert cpu.ops.attention is REFERENCE.attention
    assert list(tmp_path.iterdir()) == []


def test_a_failing_compilation_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not any(map(shutil.which, cpu_build.COMPILERS)):
        pytest.skip("no C compiler here")
    (tmp_path / "broken.c").write_text("int broken(void) { return nonsense; }\n")
    monkeypatch.setattr(cpu_build, "SOURCE_FOLDER", tmp_path)
    monkeypatch.setattr(cpu_build, "SOURCES", ("broken.c",))
    monkeypatch.setattr(cpu_build, "HEADERS", ())
    with caplog.at_level(logging.INFO):
        assert load_kernels(tmp_path / "cache") is None
    assert "compiling the CPU kernels with" in caplog.text and "nonsense" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


def test_exponential_is_exact_to_a_millionth() -> None:
    library = load_kernels(env.cache_dir())
    if library is None:
        pytest.skip("no C compiler here")
    x = torch.linspace(-86.9, 87.9, 16 * 4001)
    truth = x.double().exp()
    assert ((Kernels(library).exp(x).double() - truth) / truth).abs().max() < 1e-6
