"""`WaitingTokens`: the prompts that have been handed to the engine and have produced nothing yet, in tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serving.stream import EngineBusyError
from xllm.request import Request


class WaitingTokens:
    """limit: how many may wait; None: any number. Single-threaded."""

    def __init__(self, limit: int | None = None):
        self.limit = limit
        self.num_tokens = 0
        self._by_id: dict[str, int] = {}

    def enter(self, requests: Sequence[Request]) -> None:
        """Count a call's requests in, all or none. Raises EngineBusyError."""
        sizes = {request.request_id: len(request.prompt_token_ids) for request in requests}
        total = sum(sizes.values())
        if self.limit is not None and self.num_tokens + total > self.limit:
            raise EngineBusyError(f"the queue is full: {self.num_tokens} prompt tokens wait, and {total} more would be "
                                  f"over {self.limit}")
        self._by_id.update(sizes)
        self.num_tokens += total

    def leave(self, request_id: str) -> None:
        """It has begun, or ended; unknown ids are ignored."""
        self.num_tokens -= self._by_id.pop(request_id, 0)

    def leave_all(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.leave(request_id)
