"""`xllm doctor`: what this machine can run, what is missing, and what to install for it."""

from __future__ import annotations

import importlib.util
import json
import logging
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from serving.commands.doctor_groups import group_findings, model_findings
from serving.commands.finding import HINT, MISSING, OK, Finding
from xllm.child_process import run_module

CPU_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
SERVING_PACKAGES = ("fastapi", "uvicorn", "pydantic", "msgspec", "pyzmq", "prometheus-client")
NVIDIA_DRIVER = Path("/proc/driver/nvidia")
CANN_FOLDERS = (Path("/usr/local/Ascend/ascend-toolkit"), Path("/usr/local/Ascend/cann"))
CANN_VERSION_FILES = ("*/ascend_toolkit_install.info", "ascend_toolkit_install.info", "version.cfg", "*/version.info")
# Which CANN a line of torch_npu is made for, as vllm-ascend's releases pair them; later ones are not known.
CANN_OF = {"2.10": ("9.0", "9.1"), "2.9": ("8.5",)}
CANN_VERSION = re.compile(r"(?im)^.*version\s*=\s*\[?(?:\w+:)?([0-9]+\.[0-9][\w.]*)")
# For torch to load and a device to open. Chosen: a slow disk takes a minute; a hanging driver is reported.
PROBE_TIMEOUT_S = 120
EXAMINED = ("auto", "cpu", "cuda", "npu")  # values of --device that have findings of their own
TOOLS = {"cuda": "nvidia-smi", "npu": "npu-smi info"}  # of the drivers, which show more
ADVICE = {"torch": "pip install torch", "transformers": "pip install 'transformers>=5.17'"}


def main(model: str | None = None) -> int:
    """Print one line a finding; 0 if the CPU path works. model: how many ranks can share it is said too."""
    findings = list(examine(model))
    for finding in findings:
        print(f"{finding.state:8}{finding.what:22}{finding.detail}")
    works = all(finding.state != MISSING for finding in findings if finding.needed)
    accelerator = findings[-1].accelerator  # of `_choice`
    if works and accelerator:
        print(f"xllm runs on {accelerator} here; the CPU path works as well (--device cpu)")
    else:
        print("the CPU path works" if works else "the CPU path does not work: install what is missing above")
    return 0 if works else 1


def compile_kernels() -> int:
    """Compile the CPU's kernels, as the first start of an engine would, and say so. 0 even where there is no compiler:
    the CPU path then works on plain torch."""
    from xllm import env

    if not env.compiled_kernels_allowed():
        print("CPU kernels: not compiled, as XLLM_NO_COMPILED_KERNELS says")
        return 0
    from backends.cpu.build import load_kernels

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began_s = time.monotonic()
    if load_kernels(env.cache_dir()) is not None:
        print(f"CPU kernels: ready in {time.monotonic() - began_s:.1f} s, kept in {env.cache_dir()}")
    return 0


def examine(model: str | None = None) -> Iterator[Finding]:
    """All findings, in the order in which a reader needs them."""
    fine = sys.version_info >= (3, 10)
    advice = "" if fine else "; install 3.10 or newer"
    yield Finding(OK if fine else MISSING, "python", platform.python_version() + advice, True)
    for name in CPU_PACKAGES:
        yield _package(name, needed=True)
    for name in SERVING_PACKAGES:
        yield _package(name, needed=True)
    yield from _cpu()
    devices = [_cuda(), *_npu(), *_others()]
    yield from devices
    if importlib.util.find_spec("torch") is not None:
        from backends.control_groups import usable_cpus

        opened = [found.what.removesuffix(" backend") for found in devices
                  if found.state == OK and found.what.endswith(" backend")]
        yield from group_findings(usable_cpus(), [name for name in opened if name in TOOLS],
                                  lambda name: _probe(name, TOOLS[name])["group"])
        if model is not None:
            yield from model_findings(model)
    yield _memory()
    yield _bundled_model()
    yield _choice(devices)


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


def _cuda(nvidia: Path = NVIDIA_DRIVER) -> Finding:
    if shutil.which("nvidia-smi") is None and not nvidia.exists():
        return Finding(HINT, "cuda", "no NVIDIA driver here; nothing to do unless this machine has such a GPU")
    return _backend("cuda", TOOLS["cuda"])


def _npu() -> Iterator[Finding]:
    has_card = Path("/dev/davinci0").exists() or shutil.which("npu-smi") is not None
    package = _package("torch-npu")
    if not has_card and package.state != OK:
        yield Finding(HINT, "npu", "no Ascend device here; nothing to do unless this machine has one")
        return
    yield package
    if package.state != OK:
        return
    yield from cann_findings(package.detail, CANN_FOLDERS)
    yield _backend("npu", TOOLS["npu"])


def _others() -> Iterator[Finding]:
    """Devices whose drivers are not known here: whether they open."""
    if importlib.util.find_spec("torch") is None:
        return
    from backends import NAMES

    for name in NAMES:
        if name not in EXAMINED:
            yield _backend(name, "its driver")


def cann_findings(torch_npu: str, folders: tuple[Path, ...]) -> Iterator[Finding]:
    """Whether CANN is there, its environment set, and its version the one that torch_npu is made for.

    folders: where it is usually installed.
    """
    from xllm import env

    home, installed = env.ascend_home(), next((path for path in folders if path.exists()), None)
    if home is None:
        advice = (f"installed in {installed}, but its environment is not set: source {installed}/set_env.sh"
                  if installed else
                  "install the CANN toolkit, or run in its container image, and source its set_env.sh")
        yield Finding(MISSING, "CANN", advice)
        return
    if not home.exists():
        yield Finding(MISSING, "CANN", f"ASCEND_HOME_PATH is {home}, which does not exist: source set_env.sh anew")
        return
    version, wanted = cann_version(home), CANN_OF.get(".".join(torch_npu.split(".")[:2]))
    if version is None or wanted is None:
        pair = f"torch-npu {torch_npu} has no known pairing" if version else "its version is not to be found there"
        yield Finding(HINT, "CANN", f"{version or ''} {home}; {pair}; docs/ascend.md names what is proven".strip())
    elif not version.startswith(wanted):
        yield Finding(MISSING, "CANN", f"{version} in {home}, but torch-npu {torch_npu} is made for {wanted[-1]}: "
                                       "errors 561002 and 161002 are what comes of that")
    else:
        yield Finding(OK, "CANN", f"{version} {home}")


def cann_version(home: Path) -> str | None:
    """The version of the CANN toolkit in `home`, from its files; None if none says it."""
    for pattern in CANN_VERSION_FILES:
        for path in sorted(home.glob(pattern)):
            found = CANN_VERSION.search(path.read_text(errors="replace"))
            if found:
                return found[1]
    return None


def _backend(name: str, tool: str) -> Finding:
    """What `--device NAME` does here, as a finding. tool: the driver's command that shows more."""
    answer = _probe(name, tool)
    if "problem" in answer:
        return Finding(MISSING, f"{name} backend", answer["problem"])
    return Finding(OK, f"{name} backend", ", ".join(f"{key}: {value}" for key, value in answer["facts"].items()))


def _choice(devices: Sequence[Finding]) -> Finding:
    """What `--device auto`, the default, chooses here and why. devices: the findings about accelerators."""
    if importlib.util.find_spec("torch") is None:
        return Finding(HINT, "device auto", "none: torch is missing")
    answer = _probe("auto", "the lines above")
    if "problem" in answer:
        return Finding(MISSING, "device auto", f"nothing: {answer['problem']}; --device cpu works all the same")
    name, device = answer["name"], answer["facts"]["device"]
    if answer["is_accelerator"]:
        return Finding(OK, "device auto", f"{name}: {device}, since torch can use it; --device cpu takes the processor",
                       accelerator=name)
    unused = [finding.detail for finding in devices if finding.state == MISSING]
    if unused:
        return Finding(HINT, "device auto", f"cpu, for another device is not usable: {'; '.join(unused)}")
    return Finding(OK, "device auto", "cpu: no accelerator was found")


@cache
def _probe(name: str, tool: str) -> dict[str, Any]:
    """Open a device in another process (`backends/probe.py`); returns its answer, or {"problem": what went wrong with
    that}."""
    from xllm import env

    command = [sys.executable, "-W", "ignore", *run_module("backends.probe"), name, str(env.cache_dir())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"problem": f"the device does not open within {PROBE_TIMEOUT_S} s: see {tool}"}
    found = re.search(r"\{.*\}", done.stdout)
    if found is None:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return {"problem": f"opening the device ended the process ({done.returncode}): {last}"}
    answer: dict[str, Any] = json.loads(found[0])
    return answer


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
