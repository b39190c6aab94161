"""Captured models: what was queued on each captured stream, and the state of a capture."""

from __future__ import annotations

import ctypes

from tests.emulated_npu.runtime import library
from tests.emulated_npu.tasks import CapturedRecord, CapturedWait, Group, Task
from tests.emulated_npu.tensors import Range


class Model:
    """`nodes` by stream, in the order they were queued. Nothing here keeps a tensor alive."""

    def __init__(self, handle: int, origin: int):
        self.handle, self.origin = handle, origin
        self.nodes: dict[int, list[Task]] = {origin: []}
        self.group: Group | None = None  # being captured
        self.running = 0
        self.keys: dict[int, tuple[int, int]] = {}  # event to its last record in this capture
        self.num_records = 0
        self.seen: dict[int, set[tuple[int, int]]] = {origin: set()}  # records that a stream comes after

    def add(self, stream: int, task: Task) -> None:
        if self.group is not None:
            self.group.kernels.append(task)
        else:
            self.nodes[stream].append(task)

    def join(self, stream: int) -> None:
        self.nodes[stream] = []
        self.seen[stream] = set()

    def record(self, stream: int, event: int) -> None:
        self.num_records += 1
        key = self.keys[event] = (stream, self.num_records)
        self.seen[stream].add(key)
        self.nodes[stream].append(CapturedRecord(key))

    def wait(self, stream: int, event: int) -> None:
        key = self.keys[event]
        self.seen[stream].add(key)
        self.seen[stream] |= {other for other in self.seen[key[0]] if other[1] < key[1]}
        self.nodes[stream].append(CapturedWait(key))

    def unjoined(self) -> list[int]:
        """Streams whose last work nobody on the origin comes after."""
        late = []
        for stream, nodes in self.nodes.items():
            records = [
                i
                for i, node in enumerate(nodes)
                if isinstance(node, CapturedRecord) and node.key in self.seen[self.origin]
            ]
            work = [i for i, node in enumerate(nodes) if not isinstance(node, CapturedRecord | CapturedWait)]
            if stream != self.origin and (not records or (work and work[-1] > records[-1])):
                late.append(stream)
        return late

    def ranges(self) -> list[Range]:
        return list({each for nodes in self.nodes.values() for node in nodes for each in node.ranges})

    def dead_range(self) -> Range | None:
        """Memory that the model uses and that is no device memory any more."""
        ranges = [each for each in self.ranges() if each[1]]
        starts = (ctypes.c_uint64 * len(ranges))(*(start for start, _ in ranges))
        sizes = (ctypes.c_uint64 * len(ranges))(*(size for _, size in ranges))
        found = library().emulated_npu_first_dead(starts, sizes, len(ranges))
        return None if found < 0 else ranges[found]
