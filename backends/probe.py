"""`python -m backends.probe NAME [CACHE]`: opens a device in a process of its own and reports the result as a line of
JSON. CACHE: the folder of compiled kernels, as `get_backend` takes it.

For `xllm doctor`: libraries of drivers may end a process, and torch is loaded once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from backends import get_backend
from backends.backend import Backend, BackendError
from backends.cuda_one_shot import MOST_BYTES, obstacle


def probe(name: str, cache_dir: Path | None = None) -> dict[str, Any]:
    """{"name": the backend's, "is_accelerator": whether it has cores of its own, "facts": what it says of itself,
    "group": see `describe_group`}, or {"problem": why there is none}."""
    try:
        backend = get_backend(name, cache_dir=cache_dir)
        return {"name": backend.name, "is_accelerator": not backend.computes_on_host, "facts": backend.describe(),
                "group": {} if backend.computes_on_host else describe_group(backend)}
    except (BackendError, RuntimeError, OSError) as error:
        return {"problem": str(error).strip()}


def describe_group(backend: Backend) -> dict[str, Any]:
    """What ranks on accelerators exchange by. {"devices": how many this process sees, "library": what sums over ranks,
    with its version, "small": how small sums go, where that is another way}, or {"problem": why they cannot}."""
    library = backend.collectives
    if not dist.is_available() or not dist.is_backend_available(library):
        return {"problem": f"this torch has no {library}"}
    module: Any = getattr(torch, backend.device.type)
    try:
        if library == "nccl":
            library += " " + ".".join(map(str, torch.cuda.nccl.version()))
            small = "; ".join(f"{size} ranks: {obstacle(size) or f'up to {most >> 10} KiB in one kernel'}"
                              for size, most in MOST_BYTES.items())
        else:
            small = ""
        return {"devices": module.device_count(), "library": library, "small": small}
    except RuntimeError as error:
        return {"problem": str(error).strip()}


if __name__ == "__main__":
    json.dump(probe(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None), sys.stdout)
