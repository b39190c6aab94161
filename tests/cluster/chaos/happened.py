"""`Happened`: one fault of a chaos run, and what became of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Happened:
    """One fault. begun_s, ended_s: on the `time.monotonic()` clock. lifted_s: when its cause was gone; recovery is
    from there. dead: the master that it killed. figures: what else was measured, in seconds. not_played: why it was
    not, or not as it should."""

    kind: str
    target: str
    begun_s: float = field(default_factory=time.monotonic)
    lifted_s: float = 0.0
    ended_s: float = 0.0
    problem: str | None = None
    not_played: str | None = None
    dead: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
