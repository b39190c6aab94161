"""`EngineControl`: an engine that is held, put to sleep and woken while it keeps its settings and its queue."""

from __future__ import annotations

import enum
import gc
from collections import OrderedDict
from typing import TYPE_CHECKING

from xllm.errors import EngineStateError, RequestError
from xllm.request import FinishReason, OutputDelta, Request

if TYPE_CHECKING:
    from xllm.engine.core import EngineCore

KEEP_WEIGHTS, DROP_WEIGHTS = 1, 2


class PauseMode(str, enum.Enum):
    """What becomes of open requests: KEEP freezes them where they are, ABORT ends them, WAIT lets them end by
    themselves. New ones wait in any case until the engine is resumed."""

    KEEP = "keep"
    ABORT = "abort"
    WAIT = "wait"


class EngineControl:
    """Belongs to an `EngineCore`, whose thread calls it."""

    def __init__(self, core: EngineCore):
        self._core = core
        self.mode: PauseMode | None = None  # None: it runs
        self.sleep_level = 0
        self._held: OrderedDict[str, Request] = OrderedDict()
        self._ended: list[OutputDelta] = []

    @property
    def has_ended(self) -> bool:
        return bool(self._ended)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of those that are held."""
        return tuple(self._held)

    @property
    def requests(self) -> tuple[Request, ...]:
        return tuple(self._held.values())

    @property
    def num_held(self) -> int:
        return len(self._held)

    def hold(self, request: Request) -> bool:
        """Whether a new request has to wait for `resume`. Raises RequestError while the engine sleeps."""
        if self.sleep_level:
            raise RequestError("the engine sleeps; POST /wakeup wakes it")
        if self.mode is None:
            return False
        if request.request_id in self._held:
            raise RequestError(f"request id {request.request_id!r} is in use", field="request_id")
        self._core.scheduler.check_room(self.num_held)
        self._held[request.request_id] = request
        return True

    def abort(self, request_id: str) -> bool:
        """Whether it was held here; its terminal output comes with the next step."""
        if self._held.pop(request_id, None) is None:
            return False
        self._end(request_id, FinishReason.ABORT)
        return True

    def take_ended(self) -> list[OutputDelta]:
        """Terminal outputs of requests that ended while they were held."""
        ended, self._ended = self._ended, []
        return ended

    def pause(self, mode: PauseMode) -> None:
        """Hold the engine; when already held, in another way. A step in progress is finished."""
        self.mode = mode
        self._core.loop.frozen = mode is PauseMode.KEEP
        if mode is PauseMode.ABORT:
            self._core.abort_all()

    def resume(self) -> None:
        """Go on, with what was held first come first served."""
        self.mode, self._core.loop.frozen = None, False
        while self._held:
            request_id, request = self._held.popitem(last=False)
            try:
                self._core.admit(request)
            except RequestError as error:
                self._end(request_id, FinishReason.ERROR, str(error))

    def sleep(self, level: int) -> None:
        """Give the memory of the KV cache and the captured graphs back, at level 2 that of the weights too. What was
        cached is lost.

        Raises:
            RequestError: the level is unknown. EngineStateError: requests are open, or the KV cache has lower tiers.
        """
        if level not in (KEEP_WEIGHTS, DROP_WEIGHTS):
            raise RequestError(f"level must be {KEEP_WEIGHTS} or {DROP_WEIGHTS}, got {level}", field="level")
        if self._core.scheduler.kv.has_tiers:
            raise EngineStateError("an engine with KV tiers cannot sleep: their copies refer to the cache's memory")
        if self._core.has_work() or self._core.scheduler.has_requests:
            raise EngineStateError("requests are open: pause with mode abort or wait first")
        if level <= self.sleep_level:
            return
        self._core.scheduler.forget_runner()
        self._core.unload(keep_weights=level == KEEP_WEIGHTS)
        gc.collect()
        self.sleep_level = level

    def wake_up(self) -> None:
        """Take the memory again, and read the weights from the checkpoint where they were dropped."""
        if self.sleep_level:
            self._core.reload()
            self.sleep_level = 0

    def reset_prefix_cache(self) -> int:
        """Forget every cached block that no request uses, but those on disk; returns how many of the device's."""
        return self._core.scheduler.kv.reset_prefix_cache()

    def _end(self, request_id: str, reason: FinishReason, error: str | None = None) -> None:
        delta = OutputDelta(request_id, [])
        delta.finish_reason, delta.error = reason, error
        self._ended.append(delta)
