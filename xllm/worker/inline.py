"""`InlineLink`: the worker in the caller's thread. A step is computed when it is submitted."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass

from xllm.runner.model_runner import ModelRunner
from xllm.worker.link import WorkerLink
from xllm.worker.messages import StopWorker, WorkerCommand, WorkerReport, WorkerStats
from xllm.worker.worker import Worker


@dataclass(frozen=True, slots=True)
class Wire:
    """How messages cross to the worker and back: as they are, or encoded and decoded."""

    down: Callable[[WorkerCommand], WorkerCommand]
    up: Callable[[WorkerReport], WorkerReport]


DIRECT = Wire(down=lambda command: command, up=lambda report: report)  # the same object


class InlineLink(WorkerLink):
    """A `WorkerLink` to a worker in this process, whose commands run in the caller's thread."""

    def __init__(self, *, wire: Wire = DIRECT):
        super().__init__()
        self._wire = wire
        # Not only the caller's thread reports: moves between the KV tiers and grammars have threads of their own.
        self._reports: queue.SimpleQueue[WorkerReport] = queue.SimpleQueue()
        self.worker = Worker(self._report)
        self._closed = False

    def send(self, command: WorkerCommand) -> None:
        command = self._wire.down(command)
        if self.worker.receive(command):
            self.worker.perform(command)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.send(StopWorker())

    def stats(self) -> WorkerStats:
        return self.worker.stats()

    def _report(self, report: WorkerReport) -> None:
        self._reports.put(self._wire.up(report))

    def _next(self, timeout_s: float | None) -> WorkerReport | None:
        try:
            return self._reports.get(timeout=timeout_s) if timeout_s != 0.0 else self._reports.get_nowait()
        except queue.Empty:
            return None


def runner_of(link: WorkerLink) -> ModelRunner:
    """The runner behind a link, for benchmarks that look into it. Raises TypeError if it is in another process.

    The worker is loaded and awake.
    """
    if not isinstance(link, InlineLink):
        raise TypeError(f"{type(link).__name__} has its workers elsewhere")
    assert link.worker.runner is not None
    return link.worker.runner
