"""What the C library asks the machine for, by the numbers of `enum Request` in acl/runtime.h."""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable

from tests.emulated_npu import runtime
from tests.emulated_npu.collectives import Operation
from tests.emulated_npu.machine import Machine
from tests.emulated_npu.tasks import Group, Kernel, Task, ValueWait, ValueWrite

HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Requests:
    """`answer` is the hook. It is called on any thread, holding the GIL, and returns an ACL code."""

    def __init__(self, machine: Machine):
        self.machine = machine
        do = machine
        self.table: dict[int, Callable[[int, int, int, int], int]] = {
            1: lambda stream, ms, _b, _c: do.sync_stream(stream, ctypes.c_int64(ms).value),
            2: lambda _, ms, _b, _c: do.sync_device(ctypes.c_int64(ms).value),
            3: lambda event, _a, _b, _c: do.sync_event(event),
            4: lambda stream, _a, _b, _c: runtime.NOT_READY if do.is_busy(stream) else runtime.SUCCESS,
            5: lambda event, _a, _b, _c: runtime.SUCCESS if do.has_passed(event) else runtime.NOT_READY,
            6: lambda stream, event, _b, _c: do.record(stream, event),
            7: lambda stream, event, _b, _c: do.wait(stream, event),
            8: lambda stream, address, value, flag: self._submit(stream, ValueWait(address, value, flag)),
            9: lambda stream, address, value, _c: self._submit(stream, ValueWrite(address, value)),
            10: self._copy,
            11: self._fill,
            12: self._host_function,
            13: lambda stream, model, _b, _c: do.begin_capture(stream, model),
            14: lambda stream, model, _b, _c: do.join_capture(stream, model),
            15: lambda stream, model, good, _c: do.end_capture(stream, model, bool(good)),
            16: lambda stream, model, _b, _c: do.execute(stream, model),
            17: lambda model, _a, _b, _c: do.destroy_model(model),
            18: self._begin_group,
            19: lambda stream, group, _b, _c: do.end_group(stream, group),
            20: self._begin_update,
            21: lambda stream, group, _b, _c: do.end_update(stream, group),
            22: lambda stream, _a, _b, _c: do.forget_stream(stream),
            23: self._forget_event,
            24: lambda address, size, _b, _c: do.memory_gone(address, size),
            25: lambda stream, address, sent, taken: do.communicators.queue(stream, Operation(address, sent, taken)),
            26: lambda comm, _a, _b, _c: do.communicators.open(comm),
            27: lambda comm, _a, _b, _c: do.communicators.close(comm),
        }

    def answer(self, request: int, handle: int | None, a: int, b: int, c: int) -> int:
        try:
            with self.machine.changed:
                return self.table[request](handle or 0, a, b, c)
        except Exception:
            traceback.print_exc()
            return runtime.DRIVER_ERROR

    def _submit(self, stream: int, task: Task) -> int:
        self.machine.submit(stream, task)
        return runtime.SUCCESS

    def _copy(self, stream: int, to: int, source: int, size: int) -> int:
        ranges = ((to, size), (source, size))
        return self._submit(stream, Kernel("copy", lambda: ctypes.memmove(to, source, size), ranges))

    def _fill(self, stream: int, to: int, value: int, size: int) -> int:
        return self._submit(stream, Kernel("memset", lambda: ctypes.memset(to, value, size), ((to, size),)))

    def _host_function(self, stream: int, function: int, argument: int, _: int) -> int:
        return self._submit(stream, Kernel("host function", lambda: HOST_FUNCTION(function)(argument)))

    def _begin_group(self, stream: int, _a: int, _b: int, _c: int) -> int:
        self.machine.captures[stream].group = Group()
        return runtime.SUCCESS

    def _begin_update(self, stream: int, _a: int, _b: int, _c: int) -> int:
        self.machine.updates[stream] = []
        return runtime.SUCCESS

    def _forget_event(self, event: int, _a: int, _b: int, _c: int) -> int:
        self.machine.events.pop(event, None)
        return runtime.SUCCESS
