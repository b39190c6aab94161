"""`ReplicaLandings`: which of several engines expects KV, and under which of its own numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaLanding:
    """engine: its number. landing: as that engine calls it. request_id: whose KV was expected. until_s: when the
    engine's lease is over."""

    engine: int
    landing: int
    request_id: str
    until_s: float


class ReplicaLandings:
    """Those that were neither used nor taken back, by the numbers that clients know. A number is never used twice, so
    that one of an engine that was started again means nothing to its next life. Without a clock."""

    def __init__(self) -> None:
        self._open: dict[int, ReplicaLanding] = {}
        self._last_number = 0

    def __len__(self) -> int:
        return len(self._open)

    def add(self, landing: ReplicaLanding) -> int:
        """An engine expects KV; returns the number for it."""
        self._last_number += 1
        self._open[self._last_number] = landing
        return self._last_number

    def engine_of(self, number: int | None) -> int | None:
        """The engine that expects this; None: none does (any more)."""
        found = None if number is None else self._open.get(number)
        return None if found is None else found.engine

    def take(self, number: int | None) -> ReplicaLanding | None:
        """It is used, or taken back. None: it is not known."""
        return None if number is None else self._open.pop(number, None)

    def take_over(self, now_s: float) -> list[ReplicaLanding]:
        """Those whose leases are over: they are not known any more."""
        over = [number for number, landing in self._open.items() if landing.until_s <= now_s]
        return [self._open.pop(number) for number in over]

    def forget(self, engine: int) -> None:
        """What an engine expected has gone with it."""
        self._open = {number: landing for number, landing in self._open.items() if landing.engine != engine}
