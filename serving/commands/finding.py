"""`Finding`: a line of `xllm doctor`."""

from __future__ import annotations

from dataclasses import dataclass

OK, MISSING, HINT = "ok", "missing", "hint"


@dataclass(frozen=True)
class Finding:
    """needed: without it the CPU path does not work. accelerator: the one that `--device auto` takes."""

    state: str
    what: str
    detail: str
    needed: bool = False
    accelerator: str = ""
