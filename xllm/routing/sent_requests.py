"""`SentRequests`: what a router has sent to one engine, and what of it waits there."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from xllm.routing.prompt_marks import PromptMarks


@dataclass(slots=True)
class _Waiting:
    num_tokens: int  # to compute
    marks: PromptMarks


class SentRequests:
    """A request is entered when it is sent, has begun with its first output, and leaves when it ends. Until it has
    begun, the engine counts as having its prompt: whoever comes with the same one may wait for it instead of computing
    it elsewhere. Not thread-safe."""

    def __init__(self) -> None:
        self.waiting_tokens = 0  # to compute, of requests that have not begun
        self._promised: dict[bytes, int] = {}  # by digest: of how many waiting requests
        self._waiting: dict[str, _Waiting] = {}
        self._open: set[str] = set()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun. What has left the engine's queue and has no output yet is among them: it cannot
        be told apart here."""
        return len(self._waiting)

    def num_promised(self, marks: PromptMarks) -> int:
        """How many of a prompt's marks, from the first on, are those of prompts that wait."""
        # A prompt that has a prefix has every shorter one: the marks that it lacks come after those that it has.
        digests, promised = marks.digests, self._promised
        if not digests or digests[0] not in promised:
            return 0
        if digests[-1] in promised:  # the same prompt again
            return len(digests)
        return bisect_left(digests, True, key=lambda digest: digest not in promised)

    def enter(self, request_id: str, num_tokens: int, marks: PromptMarks) -> None:
        """A request was sent, of whose prompt so many tokens are to be computed."""
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
