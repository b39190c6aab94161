"""What graph capture means for operators: tasks whose arguments change between replays, and who may use the device.

A captured launch has the numbers baked in that the host passed to it, such as the lengths of attention. A launch that
is `TaskRecorder.add`ed can be issued anew before each replay: the graph waits in front of it for an event that the
update records. Protocol: `torch.npu` graph task groups, as in vllm-ascend `attention_v1.py:full_graph_fia`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_ops.contract import CHECKING


class CaptureLock:
    """Many may use the device at once, or one may capture. Captures do not starve: who comes later lets them in.

    A synchronous copy or an allocation of *any* thread makes a capture fail (107027, 107030).
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_users = 0
        self._num_waiting = 0
        self._capturing: int | None = None  # the thread
        self._local = threading.local()

    @contextmanager
    def using(self) -> Iterator[None]:
        """Hold captures off. A thread that has the device already, either way, just goes on."""
        me = threading.get_ident()
        depth = getattr(self._local, "depth", 0)
        if self._capturing != me and not depth:
            with self._condition:
                self._condition.wait_for(lambda: self._capturing is None and not self._num_waiting)
                self._num_users += 1
            self._local.entered = True
        self._local.depth = depth + 1
        try:
            yield
        finally:
            self._local.depth = depth
            if not depth and getattr(self._local, "entered", False):
                self._local.entered = False
                with self._condition:
                    self._num_users -= 1
                    self._condition.notify_all()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Wait until nobody uses the device and keep everybody out."""
        with self._condition:
            self._num_waiting += 1
            self._condition.wait_for(lambda: self._capturing is None and not self._num_users)
            self._num_waiting -= 1
            self._capturing = threading.get_ident()
        try:
            yield
        finally:
            with self._condition:
                self._capturing = None
                self._condition.notify_all()


CAPTURE_LOCK = CaptureLock()


@dataclass(frozen=True, slots=True)
class Task:
    """A captured launch. issue: queue it on the current stream with the arguments of now."""

    handle: Any
    event: Any
    issue: Callable[[], None]


_events: dict[torch.device, list[Any]] = {}


def task_event(device: torch.device, number: int) -> Any:
    """The event that the graphs' tasks of that number wait for: one for all graphs, since an update is queued only when
    all earlier replays are done (and the memory behind an `ExternalEvent` never goes back)."""
    events = _events.setdefault(device, [])
    while len(events) <= number:
        events.append(torch.npu.ExternalEvent())
    return events[number]


class TaskRecorder:
    """The tasks of one capture, in order. derived: tensors that several launches of the capture share; gone at its end.

    Used by the capturing thread, on the capture stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.tasks: list[Task] = []
        self._num_waits = 0
        self.derived: dict[Any, Any] = {}
        self._workspaces: dict[Any, Tensor] = {}

    def workspace(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """Memory for launches with this key, which run one after the other; kept as long as the graph."""
        if key not in self._workspaces:
            self._workspaces[key] = make()
        return self._workspaces[key]

    def add(self, issue: Callable[[], None]) -> None:
        """Queue a launch as a task. `issue` may keep no tensor of the pool alive (`weak`)."""
        stream, event = torch.npu.current_stream(), task_event(self._device, self._num_waits)
        self._num_waits += 1
        event.wait(stream)
        event.reset(stream)
        torch.npu.graph_task_group_begin(stream)
        issue()
        self.tasks.append(Task(torch.npu.graph_task_group_end(stream), event, issue))

    def give_up(self) -> None:
        """The capture was broken off. What waits for its events will never come: no graph uses them again."""
        del _events.setdefault(self._device, [])[: self._num_waits]

    def update(self, stream: Any) -> None:
        """Issue all tasks anew, on another stream than the replay's. Whatever happens, the replay is let go on."""
        issued = 0
        try:
            with torch.npu.stream(stream), recording(None, capturing=True):
                for task in self.tasks:
                    torch.npu.graph_task_update_begin(stream, task.handle)
                    task.issue()
                    torch.npu.graph_task_update_end(stream)
                    task.event.record(stream)
                    issued += 1
        finally:
            for task in self.tasks[issued:]:
                task.event.record(stream)


_local = threading.local()


def current_recorder() -> TaskRecorder | None:
    """Of the capture that this thread is in; None: its launches run."""
    recorder: TaskRecorder | None = getattr(_local, "recorder", None)
    return recorder


@contextmanager
def recording(recorder: TaskRecorder | None, *, capturing: bool = True) -> Iterator[None]:
    """Within, this thread's launches go into a capture (or an update): nothing may be read back from the device."""
    before = current_recorder(), not CHECKING.reads_values()
    _local.recorder = recorder
    CHECKING.set_capturing(capturing)
    try:
        yield
    finally:
        _local.recorder = before[0]
        CHECKING.set_capturing(before[1])


def weak(tensor: Tensor) -> Tensor:
    """The same memory, not kept alive: within a captured step it is used again, in each replay alike."""
    import torch_npu

    found: Tensor = torch_npu._C._weak_ref_tensor(tensor)
    return found
