"""`xllm doctor`: what this machine can run, what is missing, and what to install for it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OK, MISSING, HINT = "ok", "missing", "hint"
CPU_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
SERVING_PACKAGES = ("fastapi", "uvicorn", "pydantic", "msgspec", "pyzmq", "prometheus-client")
NOT_BUILT = "this version has no operators for it yet and runs on the CPU"
CANN_FOLDERS = (Path("/usr/local/Ascend/ascend-toolkit"), Path("/usr/local/Ascend/cann"))
ADVICE = {"torch": "pip install torch", "transformers": "pip install 'transformers>=5.17'"}


@dataclass(frozen=True)
class Finding:
    """`needed`: without it the CPU path does not work."""

    state: str
    what: str
    detail: str
    needed: bool = False


def main() -> int:
    """Print one line a finding; 0 if the CPU path works."""
    findings = list(examine())
    for finding in findings:
        print(f"{finding.state:8}{finding.what:22}{finding.detail}")
    works = all(finding.state != MISSING for finding in findings if finding.needed)
    print("the CPU path works" if works else "the CPU path does not work: install what is missing above")
    return 0 if works else 1


def examine() -> Iterator[Finding]:
    """All findings, in the order in which a reader needs them."""
    fine = sys.version_info >= (3, 10)
    advice = "" if fine else "; install 3.10 or newer"
    yield Finding(OK if fine else MISSING, "python", platform.python_version() + advice, True)
    for name in CPU_PACKAGES:
        yield _package(name, needed=True)
    for name in SERVING_PACKAGES:
        yield _package(name, needed=True)
    yield from _cpu()
    yield from _cuda()
    yield from _npu()
    yield _memory()
    yield _bundled_model()


def _package(name: str, *, needed: bool = False) -> Finding:
    try:
        return Finding(OK, name, version(name), needed)
    except PackageNotFoundError:
        return Finding(MISSING, name, ADVICE.get(name, f"pip install {name}"), needed)


def _cpu() -> Iterator[Finding]:
    flags = _cpu_flags()
    fast = [flag for flag in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if flag in flags]
    yield Finding(OK if fast else HINT, "cpu", f"{platform.machine()}, {' '.join(fast) or 'no vector flags known'}")
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    yield (Finding(OK, "C compiler", compiler) if compiler else
           Finding(HINT, "C compiler", "none: CPU kernels stay on plain torch, which is slower; install gcc or clang"))
    if importlib.util.find_spec("torch") is None:
        return
    from backends import get_backend
    from backends.backend import BackendError
    from xllm import env

    try:
        backend = get_backend("cpu", cache_dir=env.cache_dir(), compiled=env.compiled_kernels_allowed())
    except (BackendError, OSError) as error:
        yield Finding(MISSING, "cpu backend", str(error), True)
        return
    yield Finding(OK, "cpu backend", ", ".join(f"{name}: {value}" for name, value in backend.describe().items()), True)


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}


def _cuda() -> Iterator[Finding]:
    driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()
    if not driver:
        yield Finding(HINT, "cuda", "no NVIDIA driver here; nothing to do unless this machine has such a GPU")
        return
    yield Finding(HINT, "cuda", f"NVIDIA driver found; {NOT_BUILT}")


def _npu() -> Iterator[Finding]:
    card = Path("/dev/davinci0").exists() or shutil.which("npu-smi") is not None
    if not card:
        yield Finding(HINT, "npu", "no Ascend device here; nothing to do unless this machine has one")
        return
    yield Finding(HINT, "npu", f"Ascend device found; {NOT_BUILT}")
    cann = next((path for path in CANN_FOLDERS if path.exists()), None)
    yield (Finding(OK, "CANN", str(cann)) if cann else
           Finding(MISSING, "CANN", "install the CANN toolkit and source its set_env.sh"))
    yield _package("torch-npu")


def _memory() -> Finding:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return Finding(HINT, "memory", "unknown on this system")
    values = {line.split(":")[0]: int(line.split()[1]) for line in info.read_text(encoding="ascii").splitlines()}
    free, total = values.get("MemAvailable", 0) / 2**20, values["MemTotal"] / 2**20
    return Finding(OK if free >= 1.0 else HINT, "memory", f"{free:.1f} GiB available of {total:.1f} GiB")


def _bundled_model() -> Finding:
    folder = Path(importlib.util.find_spec("xllm").origin or ".").parent / "bundled"  # type: ignore[union-attr]
    weights = folder / "model.safetensors"
    if weights.is_file():
        return Finding(OK, "bundled model", f"{weights.stat().st_size / 2**20:.1f} MiB")
    return Finding(HINT, "bundled model", "not in this installation; name a model folder")
