"""What graph capture means for operators: tasks whose arguments change between replays, and who may use the device.

A captured launch has the numbers baked in that the host passed to it, such as the lengths of attention. A launch that
is `TaskRecorder.add`ed can be issued anew before each replay: the graph waits in front of it for an event that the
update records. Protocol: `torch.npu` graph task groups, as in vllm-ascend `attention_v1.py:full_graph_fia`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
        self._is_capturing = False
        self._local = threading.local()

    @contextmanager
    def using(self) -> Iterator[None]:
        """Hold captures off. A thread that is inside already, either way, continues at once."""
        if getattr(self._local, "inside", False):
            yield
            return
        with self._condition:
            self._condition.wait_for(lambda: not self._is_capturing and not self._num_waiting)
            self._num_users += 1
        self._local.inside = True
        try:
            yield
        finally:
            self._local.inside = False
            with self._condition:
                self._num_users -= 1
                self._condition.notify_all()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Wait until no thread uses the device and keep all others out. Not inside `using`."""
        assert not getattr(self._local, "inside", False)
        with self._condition:
            self._num_waiting += 1
            self._condition.wait_for(lambda: not self._is_capturing and not self._num_users)
            self._num_waiting -= 1
            self._is_capturing = True
        self._local.inside = True
        try:
            yield
        finally:
            self._local.inside = False
            with self._condition:
                self._is_capturing = False
                self._condition.notify_all()


CAPTURE_LOCK = CaptureLock()
# Between the first and the last call of a replay and its update nobody else's may come.
REPLAY_LOCK = threading.Lock()


class Events:
    """The events that graphs wait for in front of their tasks. Used again, since the memory behind an `ExternalEvent`
    never goes back.

    The runtime wants a record behind each wait, so an event whose wait was captured is given to no other graph until
    its first update. From then on graphs may share it: an update is queued only when all earlier replays are done.
    """

    def __init__(self) -> None:
        self._free: list[Any] = []

    def take(self) -> Any:
        return self._free.pop() if self._free else torch.npu.ExternalEvent()

    def put_back(self, events: list[Any]) -> None:
        self._free += events


EVENTS = Events()


@dataclass(frozen=True, slots=True)
class Task:
    """A captured launch. issue: queue it on the current stream with the arguments of now."""

    handle: Any
    event: Any
    issue: Callable[[], None]


class TaskRecorder:
    """The tasks of one capture, in order. derived: tensors that several launches of the capture share; gone at its end.

    Used by the capturing thread, on the capture stream.
    """

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.derived: dict[Any, Any] = {}
        self._workspaces: dict[Any, Tensor] = {}
        self._waiting: list[Any] = []  # events, until the first update

    def workspace(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """Memory for launches with this key, which run one after the other; kept as long as the graph."""
        if key not in self._workspaces:
            self._workspaces[key] = make()
        return self._workspaces[key]

    def add(self, issue: Callable[[], None]) -> None:
        """Queue a launch as a task. `issue` may keep no tensor of the pool alive (`weak`)."""
        stream, event = torch.npu.current_stream(), EVENTS.take()
        self._waiting.append(event)
        event.wait(stream)
        event.reset(stream)
        torch.npu.graph_task_group_begin(stream)
        issue()
        self.tasks.append(Task(torch.npu.graph_task_group_end(stream), event, issue))

    def update(self, stream: Any) -> None:
        """Issue all tasks anew, on another stream than the replay's. Whatever happens, the replay is let go on."""
        num_recorded = 0
        try:
            with torch.npu.stream(stream), recording(None):
                for task in self.tasks:
                    _issue_again(task, stream)
                    task.event.record(stream)
                    num_recorded += 1
        finally:
            for task in self.tasks[num_recorded:]:
                task.event.record(stream)
            EVENTS.put_back(self._waiting)
            self._waiting = []


def _issue_again(task: Task, stream: Any) -> None:
    torch.npu.graph_task_update_begin(stream, task.handle)
    try:
        task.issue()
    except BaseException:
        with suppress(RuntimeError):  # it has no launch to update with
            torch.npu.graph_task_update_end(stream)
        raise
    torch.npu.graph_task_update_end(stream)


_thread = threading.local()


def current_recorder() -> TaskRecorder | None:
    """Of the capture that this thread is in; None: its launches run, or update."""
    recorder: TaskRecorder | None = getattr(_thread, "recorder", None)
    return recorder


@contextmanager
def recording(recorder: TaskRecorder | None) -> Iterator[None]:
    """Within, this thread's launches go into a capture, or an update of one (None): nothing may be read back."""
    before, reads_values = current_recorder(), CHECKING.reads_values()
    _thread.recorder = recorder
    CHECKING.set_capturing(True)
    try:
        yield
    finally:
        _thread.recorder = before
        CHECKING.set_capturing(not reads_values)


def weak(tensor: Tensor) -> Tensor:
    """The same memory, not kept alive: within a captured step it is used again, in each replay alike."""
    import torch_npu

    found: Tensor = torch_npu._C._weak_ref_tensor(tensor)
    return found
