"""`EngineControl`: pauses an engine, puts it to sleep and wakes it, while it keeps its settings and its queue."""

from __future__ import annotations

from collections.abc import Callable

from xllm.engine.gates import PauseGate, PauseMode
from xllm.engine.step_loop import StepLoop
from xllm.errors import ConfigError, DeviceError, DiskError, EngineStateError, ModelError, RequestError
from xllm.worker.failures import as_error
from xllm.worker.link import WorkerLink
from xllm.worker.messages import Done, Sleep, Wake

KEEP_WEIGHTS, DROP_WEIGHTS = 1, 2  # levels of sleep; vLLM's numbers


class EngineControl:
    """Belongs to the core's thread. `abort_all` ends every open request; `has_work` tells whether any is left, or an
    adapter is being read."""

    def __init__(self, loop: StepLoop, link: WorkerLink, gate: PauseGate, *, abort_all: Callable[[], None],
                 has_work: Callable[[], bool]):
        self._loop, self._link, self._gate = loop, link, gate
        self._abort_all, self._has_work = abort_all, has_work
        self.sleep_level = 0

    @property
    def mode(self) -> PauseMode | None:
        """How the engine is paused; None: it is not."""
        return self._gate.mode

    def pause(self, mode: PauseMode) -> None:
        """Pause the engine, or change how it is paused. A step in progress is finished."""
        self._gate.mode = mode
        self._loop.frozen = mode is PauseMode.KEEP
        if mode is PauseMode.ABORT:
            self._abort_all()

    def resume(self) -> None:
        """End the pause; the next step takes in the requests that were held, first come first served."""
        self._gate.mode, self._loop.frozen = None, False

    def sleep(self, level: int) -> None:
        """Free the memory of the KV cache and the captured graphs, at level 2 that of the weights too. Cached KV is
        lost.

        Raises: RequestError: the level is unknown. EngineStateError: requests are open, or the KV cache has lower
        tiers.
        """
        if level not in (KEEP_WEIGHTS, DROP_WEIGHTS):
            raise RequestError(f"level must be {KEEP_WEIGHTS} or {DROP_WEIGHTS}, got {level}", field="level")
        if self._loop.scheduler.kv.has_tiers:
            raise EngineStateError("an engine with KV tiers cannot sleep: their copies refer to the cache's memory")
        if self._has_work() or self._loop.scheduler.has_requests:
            raise EngineStateError("requests are open or adapters are being read: pause with mode abort or wait first")
        if level <= self.sleep_level:
            return
        self._loop.scheduler.forget_runner()
        self._call(Sleep(keep_weights=level == KEEP_WEIGHTS))
        self.sleep_level, self._gate.is_asleep = level, True

    def wake_up(self) -> None:
        """Allocate the memory again, and read the weights from the checkpoint if they were dropped. Raises as loading
        does; the engine then still sleeps."""
        if self.sleep_level:
            try:
                self._call(Wake())
            except (ConfigError, ModelError, DeviceError, DiskError):  # of one rank; others may be awake
                self._call(Sleep(keep_weights=self.sleep_level == KEEP_WEIGHTS))
                raise
            self.sleep_level, self._gate.is_asleep = 0, False

    def reset_prefix_cache(self) -> int:
        """Drop every cached block that no request uses, on the device and in host memory, not on disk; returns how many
        on the device."""
        return self._loop.scheduler.kv.reset_prefix_cache()

    def _call(self, command: Sleep | Wake) -> None:
        error = self._link.call(command, Done).error
        if error is not None:
            raise as_error(error)
