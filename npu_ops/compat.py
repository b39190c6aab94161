"""Loading torch_npu, and what differs between its versions: from 2.10.0.post4 to 2.14 by looking at operator schemas.

Nothing here is decided by a version number, except what is refused because it was never looked at.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

LOWEST, BEYOND = (2, 10), (2, 15)  # versions of torch_npu, first and first not, whose operator schemas were looked at
PRODUCTION = "CANN 9.1.0 with torch_npu 2.10.0.post4"
LIBRARY_HINTS = {
    "libhccl": "the CANN toolkit is not installed, or its set_env.sh was not sourced in this shell",
    "libascendcl": "the CANN toolkit is not installed, or its set_env.sh was not sourced in this shell",
    "libatb": "the NNAL package of CANN is missing: source /usr/local/Ascend/nnal/atb/set_env.sh",
    "libascend_hal": "the Ascend driver is not visible here: mount its lib64 into the container",
}


class NpuMissing(RuntimeError):
    """torch_npu cannot be used in this process; the message says why and what to do."""


def load() -> ModuleType:
    """Import torch_npu. Raises NpuMissing."""
    problem = version_problem()
    if problem is not None:
        raise NpuMissing(problem)
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, RuntimeError, OSError) as error:
        raise NpuMissing(explain(str(error))) from error


def installed_version() -> str | None:
    try:
        return version("torch-npu")
    except PackageNotFoundError:
        return None


def version_problem() -> str | None:
    """Why the installed torch_npu cannot go with the installed torch, or None."""
    mine = installed_version()
    if mine is None:
        return "torch_npu is not installed: pip install 'xllm-engine[npu]'"
    line, torch_line = _line(mine), _line(torch.__version__)
    if not LOWEST <= line < BEYOND:
        return f"torch_npu {mine} is not supported: 2.10.0.post4 to 2.14 are ({PRODUCTION} is what to run)"
    if line != torch_line:
        return (f"torch_npu {mine} is made for torch {line[0]}.{line[1]}, and this is torch {torch.__version__}: "
                f"pip install torch=={line[0]}.{line[1]}.*")
    return None


def explain(message: str) -> str:
    """What an error of the import means and what to do."""
    for library, hint in LIBRARY_HINTS.items():
        if library in message:
            return f"torch_npu cannot be loaded: {hint} ({message.strip().splitlines()[0]})"
    if "accelerators" in message:
        return f"torch_npu refuses to run beside another accelerator's torch; use a CPU build of torch ({message})"
    return f"torch_npu cannot be loaded: {message}"


def _line(text: str) -> tuple[int, int]:
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int(minor)


@cache
def has_op(name: str) -> bool:
    """Whether the loaded torch_npu has `npu::name`."""
    return hasattr(torch.ops.npu, name)


@cache
def takes(name: str, argument: str) -> bool:
    """Whether an operator has an argument of that name."""
    return has_op(name) and any(a.name == argument for a in getattr(torch.ops.npu, name).default._schema.arguments)
