"""`Gate`: keeps a request from the scheduler while it waits for something other than room.

The core asks its gates in their order; the first that wants the request keeps it until `take_passed` returns it, and
then the gates after it are asked. `PauseGate` is first; `grammars.py` has the one for compiled grammars.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol

from xllm.errors import RequestError
from xllm.request import FinishReason, OutputDelta, Request


class Gate(Protocol):
    """Interface of the gates. Every method belongs to the core's thread."""

    reason: str  # what its requests wait for, as the gauges call it

    def hold(self, request: Request) -> bool:
        """Keep the request if it has to wait; returns False if it may go on. Raises RequestError if it never may."""
        ...

    def abort(self, request_id: str) -> bool:
        """End a request that waits here; its terminal output comes from `take_ended`. Returns False if it does not wait
        here."""
        ...

    @property
    def requests(self) -> tuple[Request, ...]:
        """The requests that wait here, in the order in which they came."""
        ...

    def hear(self) -> None:
        """Take in what the workers have answered, if it has asked them anything. Called before every step."""
        ...

    def take_passed(self) -> list[Request]:
        """Return the requests that need not wait here any longer, and keep them no more."""
        ...

    def refuse(self, request: Request, error: RequestError) -> None:
        """End a request that has passed this gate but cannot go on, with the error as its reason."""
        ...

    def take_ended(self) -> list[OutputDelta]:
        """The terminal outputs of requests that ended here since the last call."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether `take_passed` or `take_ended` has something to return now or soon."""
        ...


class Held:
    """The requests that one gate keeps, and the terminal outputs of those that ended there; shared by the gates."""

    def __init__(self) -> None:
        self._held: dict[str, Request] = {}
        self._ended: list[OutputDelta] = []

    @property
    def requests(self) -> tuple[Request, ...]:
        """Those that wait here, in the order in which they came."""
        return tuple(self._held.values())

    def abort(self, request_id: str) -> bool:
        """End a request that waits here; False: it does not."""
        request = self._held.pop(request_id, None)
        if request is not None:
            self._end(request, FinishReason.ABORT)
        return request is not None

    def refuse(self, request: Request, error: RequestError) -> None:
        """End a request with an error as its reason."""
        self._end(request, FinishReason.ERROR, str(error))

    def take_ended(self) -> list[OutputDelta]:
        """Terminal outputs of requests that ended here since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        self._ended.append(OutputDelta(request.request_id, [], finish_reason=reason, error=error))


class PauseMode(str, enum.Enum):
    """What becomes of open requests: KEEP freezes them where they are, ABORT ends them, WAIT lets them end by
    themselves. New ones wait in any case until the engine is resumed."""

    KEEP = "keep"
    ABORT = "abort"
    WAIT = "wait"


class PauseGate(Held):
    """Keeps new requests while the engine is paused, and refuses them while it sleeps."""

    reason = "paused"

    def __init__(self, check_room: Callable[[int], None]):
        """check_room(num_held): raises RequestError if no more requests are taken beside `num_held` held here."""
        super().__init__()
        self._check_room = check_room
        self.mode: PauseMode | None = None  # None: it runs
        self.is_asleep = False

    @property
    def has_work(self) -> bool:
        return bool(self._ended) or (self._is_open and bool(self._held))

    @property
    def _is_open(self) -> bool:
        """Requests that were held when it was put to sleep wait for both: that it is woken, and resumed."""
        return self.mode is None and not self.is_asleep

    def hear(self) -> None:
        """Nothing to do: it asks nothing of the workers."""

    def hold(self, request: Request) -> bool:
        """Keep the request if the engine is paused, or earlier ones still wait. Raises RequestError while the engine
        sleeps."""
        if self.is_asleep:
            raise RequestError("the engine sleeps; POST /wakeup wakes it")
        if self.mode is None and not self._held:  # nobody overtakes those that still wait
            return False
        if request.request_id in self._held:
            raise RequestError(f"request id {request.request_id!r} is in use", field="request_id")
        self._check_room(len(self._held))
        self._held[request.request_id] = request
        return True

    def take_passed(self) -> list[Request]:
        """Return all held requests, first come first served, once the engine is resumed and awake."""
        if not self._is_open:
            return []
        passed, self._held = list(self._held.values()), {}
        return passed
