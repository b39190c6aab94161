"""`WaitingTokens`: counts the prompts that the engine has been given and has not answered yet, and decides which
requests are refused or ended when there are too many.

The queue is measured in prompt tokens, which is what time to first token grows with. As it fills up, work that can wait
is refused first: offline requests from one watermark on, those of low priority from another. When it is full, a request
of a better class takes the place of waiting ones of the worst.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from xllm.client.engine_client import EngineBusyError
from xllm.request import Request

ONLINE, LOW, OFFLINE = 0, 1, 2  # classes, the best first
CLASS_NAMES = ("online", "low priority", "offline")


@dataclass(frozen=True, slots=True)
class _Waiting:
    num_tokens: int
    rank: tuple[int, int]  # class, then priority: the larger, the sooner it goes
    order: int


class WaitingTokens:
    """limit: how many tokens may wait; None: any number. shares: of the limit, from which low priority and offline
    requests are refused. shed(ids): ends waiting requests. Single-threaded."""

    def __init__(self, limit: int | None = None, *, low_share: float = 1.0, offline_share: float = 1.0,
                 shed: Callable[[Sequence[str]], None] = lambda request_ids: None):
        self.limit, self.shares = limit, (1.0, low_share, offline_share)
        self.num_tokens = 0
        self.num_refused, self.num_shed = [0, 0, 0], [0, 0, 0]  # requests, by class
        self.shed = shed
        self._by_id: dict[str, _Waiting] = {}
        self._num_entered = 0

    def enter(self, requests: Sequence[Request]) -> None:
        """Count a call's requests in, all or none; worse waiting requests may be shed for them. Raises
        EngineBusyError."""
        total = sum(len(request.prompt_token_ids) for request in requests)
        worst = max((class_of(request) for request in requests), default=ONLINE)
        if self.limit is not None:
            most = int(self.limit * self.shares[worst])
            excess = self.num_tokens + total - most
            if excess > 0 and not self._make_room(excess, min(map(rank_of, requests)), most):
                self.num_refused[worst] += len(requests)
                raise EngineBusyError(f"the queue is full: {self.num_tokens} prompt tokens wait, and {total} more "
                                      f"would be over the {most} for {CLASS_NAMES[worst]} requests")
        for request in requests:
            self._num_entered += 1
            self._by_id[request.request_id] = _Waiting(len(request.prompt_token_ids), rank_of(request),
                                                       self._num_entered)
        self.num_tokens += total

    def _make_room(self, excess: int, rank: tuple[int, int], most: int) -> bool:
        """Shed waiting requests that are worse than `rank`, the worst and latest first; none if that is not enough."""
        assert self.limit is not None
        if most < self.limit:  # a watermark, not the end of the queue
            return False
        worse = sorted((waiting.rank, waiting.order, request_id) for request_id, waiting in self._by_id.items()
                       if waiting.rank > rank)
        victims, found = [], 0
        while worse and found < excess:
            _, _, request_id = worse.pop()
            victims.append(request_id)
            found += self._by_id[request_id].num_tokens
        if found < excess:
            return False
        for request_id in victims:
            self.num_shed[self._by_id[request_id].rank[0]] += 1
        self.shed(victims)
        self.leave_all(victims)
        return True

    def leave(self, request_id: str) -> None:
        """Count a request out: it has begun to answer, or ended. Unknown ids are ignored."""
        if (waiting := self._by_id.pop(request_id, None)) is not None:
            self.num_tokens -= waiting.num_tokens

    def leave_all(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.leave(request_id)


def class_of(request: Request) -> int:
    """The class of a request; a priority above 0 is low, since smaller ones run first."""
    return OFFLINE if request.offline else LOW if request.priority > 0 else ONLINE


def rank_of(request: Request) -> tuple[int, int]:
    return class_of(request), max(0, request.priority)
