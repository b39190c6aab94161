"""`EngineView`: what a router knows of one engine: which KV blocks it can find, and what it has to do."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xllm.kv.block import DIGEST_BYTES, TIERS
from xllm.routing.choose import Candidate
from xllm.routing.prompt_marks import PromptMarks


@dataclass(slots=True)
class _Waiting:
    num_tokens: int  # to compute
    marks: PromptMarks


class EngineView:
    """max_waiting, max_open: requests that it takes into its queue, and in all. Not thread-safe.

    A request is entered when it is sent there, has begun with its first output, and leaves when it ends. Until it has
    begun, the engine counts as having its prompt: whoever comes with the same one may wait for it instead of computing
    it elsewhere."""

    def __init__(self, max_waiting: int = sys.maxsize, max_open: int = sys.maxsize) -> None:
        self._max_waiting, self._max_open = max_waiting, max_open
        self.waiting_tokens = 0
        self._cached: tuple[set[bytes], ...] = tuple(set() for _ in TIERS)
        self._promised: dict[bytes, int] = {}  # by digest: of how many waiting requests
        self._waiting: dict[str, _Waiting] = {}
        self._open: set[str] = set()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def __len__(self) -> int:
        """KV blocks that the engine can find."""
        return len(set[bytes]().union(*self._cached))

    def change(self, tier: int, stored: bytes, removed: bytes) -> None:
        """Take in which blocks it can find in a tier now, and which no longer: their digests, joined."""
        self._cached[tier].difference_update(_digests(removed))
        self._cached[tier].update(_digests(stored))

    def forget(self) -> None:
        """The engine has been started anew: nothing is cached."""
        for tier in self._cached:
            tier.clear()

    def matched_tokens(self, marks: PromptMarks) -> int:
        """How many tokens of a prompt need not be computed there, to the nearest mark below."""
        # A cache that has a prefix has every shorter one: the marks that it lacks come after those that it has.
        num_found = bisect_left(marks.digests, True, key=self._lacks)
        return marks.num_tokens[num_found - 1] if num_found else 0

    def _lacks(self, digest: bytes) -> bool:
        device, host, disk = self._cached
        return digest not in device and digest not in host and digest not in disk and digest not in self._promised

    def candidate(self, prompts: Sequence[PromptMarks], num_requests: int, num_free_tokens: int) -> Candidate:
        """The engine as it stands for a call of so many requests with these prompts. num_free_tokens: room in its KV
        cache."""
        # What has left the queue and has no output yet is taken for waiting: it cannot be told apart here.
        is_full = (len(self._waiting) + num_requests > self._max_waiting
                   or len(self._open) + num_requests > self._max_open)
        return Candidate(matched_tokens=sum(map(self.matched_tokens, prompts)), waiting_tokens=self.waiting_tokens,
                         num_open=self.num_open, free_tokens=max(0, num_free_tokens - self.waiting_tokens),
                         is_full=is_full)

    def enter(self, request_id: str, num_tokens: int, marks: PromptMarks) -> None:
        """A request was sent there, of whose prompt so many tokens are to be computed."""
        self._open.add(request_id)
        self._waiting[request_id] = _Waiting(num_tokens, marks)
        self.waiting_tokens += num_tokens
        for digest in marks.digests:
            self._promised[digest] = self._promised.get(digest, 0) + 1

    def begun(self, request_id: str) -> None:
        """Its first output has come. Unknown ids are ignored, as those that have begun are."""
        if (waiting := self._waiting.pop(request_id, None)) is None:
            return
        self.waiting_tokens -= waiting.num_tokens
        for digest in waiting.marks.digests:
            if self._promised[digest] == 1:
                del self._promised[digest]
            else:
                self._promised[digest] -= 1

    def left(self, request_id: str) -> None:
        """It has ended, however. Unknown ids are ignored."""
        self.begun(request_id)
        self._open.discard(request_id)


def _digests(joined: bytes) -> Iterator[bytes]:
    return (joined[start : start + DIGEST_BYTES] for start in range(0, len(joined), DIGEST_BYTES))
