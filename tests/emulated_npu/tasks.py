"""What can be queued on a stream. A task is given a scope: None, or the run of a captured model it belongs to.

`ready` says whether the head of a queue can go on, `run` does it. Tasks of a captured model are run many times, so
they keep no state of their own.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tests.emulated_npu.tensors import Range

GEQ, EQ, AND, NOR = range(4)
MASK = (1 << 64) - 1


class Task:
    label = "task"
    ranges: Sequence[Range] = ()

    def ready(self, scope: Any) -> bool:
        return True

    def run(self, scope: Any) -> None:
        raise NotImplementedError


class Kernel(Task):
    """`call` closes over addresses only; `ranges` are the memory it reads and writes."""

    __slots__ = ("call", "label", "ranges")

    def __init__(self, label: str, call: Callable[[], Any], ranges: Sequence[Range] = ()):
        self.label, self.call, self.ranges = label, call, ranges

    def run(self, scope: Any) -> None:
        self.call()


class Record(Task):
    label = "event record"

    def __init__(self, event: Event, number: int):
        self.event, self.number = event, number

    def run(self, scope: Any) -> None:
        self.event.done = max(self.event.done, self.number)


class Wait(Task):
    label = "event wait"

    def __init__(self, event: Event, number: int):
        self.event, self.number = event, number

    def ready(self, scope: Any) -> bool:
        return self.event.done >= self.number

    def run(self, scope: Any) -> None:
        pass


class CapturedRecord(Task):
    label = "captured event record"

    def __init__(self, key: tuple[int, int]):
        self.key = key

    def run(self, scope: Run) -> None:
        scope.passed.add(self.key)


class CapturedWait(Task):
    label = "captured event wait"

    def __init__(self, key: tuple[int, int]):
        self.key = key

    def ready(self, scope: Run) -> bool:
        return self.key in scope.passed

    def run(self, scope: Run) -> None:
        pass


class ValueWait(Task):
    label = "value wait"

    def __init__(self, address: int, value: int, flag: int):
        self.address, self.value, self.flag = address, value, flag
        self.ranges = ((address, 8),)

    def ready(self, scope: Any) -> bool:
        now = ctypes.c_uint64.from_address(self.address).value
        if self.flag == GEQ:
            return (now - self.value) & MASK < 1 << 63
        if self.flag == EQ:
            return now == self.value
        return bool(now & self.value) if self.flag == AND else bool(~(now | self.value) & MASK)

    def run(self, scope: Any) -> None:
        pass


class ValueWrite(Task):
    label = "value write"

    def __init__(self, address: int, value: int):
        self.address, self.value = address, value
        self.ranges = ((address, 8),)

    def run(self, scope: Any) -> None:
        ctypes.c_uint64.from_address(self.address).value = self.value


class Group(Task):
    """The kernels of a task group. An update replaces them all."""

    label = "task group"

    def __init__(self) -> None:
        self.kernels: list[Task] = []

    @property
    def ranges(self) -> list[Range]:  # type: ignore[override]
        return [each for kernel in self.kernels for each in kernel.ranges]

    def run(self, scope: Any) -> None:
        for kernel in self.kernels:
            kernel.run(scope)


class Update(Task):
    """A task update takes place where it is queued: a replay that runs before it still has the old arguments."""

    label = "task update"

    def __init__(self, group: Group, kernels: list[Task]):
        self.group, self.kernels = group, kernels

    def run(self, scope: Any) -> None:
        self.group.kernels = self.kernels


class Event:
    """`submitted` counts the records that were queued, `done` those that have run."""

    def __init__(self) -> None:
        self.submitted = self.done = 0


class Lane:
    """A queue that runs in order."""

    def __init__(self, name: str, scope: Run | None = None):
        self.name, self.scope = name, scope
        self.tasks: deque[Task] = deque()
        self.running: Task | None = None

    def is_idle(self) -> bool:
        return not self.tasks and self.running is None

    def ready(self) -> bool:
        return bool(self.tasks) and self.tasks[0].ready(self.scope)


class Run:
    """One replay of a captured model: a lane for each captured stream, and which captured events have passed."""

    def __init__(self, model: Any):
        self.model = model
        self.passed: set[tuple[int, int]] = set()
        self.lanes: list[Lane] = []
        for stream, nodes in model.nodes.items():
            lane = Lane(f"replay on {stream:#x}", self)
            lane.tasks.extend(nodes)
            self.lanes.append(lane)

    def finished(self) -> bool:
        return not any(lane.tasks for lane in self.lanes)


class Join(Task):
    """Stands in a stream's queue while a replay that began there runs."""

    label = "replay"

    def __init__(self, run: Run):
        self.replay = run

    @property
    def ranges(self) -> list[Range]:  # type: ignore[override]
        found: list[Range] = self.replay.model.ranges()
        return found

    def ready(self, scope: Any) -> bool:
        return self.replay.finished()

    def run(self, scope: Any) -> None:
        self.replay.model.running -= 1
