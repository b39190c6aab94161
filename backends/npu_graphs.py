"""Graph mode on Ascend: `Capturer` by `torch.npu.NPUGraph`. Attention's lengths are numbers that a capture bakes in, so
each replay issues attention anew, as tasks, while the graph waits in front of each."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch

from backends.backend import GraphMemory
from backends.streams import own_stream
from npu_ops.recording import CAPTURE_LOCK, REPLAY_LOCK, TaskRecorder, recording

RUNTIME = "libascendcl.so"
RESERVED_STREAMS = 128  # left for the engine, its copies and collective communication. Chosen, not counted


@dataclass(slots=True)
class GraphPool:
    """Memory that graphs share. A handle is dead once its last graph is gone: then the next graph has another."""

    handle: Any = None
    graphs: WeakSet[NpuGraph] = field(default_factory=WeakSet)


class NpuGraph:
    """A `CapturedGraph`, replayed on the current stream, its tasks updated on another."""

    def __init__(self, update_stream: Any, graph: Any, recorder: TaskRecorder, *, num_bytes: int, num_streams: int):
        self._update_stream, self._graph = update_stream, graph
        self._recorder: TaskRecorder | None = recorder
        self.num_bytes, self.num_streams = num_bytes, num_streams

    def replay(self) -> None:
        """The update may not reach the device before earlier replays are done with the tasks and their memory, and must
        be queued behind the replay, which waits for it: so its stream waits for what the replay's had queued before."""
        assert self._recorder is not None, "the graph was released"
        with REPLAY_LOCK:
            self._update_stream.wait_stream(torch.npu.current_stream())
            self._graph.replay()
            self._recorder.update(self._update_stream)

    @property
    def is_alive(self) -> bool:
        return self._recorder is not None

    def release(self) -> None:
        assert self._recorder is not None
        with CAPTURE_LOCK.using():
            self._graph.reset()
        self._recorder = None


class NpuCapturer:
    """A `Capturer`."""

    plans_in_graph = False
    pad_slot = 0
    pad_block = 0
    bucket_step = 16

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = own_stream(torch.npu, device)
        self._update_stream = own_stream(torch.npu, device)
        self._count_streams = stream_counter()
        self._graphs: WeakSet[NpuGraph] = WeakSet()

    @property
    def num_streams(self) -> int:
        """What its graphs hold."""
        return sum(graph.num_streams for graph in self._graphs if graph.is_alive)

    @property
    def max_streams(self) -> int | None:
        """What the graphs hold and what the device has left, but for a reserve; None: the runtime cannot tell."""
        if self._count_streams is None:
            return None
        return max(0, self.num_streams + self._count_streams() - RESERVED_STREAMS)

    def make_pool(self) -> GraphPool:
        return GraphPool()

    def capture(self, function: Callable[[], None], *, pool: Any, memory: GraphMemory) -> NpuGraph:
        """Streams are the runtime's count, bytes what the driver has less."""
        with CAPTURE_LOCK.using():
            self._run_once(function)
        with CAPTURE_LOCK.capturing():
            torch.npu.synchronize(self._device)
            torch.npu.empty_cache()
            streams, free = self._available_streams(), torch.npu.mem_get_info(self._device)[0]
            recorded, recorder = self._record(function, pool)
            taken = max(0, streams - self._available_streams())
            num_bytes = max(0, free - torch.npu.mem_get_info(self._device)[0])
        graph = NpuGraph(self._update_stream, recorded, recorder, num_bytes=num_bytes, num_streams=taken)
        self._graphs.add(graph)
        pool.graphs.add(graph)
        return graph

    def _run_once(self, function: Callable[[], None]) -> None:
        """Operators that are loaded, or make their workspaces, for the first time may not do so during a capture."""
        current = torch.npu.current_stream()
        self._stream.wait_stream(current)
        with torch.npu.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def _record(self, function: Callable[[], None], pool: GraphPool) -> tuple[Any, TaskRecorder]:
        """The capture itself. However it ends, the stream captures no more."""
        graph, recorder = torch.npu.NPUGraph(), TaskRecorder()
        if not any(graph.is_alive for graph in pool.graphs):
            pool.handle = torch.npu.graph_pool_handle()
        with torch.npu.stream(self._stream):
            try:
                graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
                with recording(recorder):
                    function()
                graph.capture_end()
            except BaseException:
                for call in (graph.capture_end, graph.reset):
                    with suppress(RuntimeError):  # a capture that was broken off says so again
                        call()
                raise
        recorder.derived.clear()
        return graph, recorder

    def _available_streams(self) -> int:
        return 0 if self._count_streams is None else self._count_streams()

    def fence(self) -> Callable[[], None]:
        event = torch.npu.Event()
        event.record(torch.npu.current_stream())
        return event.synchronize


def stream_counter() -> Callable[[], int] | None:
    """A call that returns how many streams the current device could still make; None: the runtime has no such call."""
    try:
        call = ctypes.CDLL(RUNTIME).aclrtGetStreamAvailableNum
    except (OSError, AttributeError):
        return None
    call.restype, call.argtypes = ctypes.c_int, [ctypes.POINTER(ctypes.c_uint32)]
    count = ctypes.c_uint32()
    if call(ctypes.byref(count)):
        return None

    def available() -> int:
        code = call(ctypes.byref(count))
        if code:
            raise RuntimeError(f"aclrtGetStreamAvailableNum failed with error {code}")
        return count.value

    return available
