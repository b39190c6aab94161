"""Section `env`: what this machine is; on a GPU also the kernels' compilation ahead of the other sections."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.bench import Bench

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "cuda-bindings", "llguidance")
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,memory.total,"
              "memory.used,power.draw,power.limit,temperature.gpu,pstate,clocks_throttle_reasons.active",
              "--format=csv")  # fmt: skip


def run(bench: Bench) -> None:
    bench.results.put("env", facts(bench))
    bench.attempt("warm_up", bench.profile.section_s["env"] / 2, warm_up, bench)


def facts(bench: Bench) -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform(), "cpus": str(os.cpu_count()),
             "threads": str(torch.get_num_threads())}  # fmt: skip
    found["host memory"] = f"{bench.device.backend.available_host_bytes() / 2**30:.0f} GiB free"
    found["load"] = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    found |= {name: _version(name) for name in PACKAGES}
    if bench.device.is_cuda:
        found["nvidia-smi"] = _nvidia_smi()
        found["free memory"] = f"{bench.device.free_bytes() / 2**30:.1f} GiB"
        found["L2"] = f"{bench.device.l2_bytes / 2**20:.0f} MiB"
    return found | bench.device.backend.describe()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _nvidia_smi() -> str:
    try:
        return subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not available: {error}"


def warm_up(bench: Bench) -> None:
    """Kernels are compiled at their first call, one after the other; several processes that share Triton's cache
    compile different ones at once."""
    if not bench.device.is_cuda:
        return bench.absent("warm_up", "not on this device: nothing is compiled by Triton")
    began, count = time.time(), bench.profile.warm_processes
    command = [sys.executable, "-m", "benchmarks.gpu.warm_up", bench.device.kind, bench.profile.name]
    root = Path(__file__).parents[2]
    children = [subprocess.Popen([*command, str(index), str(count)], cwd=root, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True) for index in range(count)]  # fmt: skip
    limit = time.time() + min(bench.profile.section_s["env"], bench.left_s)
    for index, child in enumerate(children):
        try:
            error = child.communicate(timeout=max(1.0, limit - time.time()))[1]
            bench.check(f"warm_up/{index}", child.returncode == 0, why=error[-2000:])
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            bench.absent(f"warm_up/{index}", f"it had not ended after {time.time() - began:.0f} s")
    bench.row("warm_up", seconds=round(time.time() - began, 1), processes=count)
