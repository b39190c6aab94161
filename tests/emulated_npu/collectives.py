"""Operations of HCCL as tasks of a stream, and the thread that runs them while the process does other things.

A device alone goes on by itself; here nothing runs unless somebody calls in. Alone that is no matter, but another
process may wait for this one's device while this one waits for something else.
"""

from __future__ import annotations

import ctypes
import threading
from random import Random
from typing import Any, Protocol

from tests.emulated_npu import runtime
from tests.emulated_npu.tasks import Task
from tests.emulated_npu.tensors import Range

POLL_S = 0.0005
LATEST_S = 0.05  # how long work may lie in the worst order while nobody waits for it


class Operation:
    """One call's copy of the arguments. Captured, it is run many times."""

    def __init__(self, address: int, sent_bytes: int, received_bytes: int):
        library = runtime.library()
        size = library.emulated_npu_operation_bytes()
        self.memory = ctypes.create_string_buffer(ctypes.string_at(address, size), size)
        send, receive = (ctypes.c_uint64.from_buffer(self.memory, library.emulated_npu_operation_buffer(i)).value
                         for i in (0, 1))  # fmt: skip
        self.ranges: list[Range] = [each for each in ((send, sent_bytes), (receive, received_bytes)) if each[1]]


class Begin(Task):
    """Posts what this rank sends."""

    label = "collective"

    def __init__(self, operation: Operation):
        self.operation, self.ranges = operation, operation.ranges

    def run(self, scope: Any) -> None:
        _raise(runtime.library().emulated_npu_collective_begin(self.operation.memory))


class End(Task):
    """Is ready once all ranks have posted and read, or cannot any more."""

    label = "collective of all ranks"

    def __init__(self, operation: Operation):
        self.operation, self.ranges = operation, operation.ranges

    def ready(self, scope: Any) -> bool:
        return bool(runtime.library().emulated_npu_collective_step(self.operation.memory) != runtime.NOT_READY)

    def run(self, scope: Any) -> None:
        code = runtime.library().emulated_npu_collective_step(self.operation.memory)
        runtime.library().emulated_npu_collective_end(self.operation.memory)
        _raise(code)


def _raise(code: int) -> None:
    if code:
        raise runtime.DeviceFault(code)


class Queues(Protocol):
    """What the emulated device has queued: see `Machine`."""

    changed: threading.Condition
    num_waiting: int
    random: Random | None

    def has_work(self) -> bool: ...

    def pump(self) -> None: ...

    def step(self) -> bool: ...

    def submit(self, stream: int, task: Task) -> None: ...


class Device(threading.Thread):
    """Runs what is queued while communicators exist: at once, or in the worst order late, but some day."""

    def __init__(self, machine: Queues):
        super().__init__(name="emulated-npu", daemon=True)
        self.machine, self.stopping = machine, threading.Event()

    def run(self) -> None:
        idle_s = 0.0
        while not self.stopping.wait(POLL_S):
            with self.machine.changed:
                if not self.machine.has_work() or self.machine.num_waiting:
                    idle_s = 0.0
                    continue
                idle_s += POLL_S
                if self.machine.random is None:
                    self.machine.pump()
                elif idle_s >= LATEST_S:
                    self.machine.step()
                self.machine.changed.notify_all()


class Communicators:
    """Those that are open in this process."""

    def __init__(self, machine: Queues):
        self.machine = machine
        self.handles: set[int] = set()
        self.device: Device | None = None

    def open(self, handle: int) -> int:
        self.handles.add(handle)
        if self.device is None:
            self.device = Device(self.machine)
            self.device.start()
        return runtime.SUCCESS

    def close(self, handle: int) -> int:
        runtime.library().emulated_npu_comm_close(handle)
        self.handles.discard(handle)
        if not self.handles and self.device is not None:
            self.device.stopping.set()
            self.device = None
        return runtime.SUCCESS

    def queue(self, stream: int, operation: Operation) -> int:
        self.machine.submit(stream, Begin(operation))
        self.machine.submit(stream, End(operation))
        return runtime.SUCCESS

    def drop_all(self) -> None:
        """What was queued is given up: the communicators that had work have failed."""
        for handle in self.handles:
            runtime.library().emulated_npu_comm_drop(handle)
