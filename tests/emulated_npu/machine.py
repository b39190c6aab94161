"""Runs what is queued: at once as far as order allows, or late and in a random legal order.

`EMULATED_NPU_ORDER` empty: a task runs as soon as everything before it has run. A number: nothing runs before
somebody waits for it; then the queues take turns drawn with that seed, so that work which is ordered by luck only comes
out wrong.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch

from tests.emulated_npu import runtime
from tests.emulated_npu.audit import freed_by_allocator
from tests.emulated_npu.capture import Model
from tests.emulated_npu.collectives import POLL_S, Communicators, End
from tests.emulated_npu.tasks import Event, Group, Join, Kernel, Lane, Record, Run, Task, Update, Wait
from tests.emulated_npu.tensors import Range


class Machine:
    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.streams: dict[int, Lane] = {}
        self.replays: list[Lane] = []
        self.events: dict[int, Event] = {}
        self.captures: dict[int, Model] = {}  # by stream
        self.models: dict[int, Model] = {}
        self.groups: dict[int, Group] = {}
        self.updates: dict[int, list[Task]] = {}  # by stream
        self.failure: str | None = None
        self.failure_code = runtime.AICORE_EXCEPTION
        self.num_waiting = 0  # threads
        self.communicators = Communicators(self)
        self.set_order(os.environ.get("EMULATED_NPU_ORDER"))
        self.patience_s = float(os.environ.get("EMULATED_NPU_DEADLOCK_S", "10"))
        self.audits = os.environ.get("EMULATED_NPU_AUDIT") == "1"

    def set_order(self, seed: str | None) -> None:
        """Nothing: at once. Otherwise the seed of a random order. Takes effect for what is queued from now on."""
        self.random = random.Random(seed) if seed else None

    def is_plain(self, stream: int) -> bool:
        """Whether a kernel on the stream can simply be run where it is called."""
        if self.random is not None or stream in self.captures or stream in self.updates:
            return False
        lane = self.streams.get(stream)
        return lane is None or lane.is_idle()

    def is_recording(self, stream: int) -> bool:
        return stream in self.captures or stream in self.updates

    def submit(self, stream: int, task: Task) -> None:
        with self.changed:
            if stream in self.updates:
                self.updates[stream].append(task)
            elif stream in self.captures:
                self.captures[stream].add(stream, task)
            else:
                self.queue(stream, task)

    def queue(self, stream: int, task: Task) -> int:
        self.streams.setdefault(stream, Lane(f"stream {stream:#x}")).tasks.append(task)
        if self.random is None:
            self.pump()
        self.changed.notify_all()
        return runtime.SUCCESS

    # Running

    def pump(self) -> None:
        while self.step():
            pass

    def has_work(self) -> bool:
        return any(lane.tasks for lane in (*self.streams.values(), *self.replays))

    def step(self, favourite: Lane | None = None) -> bool:
        """Run one task; False: all queues are empty or blocked."""
        lanes = [lane for lane in (*self.streams.values(), *self.replays) if lane.ready()]
        if not lanes:
            return False
        lane = favourite if favourite in lanes else self.random.choice(lanes) if self.random is not None else lanes[0]
        assert lane is not None
        task = lane.tasks.popleft()
        lane.running = task
        try:
            with torch.inference_mode():  # whichever thread it is: the tensors may be of that kind
                task.run(lane.scope)
        except Exception as error:
            self.failure_code = runtime.AICORE_EXCEPTION
            self.failure = f"{task.label} failed on {lane.name}:\n{traceback.format_exc()}"
            print(f"emulated NPU: {self.failure}", file=sys.stderr, flush=True)
            lane.tasks.clear()
            if isinstance(error, runtime.DeviceFault):
                self._abort(error.code)
        lane.running = None
        if lane in self.replays and not lane.tasks:
            self.replays.remove(lane)
        return True

    def _abort(self, code: int) -> None:
        """An exchange with other devices has failed: all that is queued is given up, and nobody waits for it."""
        self.failure_code, failure = code, self.failure
        self.drop_all()
        self.failure = failure
        for event in self.events.values():
            event.done = event.submitted

    def wait_until(self, done: Callable[[], bool], favourite: Lane | None, timeout_s: float | None) -> int:
        """Run until `done`. What stays blocked while nobody queues anything is a deadlock."""
        with self.changed:
            if self.random is not None and self.random.random() < 0.5:
                favourite = None
            self.num_waiting += 1
            try:
                return self._wait_until(done, favourite, timeout_s)
            finally:
                self.num_waiting -= 1

    def _wait_until(self, done: Callable[[], bool], favourite: Lane | None, timeout_s: float | None) -> int:
        patience_s = self.patience_s if timeout_s is None else min(timeout_s, self.patience_s)
        began = time.monotonic()
        end = began + patience_s
        while not done():
            now = time.monotonic()
            if self.step(favourite):
                end = now + patience_s
            elif self._awaits_others():  # which have a time limit of their own
                if timeout_s is not None and now >= began + timeout_s:
                    return runtime.SYNC_TIMEOUT
                end = now + patience_s
                self.changed.wait(POLL_S)
            elif not self.changed.wait(max(0.0, end - now)) and time.monotonic() >= end:
                return self._stuck(timeout_s)
        return self.report()

    def _awaits_others(self) -> bool:
        """Whether something is blocked on other processes."""
        return any(lane.tasks and isinstance(lane.tasks[0], End) for lane in (*self.streams.values(), *self.replays))

    def _stuck(self, timeout_s: float | None) -> int:
        if timeout_s is not None and timeout_s < self.patience_s:
            return runtime.SYNC_TIMEOUT
        heads = [
            f"{lane.name}: {lane.tasks[0].label}" for lane in (*self.streams.values(), *self.replays) if lane.tasks
        ]
        print("emulated NPU: deadlock, blocked are " + "; ".join(heads), file=sys.stderr, flush=True)
        return runtime.INTERNAL_ERROR

    def report(self) -> int:
        """An error of the device is told once, to the first who waits."""
        failed, self.failure = self.failure, None
        return runtime.SUCCESS if failed is None else self.failure_code

    def drop_all(self, *, failure: bool = True) -> None:
        """Forget all that is queued: for tests that leave the device blocked on purpose."""
        with self.changed:
            for lane in self.streams.values():
                lane.tasks.clear()
            self.replays.clear()
            self.communicators.drop_all()
            self.failure = None if failure else self.failure
            for model in self.models.values():
                model.running = 0

    def sync_stream(self, stream: int, timeout_ms: int = -1) -> int:
        lane = self.streams.get(stream)
        if lane is None or lane.is_idle():
            return self.report()
        return self.wait_until(lambda: not lane.tasks, lane, None if timeout_ms < 0 else timeout_ms / 1e3)

    def sync_device(self, timeout_ms: int = -1) -> int:
        timeout_s = None if timeout_ms < 0 else timeout_ms / 1e3
        return self.wait_until(lambda: not any(lane.tasks for lane in self.streams.values()), None, timeout_s)

    def sync_event(self, event: int) -> int:
        found = self.event(event)
        number = found.submitted
        return self.wait_until(lambda: found.done >= number, None, None)

    def is_busy(self, stream: int) -> bool:
        lane = self.streams.get(stream)
        return lane is not None and not lane.is_idle()

    def forget_stream(self, stream: int) -> int:
        code = self.sync_stream(stream)
        self.streams.pop(stream, None)
        return code

    # Events

    def has_passed(self, handle: int) -> bool:
        event = self.event(handle)
        return event.done >= event.submitted

    def event(self, handle: int) -> Event:
        return self.events.setdefault(handle, Event())

    def record(self, stream: int, handle: int) -> int:
        model = self.captures.get(stream)
        if model is not None:
            model.record(stream, handle)
            return runtime.SUCCESS
        event = self.event(handle)
        event.submitted += 1
        return self.queue(stream, Record(event, event.submitted))

    def wait(self, stream: int, handle: int) -> int:
        model = self.captures.get(stream)
        if model is not None:
            model.wait(stream, handle)
            return runtime.SUCCESS
        event = self.event(handle)
        return self.queue(stream, Wait(event, max(1, event.submitted)))

    # Captured models

    def begin_capture(self, stream: int, handle: int) -> int:
        self.captures[stream] = Model(handle, stream)
        return runtime.SUCCESS

    def join_capture(self, stream: int, handle: int) -> int:
        model = next(model for model in self.captures.values() if model.handle == handle)
        model.join(stream)
        self.captures[stream] = model
        return runtime.SUCCESS

    def end_capture(self, stream: int, handle: int, good: bool) -> int:
        model = self.captures[stream]
        for each in model.nodes:
            del self.captures[each]
            runtime.library().emulated_npu_release_capture(each)
        if not good:
            return runtime.SUCCESS
        if model.unjoined():
            return runtime.UNJOINED
        self.models[handle] = model
        return runtime.SUCCESS

    def execute(self, stream: int, handle: int) -> int:
        model = self.models[handle]
        dead = model.dead_range()
        if dead is not None:
            print(
                f"emulated NPU: the model uses {dead[1]} bytes at {dead[0]:#x}, which were freed",
                file=sys.stderr,
                flush=True,
            )
            return runtime.AICORE_EXCEPTION
        if self.audits and (freed := freed_by_allocator(model.ranges())):
            print(
                f"emulated NPU: the model uses {freed[1]} bytes at {freed[0]:#x}, which torch's allocator holds free "
                "outside any graph's pool",
                file=sys.stderr,
                flush=True,
            )
            return runtime.AICORE_EXCEPTION
        model.running += 1
        return self.queue(stream, Kernel("replay begins", lambda: self._start(stream, model), model.ranges()))

    def _start(self, stream: int, model: Model) -> None:
        run = Run(model)
        self.replays.extend(lane for lane in run.lanes if lane.tasks)
        self.streams[stream].tasks.appendleft(Join(run))

    def destroy_model(self, handle: int) -> int:
        model = self.models.get(handle)
        if model is not None and model.running:
            # The wheel makes no more than a warning of it and frees the graph's memory, so the device fails next.
            self.failure, self.failure_code = "a captured model was destroyed while it ran", runtime.AICORE_EXCEPTION
            return runtime.MODEL_RUNNING
        self.models.pop(handle, None)
        return runtime.SUCCESS

    def end_group(self, stream: int, handle: int) -> int:
        model = self.captures[stream]
        assert model.group is not None
        group, model.group = model.group, None
        self.groups[handle] = group
        model.nodes[stream].append(group)
        return runtime.SUCCESS

    def end_update(self, stream: int, handle: int) -> int:
        """The kernels must be the same, one by one; only their arguments may be others."""
        new, group = self.updates.pop(stream), self.groups[handle]
        before, after = [task.label for task in group.kernels], [task.label for task in new]
        if before != after:
            print(f"emulated NPU: a task update of {before} with {after}", file=sys.stderr, flush=True)
            return runtime.UPDATE_FAILED
        return self.queue(stream, Update(group, new))

    def memory_gone(self, address: int, size: int) -> int:
        """Memory is unmapped or freed: queued work that would still use it faults on a device."""
        for lane in (*self.streams.values(), *self.replays):
            for task in lane.tasks:
                if any(_overlap(each, (address, size)) for each in task.ranges):
                    print(
                        f"emulated NPU: {task.label} on {lane.name} is queued and uses memory that is unmapped now",
                        file=sys.stderr,
                    )
                    return runtime.AICORE_EXCEPTION
        return runtime.SUCCESS


def _overlap(a: Range, b: Range) -> bool:
    return a[0] < b[0] + b[1] and b[0] < a[0] + a[1]
