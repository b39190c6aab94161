"""`python -m backends.probe NAME`: opens a device in a process of its own and reports the result as one line of JSON.

For `xllm doctor`: libraries of drivers may end a process, and torch is loaded once.
"""

from __future__ import annotations

import json
import sys

from backends import get_backend
from backends.backend import BackendError


def probe(name: str) -> dict[str, dict[str, str] | str]:
    """{"name": the backend's, "facts": `Backend.describe()`}, or {"problem": why there is none}."""
    try:
        backend = get_backend(name)
        return {"name": backend.name, "facts": backend.describe()}
    except (BackendError, RuntimeError, OSError) as error:
        return {"problem": str(error).strip()}


if __name__ == "__main__":
    json.dump(probe(sys.argv[1]), sys.stdout)
