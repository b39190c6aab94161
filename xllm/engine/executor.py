"""Runs plans: in the caller's thread, or in a thread of its own so that the next step can be scheduled."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from xllm.step import ScheduleOutput, StepOutput


class Runner(Protocol):
    """`ModelRunner`, or anything that answers plans."""

    def run(self, plan: ScheduleOutput) -> StepOutput: ...


class Executor(Protocol):
    """Steps are run one after the other in the order of `submit`; `result` returns them in that order."""

    depth: int  # how many steps may be in flight while the next is scheduled

    def submit(self, plan: ScheduleOutput) -> None: ...

    def result(self) -> StepOutput:
        """Wait for the oldest step. Raises what the runner raised."""
        ...

    def shutdown(self) -> None: ...


class InlineExecutor:
    """No overlap: a step is run when it is submitted."""

    depth = 0

    def __init__(self, runner: Runner):
        self._runner = runner
        self._results: deque[StepOutput] = deque()

    def submit(self, plan: ScheduleOutput) -> None:
        self._results.append(self._runner.run(plan))

    def result(self) -> StepOutput:
        return self._results.popleft()

    def shutdown(self) -> None:
        pass


class ThreadExecutor:
    """One step ahead: the runner works in its own thread."""

    depth = 1

    def __init__(self, runner: Runner):
        self._runner = runner
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="xllm-runner")
        self._futures: deque[Future[StepOutput]] = deque()

    def submit(self, plan: ScheduleOutput) -> None:
        self._futures.append(self._pool.submit(self._runner.run, plan))

    def result(self) -> StepOutput:
        return self._futures.popleft().result()

    def shutdown(self) -> None:
        self._pool.shutdown(wait=True)
