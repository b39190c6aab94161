"""`Refusals`: calls that were turned away although nothing was wrong with them (429 and 503), by why and whose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client.core import Metric

from serving.observe.metrics.families import Families
from serving.security.caller import CALLER
from serving.security.keys import Caller

QUOTA, QUEUE_FULL, OVERLOAD, UNAVAILABLE = "quota", "queue_full", "overload", "unavailable"
REASONS = (QUOTA, QUEUE_FULL, OVERLOAD, UNAVAILABLE)


class Refusals:
    """Counts calls that were turned away, by reason and kind of caller. Not thread-safe; the event loop owns it.

    quota: the key has used up its share. queue_full: too many prompt tokens or requests wait. overload: it waited and
    had to make room, or too many grammars are being compiled. unavailable: the model loads, the engine sleeps, starts
    again or has ended, or the server drains.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def note(self, reason: str, caller: Caller | None = None) -> None:
        """Count a refusal. caller: None means the caller of the running task."""
        self._counts[reason, (caller or CALLER.get()).kind] += 1

    def families(self, make: Families, kinds: Sequence[str]) -> Iterator[Metric]:
        """kinds: of callers that the server can have."""
        yield make.counter_by_all(("reason", "key_class"), "admission_rejections", "Calls that were turned away",
                                  {(reason, kind): self._counts[reason, kind] for reason in REASONS for kind in kinds})
