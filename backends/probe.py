"""`python -m backends.probe NAME [group]`: opens a device in a process of its own and reports the result as one line of
JSON; with `group`, what ranks on devices of that kind would exchange by.

For `xllm doctor`: libraries of drivers may end a process, and torch is loaded once.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from backends import get_backend
from backends.backend import BackendError
from backends.cuda_one_shot import MOST_BYTES, obstacle


def probe(name: str) -> dict[str, Any]:
    """{"name": the backend's, "is_accelerator": whether it has cores of its own, "facts": what it says of itself}, or
    {"problem": why there is none}."""
    try:
        backend = get_backend(name)
        return {"name": backend.name, "is_accelerator": not backend.computes_on_host, "facts": backend.describe()}
    except (BackendError, RuntimeError, OSError) as error:
        return {"problem": str(error).strip()}


def probe_group(name: str) -> dict[str, Any]:
    """{"devices": how many this process sees, "library": what sums over ranks, with its version, "small": how small
    sums go, where that is another way}, or {"problem": why ranks cannot exchange}."""
    try:
        backend = get_backend(name)
    except (BackendError, RuntimeError, OSError) as error:
        return {"problem": str(error).strip()}
    library = backend.collectives
    if not dist.is_available() or not dist.is_backend_available(library):
        return {"problem": f"this torch has no {library}"}
    module: Any = getattr(torch, name)
    if name != "cuda":
        return {"devices": module.device_count(), "library": library, "small": ""}
    version = ".".join(map(str, torch.cuda.nccl.version()))
    ways = [f"{size} ranks: {obstacle(size) or f'up to {most >> 10} KiB in one kernel'}"
            for size, most in MOST_BYTES.items()]
    return {"devices": module.device_count(), "library": f"{library} {version}", "small": "; ".join(ways)}


if __name__ == "__main__":
    json.dump(probe_group(sys.argv[1]) if sys.argv[2:] == ["group"] else probe(sys.argv[1]), sys.stdout)
