"""`AskPauses`: which instances are not asked for room at present, because they did not answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

# After the first question without an answer. Chosen: twice what a question waits (`handovers.py:ASK_S`).
FIRST_PAUSE_S = 4.0
# Chosen: a request a minute loses the time that a question waits, and one that works again is found that late.
MAX_PAUSE_S = 60.0

Life = tuple[str, str | None]  # the name of an instance, and its incarnation: another one has been silent to nobody


@dataclass(slots=True)
class _Pause:
    length_s: float
    until_s: float


class AskPauses:
    """Twice as long after each question without an answer, until one is answered. Without a clock: now_s is on any that
    is always the same."""

    def __init__(self) -> None:
        self._pauses: dict[Life, _Pause] = {}

    def silent(self, life: Life, now_s: float) -> float:
        """A question was not answered in time; returns for how many seconds no other is to be asked. Questions that
        were under way together count once."""
        pause = self._pauses.get(life)
        if pause is None:
            pause = self._pauses[life] = _Pause(FIRST_PAUSE_S, now_s + FIRST_PAUSE_S)
        elif now_s >= pause.until_s:
            pause.length_s = min(2.0 * pause.length_s, MAX_PAUSE_S)
            pause.until_s = now_s + pause.length_s
        return pause.until_s - now_s

    def answered(self, life: Life) -> None:
        """A question was answered in time."""
        self._pauses.pop(life, None)

    def keep(self, lives: Collection[Life]) -> None:
        """Forget all others: they are gone."""
        for life in self._pauses.keys() - set(lives):
            del self._pauses[life]

    def names(self, now_s: float) -> set[str]:
        """Of those that are not to be asked now."""
        return {name for (name, _), pause in self._pauses.items() if now_s < pause.until_s}
