"""`python -m backends.probe NAME`: opens a device in a process of its own and reports the result as one line of JSON.

For `xllm doctor`: libraries of drivers may end a process, and torch is loaded once.
"""

from __future__ import annotations

import json
import sys

from backends import get_backend
from backends.backend import BackendError


def probe(name: str) -> dict[str, dict[str, str] | str | bool]:
    """{"name": the backend's, "is_accelerator": whether it has cores of its own, "facts": what it says of itself}, or
    {"problem": why there is none}."""
    try:
        backend = get_backend(name)
        return {"name": backend.name, "is_accelerator": not backend.computes_on_host, "facts": backend.describe()}
    except (BackendError, RuntimeError, OSError) as error:
        return {"problem": str(error).strip()}


if __name__ == "__main__":
    json.dump(probe(sys.argv[1]), sys.stdout)
