"""`DispatchCounts`: what became of the calls of a cluster, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

CAUSES = ("lost", "drained")  # why calls go on elsewhere


@dataclass(slots=True)
class DispatchCounts:
    """Totals. decisions: by their reasons. recovered: calls that went on elsewhere, by why: lost, drained. handovers:
    of `handovers.py:OUTCOMES`. retried: calls that were sent to another instance because one had no room.
    recomputed_tokens: of prompts and answers that were sent to be computed again, without what was cached there.
    given_up: calls that ended with an error because no instance could go on."""

    decisions: Counter[str] = field(default_factory=Counter)
    recovered: Counter[str] = field(default_factory=Counter)
    handovers: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    recomputed_tokens: int = 0
    given_up: int = 0
