"""Compiles the CPU's kernels with the system's C compiler at first use, and keeps them in a cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger("xllm.backends.cpu")

SOURCE_FOLDER = Path(__file__).parent
SOURCES = ("elementwise.c", "attention.c", "latent.c", "linear.c", "w8a8.c", "experts.c", "sampling.c", "transfer.c",
           "pool.c")
HEADERS = ("vectors.h", "panels.h", "groups.h", "kv_codes.h", "pool.h")
COMPILERS = ("cc", "gcc", "clang")
# For one run of the compiler. Chosen: it takes some seconds; a compiler that hangs must not keep the engine from
# starting.
COMPILE_LIMIT_S = 120.0

# No -ffast-math: NaN must stay NaN, and a library linked with it switches off denormals for the whole process.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-shared", "-fPIC", "-pthread")
# From best to plainest; the first set that the compiler takes is used. Of OpenMP only hints for vectors: threads are
# those of pool.c.
OPTIONAL_FLAGS = (("-march=native", "-fopenmp-simd"), ("-mcpu=native", "-fopenmp-simd"), ("-march=native",), ())


def load_kernels(cache_dir: Path | None) -> ctypes.CDLL | None:
    """The compiled kernels, built into `cache_dir` if they are not there; None: for this process only.

    Returns None, after one warning that says why, if there is no compiler or it fails. Safe when several
    processes do this at once: a library appears under its final name only when it is complete.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        logger.warning("no C compiler (%s) found: the CPU runs on slower plain torch operators", ", ".join(COMPILERS))
        return None
    try:
        if cache_dir is not None:
            return _load_or_build(compiler, cache_dir)
        with tempfile.TemporaryDirectory(prefix="xllm-kernels-") as folder:
            return _load_or_build(compiler, Path(folder))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning("compiling the CPU kernels failed, plain torch operators are used: %s", reason)
        return None


def _load_or_build(compiler: str, folder: Path) -> ctypes.CDLL:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    identity = _identity(compiler)
    failure: subprocess.CalledProcessError | None = None
    for optional in OPTIONAL_FLAGS:
        flags = (*FLAGS, *optional)
        key = hashlib.sha256("\0".join((identity, *flags)).encode()).hexdigest()[:20]
        library = folder / f"cpu-{key}.so"
        try:
            if not library.exists():
                _build(compiler, flags, library)
        except subprocess.CalledProcessError as error:
            failure = failure or error
            continue
        return ctypes.CDLL(str(library))
    assert failure is not None
    raise failure


def _build(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """Compile under another name, then rename: readers see the whole library or none."""
    logger.info("compiling the CPU kernels with %s, once", compiler)
    handle, partial = tempfile.mkstemp(prefix=f"{library.name}.", suffix=".partial", dir=library.parent)
    os.close(handle)
    try:
        sources = [str(SOURCE_FOLDER / name) for name in SOURCES]
        command = [compiler, *flags, *sources, "-o", partial, "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_LIMIT_S)
        os.replace(partial, library)
    finally:
        Path(partial).unlink(missing_ok=True)


def _identity(compiler: str) -> str:
    """All that the result of a compilation depends on, but for the flags."""
    sources = [(SOURCE_FOLDER / name).read_text() for name in (*SOURCES, *HEADERS)]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=10).stdout
    return "\0".join((*sources, version, platform.machine(), _cpu_features()))


def _cpu_features() -> str:
    """What -march=native looks at: the feature line of the first processor, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
