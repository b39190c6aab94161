"""Runs plans: in the caller's thread, or in a thread of its own so that the next step can be scheduled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from xllm.step import ScheduleOutput, StepOutput

R = TypeVar("R")
RIDE_S = 100e-6  # for riders after each step


class Runner(Protocol):
    """`ModelRunner`, or anything that answers plans."""

    def prepare(self, plan: ScheduleOutput) -> None:
        """May do ahead what the plan needs, in the submitter's thread while an earlier step runs."""
        ...

    def run(self, plan: ScheduleOutput) -> StepOutput: ...

    def start(self, plan: ScheduleOutput) -> StepOutput | QueuedStep:
        """As `run`, but it need not wait for a device that works on its own."""
        ...


class QueuedStep(Protocol):
    """A step that a device is still busy with. The next one may be started, but not the one after it."""

    def finish(self) -> StepOutput:
        """Wait for its results; in the thread that runs the steps."""
        ...


class Riders(Protocol):
    """Small work that is better done in the thread that computes than beside it."""

    @property
    def num_riding(self) -> int: ...

    def ride(self, budget_s: float) -> None: ...


class Executor(Protocol):
    """Steps are run one after the other in the order of `submit`; `result` returns them in that order."""

    depth: int  # how many steps may be in flight while the next is scheduled

    runner: Runner | None  # set before the first step
    riders: Riders | None  # what may run between two steps, in their thread

    def call(self, load: Callable[[], R]) -> R:
        """Call something in the thread that will run the steps. Raises what it raises."""
        ...

    def submit(self, plan: ScheduleOutput) -> None: ...

    def result(self) -> StepOutput:
        """Wait for the oldest step. Raises what the runner raised."""
        ...

    def shutdown(self) -> None: ...


class InlineExecutor:
    """No overlap: a step is run when it is submitted."""

    depth = 0

    def __init__(self) -> None:
        self.runner: Runner | None = None
        self.riders: Riders | None = None
        self._results: deque[StepOutput] = deque()

    def call(self, load: Callable[[], R]) -> R:
        return load()

    def submit(self, plan: ScheduleOutput) -> None:
        assert self.runner is not None
        self._results.append(self.runner.run(plan))
        if self.riders is not None and self.riders.num_riding:
            self.riders.ride(RIDE_S)

    def result(self) -> StepOutput:
        return self._results.popleft()

    def shutdown(self) -> None:
        pass


class ThreadExecutor:
    """One step ahead: the runner works in its own thread.

    The model is to be loaded in that thread as well (`call`). OpenMP keeps a pool of workers for each thread that
    ever computed, and with two pools on the same cores its workers stop spinning between operators:
    measured, a decode step then takes half as long again.
    """

    depth = 1

    def __init__(self) -> None:
        self.runner: Runner | None = None
        self.riders: Riders | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xllm-runner")
        self._futures: deque[Future[StepOutput | QueuedStep]] = deque()

    def call(self, load: Callable[[], R]) -> R:
        return self._pool.submit(load).result()

    def submit(self, plan: ScheduleOutput) -> None:
        assert self.runner is not None
        self.runner.prepare(plan)
        self._futures.append(self._pool.submit(self.runner.start, plan))
        if self.riders is not None and self.riders.num_riding:
            self._pool.submit(self.riders.ride, RIDE_S)

    def result(self) -> StepOutput:
        started = self._futures.popleft().result()
        return started if isinstance(started, StepOutput) else self._pool.submit(started.finish).result()

    def shutdown(self) -> None:
        self._pool.shutdown(wait=True)
