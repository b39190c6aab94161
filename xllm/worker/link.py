"""`WorkerLink`: the engine's connection to its workers, in any of the ways of `open.py`."""

from __future__ import annotations

from collections import deque
from typing import TypeVar

from xllm.config import EngineConfig
from xllm.progress import Progress
from xllm.step import StepOutput
from xllm.worker.failures import as_error
from xllm.worker.messages import (
    Failed,
    Load,
    Loaded,
    LoadProgress,
    Settle,
    WorkerCommand,
    WorkerReport,
    WorkerStats,
)

R = TypeVar("R", bound=WorkerReport)


class WorkerLink:
    """Sends commands in order and sorts the reports that come back by type. Belongs to one thread.

    Every method that takes in reports raises what a worker failed with; afterwards only `close` may be called. depth:
    how many steps may be in flight while the next one is scheduled.
    """

    depth = 0
    has_ended = False  # there are no workers any more

    def __init__(self) -> None:
        self._queues_steps = False
        self._outputs: deque[StepOutput] = deque()
        self._taken: dict[type, list[WorkerReport]] = {}  # reports that have come and were not taken yet

    # --- what a way to the workers provides

    def send(self, command: WorkerCommand) -> None:
        """Hand a command to every rank; of a plan, `result` returns the output."""
        raise NotImplementedError

    def close(self) -> None:
        """End the workers: in order if they answer, else by force where that is possible. Idempotent."""
        raise NotImplementedError

    def stats(self) -> WorkerStats:
        """What rank 0 says of itself; any thread may ask. At most a second old where it is another process."""
        raise NotImplementedError

    def idle_s(self) -> float | None:
        """In how many seconds `check` should be called while nothing is sent; None: not at all."""
        return None

    def check(self) -> None:
        """Take in the reports that have come. Raises what a worker failed with, and WorkerError for a worker that has
        ended or is stuck."""
        while self._take(0.0):
            pass

    def _next(self, timeout_s: float | None) -> WorkerReport | None:
        """The next report, waiting up to `timeout_s` for it (None: without limit); None if none comes in time."""
        raise NotImplementedError

    # --- steps

    def result(self) -> StepOutput:
        """Wait for the results of the oldest step."""
        self.check()
        if not self._outputs and self._queues_steps:
            self.send(Settle())
        while not self._outputs:
            self._take(None)
        return self._outputs.popleft()

    # --- everything else

    def load(self, config: EngineConfig, progress: Progress) -> Loaded:
        """Load the model. Raises ConfigError, ModelError, DeviceError or DiskError."""
        self.send(Load(config=config))
        while not self._taken.get(Loaded):
            self._take(None)
            for phase in self._pop(LoadProgress):
                progress(phase.name, phase.share)
        loaded = self._pop(Loaded)[0]
        self._queues_steps = loaded.queues_steps
        return loaded

    def call(self, command: WorkerCommand, answer: type[R]) -> R:
        """Send a command and wait for its answer of type `answer`. No other answer of that type may be on its way."""
        self.send(command)
        while not self._taken.get(answer):
            self._take(None)
        self._pop(LoadProgress)
        return self._pop(answer)[0]

    def take(self, kind: type[R]) -> list[R]:
        """The reports of one kind that have come since the last call, in their order."""
        self.check()
        return self._pop(kind)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a report comes, at most `timeout_s`; returns whether one has come."""
        return self._take(timeout_s)

    def _pop(self, kind: type[R]) -> list[R]:
        found = self._taken.pop(kind, [])
        return [report for report in found if isinstance(report, kind)]

    def _take(self, timeout_s: float | None) -> bool:
        report = self._next(timeout_s)
        if report is None:
            return False
        if isinstance(report, Failed):
            error = as_error(report)
            error.of_worker = True  # type: ignore[attr-defined]  # it has logged it
            raise error
        if isinstance(report, StepOutput):
            self._outputs.append(report)
        else:
            self._taken.setdefault(type(report), []).append(report)
        return True
