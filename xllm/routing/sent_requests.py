"""`SentRequests`: what a router has sent to one engine, and what of it waits there."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from xllm.routing.predictors import squares
from xllm.routing.prompt_marks import PromptMarks


@dataclass(slots=True)
class _Waiting:
    num_tokens: int  # to compute
    num_squares: float
    marks: PromptMarks


class SentRequests:
    """A request is entered when it is sent, has begun with its first output, and leaves when it ends. Until it has
    begun, the engine counts as having its prompt: whoever comes with the same one may wait for it instead of computing
    it elsewhere. One whose KV another instance sends here is expected until it is entered.

    What is told twice, or of a request that is not known, changes nothing. Not thread-safe."""

    def __init__(self) -> None:
        self.waiting_tokens = 0  # to compute, of requests that have not begun
        self.waiting_squares = 0.0  # of these, what attention costs: `predictors.squares`
        self.expected_tokens = 0  # of requests whose KV is to come
        self._promised: dict[bytes, int] = {}  # by digest: of how many waiting requests
        self._waiting: dict[str, _Waiting] = {}
        self._open: set[str] = set()
        self._expected: dict[str, int] = {}  # tokens of each

    @property
    def num_open(self) -> int:
        """Requests that have not ended, without those that are expected."""
        return len(self._open)

    @property
    def num_expected(self) -> int:
        """Requests whose KV is to come."""
        return len(self._expected)

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun. What has left the engine's queue and has no output yet is among them: it cannot
        be told apart here."""
        return len(self._waiting)

    def is_open(self, request_id: str) -> bool:
        """Whether it was entered and has not left."""
        return request_id in self._open

    def is_expected(self, request_id: str) -> bool:
        """Whether its KV is to come."""
        return request_id in self._expected

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
        if request_id in self._open:
            return
        self.expected_tokens -= self._expected.pop(request_id, 0)
        self._open.add(request_id)
        num_cached = max(0, marks.num_tokens[-1] - num_tokens) if marks.num_tokens else 0
        self._waiting[request_id] = waiting = _Waiting(num_tokens, squares(num_tokens, num_cached), marks)
        self.waiting_tokens += num_tokens
        self.waiting_squares += waiting.num_squares
        for digest in marks.digests:
            self._promised[digest] = self._promised.get(digest, 0) + 1

    def expect(self, request_id: str, num_tokens: int) -> None:
        """A request computes elsewhere, and goes on here with so many tokens. One that is here is not expected."""
        if request_id not in self._open and request_id not in self._expected:
            self._expected[request_id] = num_tokens
            self.expected_tokens += num_tokens

    def begun(self, request_id: str) -> None:
        """Its first output has come. Unknown ids are ignored, as those that have begun are."""
        if (waiting := self._waiting.pop(request_id, None)) is None:
            return
        self.waiting_tokens -= waiting.num_tokens
        self.waiting_squares = self.waiting_squares - waiting.num_squares if self._waiting else 0.0
        for digest in waiting.marks.digests:
            if self._promised[digest] == 1:
                del self._promised[digest]
            else:
                self._promised[digest] -= 1

    def left(self, request_id: str) -> None:
        """It has ended, however. Unknown ids are ignored."""
        self.begun(request_id)
        self._open.discard(request_id)
        self.expected_tokens -= self._expected.pop(request_id, 0)
