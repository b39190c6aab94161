"""`StopFilter`: lets an answer's text pass up to its first stop string.

A stop string that holds a special token is looked for in the text that has special tokens in it, whether they are shown
or not; all others in the text that is shown.
"""

from __future__ import annotations

import functools

from xllm.text.stop_strings import StopMatch, StopMatcher

Segment = tuple[str, bool]  # a text, and whether it is shown


class StopFilter:
    """After a stop string `stopped` names it, and nothing more may be fed.

    special: texts of special tokens. include_stop: the stop string itself passes too. reads_hidden: whether any stop
    string holds a special token; only then the texts of hidden ones need be fed.
    """

    def __init__(self, stops: tuple[str, ...], special: frozenset[str], *, include_stop: bool):
        marked = _holding(stops, special)
        self._plain = StopMatcher([stop for stop in stops if stop not in marked])
        self._marked = StopMatcher(sorted(marked))
        self.reads_hidden = bool(marked)
        self._include_stop = include_stop
        self._held: list[Segment] = []
        self.stopped: str | None = None

    def feed(self, text: str, *, shown: bool = True, may_stop: bool = True) -> str:
        """Read more text; returns what may be shown now. shown: False for the text of a special token that is hidden.
        may_stop: False where no stop string may end, though one may begin."""
        if not text or not (shown or self.reads_hidden):
            return ""
        match = plain = _read(self._plain, text, may_stop) if shown else None
        if self.reads_hidden:
            match = _first(plain, _read(self._marked, text, may_stop))
        elif match is None and not self._held and (self._include_stop or not self._plain.num_held):
            return text  # as nearly always
        num_before = sum(len(held) for held, _ in self._held)
        if self._held and self._held[-1][1] is shown:
            self._held[-1] = self._held[-1][0] + text, shown
        else:
            self._held.append((text, shown))
        if match is not None:
            self.stopped = match.stop
            return self._up_to(num_before + match.end, match.stop, shown_only=match is plain)
        return self._release(self._num_free(num_before + len(text)))

    def rest(self) -> str:
        """Return what is held back: there is no more text."""
        return self._release(sum(len(text) for text, _ in self._held))

    def _up_to(self, end: int, stop: str, *, shown_only: bool) -> str:
        """The shown part of the held text, cut where `stop` ends, `end` characters into it."""
        if shown_only:
            text = self._release(end)
            return text if self._include_stop else text[: len(text) - len(stop)]
        return self._release(end - len(stop)) + (stop if self._include_stop else "")

    def _num_free(self, num_held: int) -> int:
        """How many of the held characters can no longer be part of a stop string."""
        free = num_held - self._marked.num_held
        num_plain = 0 if self._include_stop else self._plain.num_held
        end = num_held
        for text, shown in reversed(self._held):
            if num_plain == 0:
                break
            taken = min(num_plain, len(text)) if shown else 0
            num_plain -= taken
            free = min(free, end - taken)
            end -= len(text)
        return free

    def _release(self, count: int) -> str:
        """Remove `count` characters from the front of the held text; returns those that are shown."""
        shown_texts, rest = [], []
        for text, shown in self._held:
            taken = text[:count]
            count -= len(taken)
            if shown:
                shown_texts.append(taken)
            if len(taken) < len(text):
                rest.append((text[len(taken):], shown))
        self._held = rest
        return "".join(shown_texts)


@functools.lru_cache(maxsize=8)  # for all choices of a call, which may be many, as may be the texts
def _holding(stops: tuple[str, ...], special: frozenset[str]) -> frozenset[str]:
    """The stop strings that hold one of the texts."""
    texts = [text for text in special if text]
    return frozenset(stop for stop in stops if any(text in stop for text in texts))


def _read(matcher: StopMatcher, text: str, may_stop: bool) -> StopMatch | None:
    if may_stop:
        return matcher.feed(text)
    matcher.skip(text)
    return None


def _first(plain: StopMatch | None, marked: StopMatch | None) -> StopMatch | None:
    """The one that is complete first; of two that end together, the longer."""
    if plain is None or marked is None:
        return plain or marked
    return min(plain, marked, key=lambda match: (match.end, -len(match.stop)))
