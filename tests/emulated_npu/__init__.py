"""An emulated Ascend device for the real torch_npu wheel: `npu:0` on a machine without an NPU.

The wheel's front end (allocator, streams, events, `NPUGraph`, schemas, meta kernels) is the real one. Below it, a C
library takes the place of CANN's ACL runtime with host memory as the device's, and CPU kernels take the place of the
operators. Nothing in the product knows of it: a process is emulated by its environment.

    env = {**os.environ, **environment()}            # for a child process
    python -m tests.emulated_npu run pytest tests/npu
"""

from __future__ import annotations

import os
from pathlib import Path

from tests.emulated_npu.wheel import ROOT, SITE, reason


def environment() -> dict[str, str]:
    """What to add to a process's environment so that it has an `npu:0`. Builds the runtime if it must.

    Raises RuntimeError with the reason where there can be none.
    """
    from tests.emulated_npu.build import runtime

    why_not = reason()
    if why_not is not None:
        raise RuntimeError(why_not)
    here, libraries = Path(__file__).parent, runtime()
    return {
        "PYTHONPATH": _path("PYTHONPATH", here / "site", SITE, ROOT),
        "LD_LIBRARY_PATH": _path("LD_LIBRARY_PATH", libraries),
        "TASK_QUEUE_ENABLE": "0",  # its thread would call into Python from outside
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "ASCEND_HOME_PATH": str(libraries),
        "ASCEND_OPP_PATH": str(libraries / "opp"),
    }


def is_active() -> bool:
    """Whether this process was started with `environment()`."""
    return str(Path(__file__).parent / "site") in os.environ.get("PYTHONPATH", "").split(os.pathsep)


def _path(name: str, *first: Path) -> str:
    ours = [str(each) for each in first]
    others = [each for each in os.environ.get(name, "").split(os.pathsep) if each and each not in ours]
    return os.pathsep.join(ours + others)


__all__ = ["environment", "is_active", "reason"]
