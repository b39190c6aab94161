"""Graph mode on CUDA: `Capturer` by torch's CUDA graphs. The whole step runs on the device, plans of attention
included, so that a replay needs nothing but its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from backends.backend import GraphMemory
from backends.streams import own_stream


class CudaGraph:
    """A `CapturedGraph`. Replayed on the current stream; it takes none of its own."""

    num_streams = 0

    def __init__(self, graph: torch.cuda.CUDAGraph, num_bytes: int):
        self._graph, self.num_bytes = graph, num_bytes

    def replay(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        self._graph.reset()


class CudaCapturer:
    """A `Capturer`."""

    plans_in_graph = True
    pad_slot = -1
    pad_block = 0
    bucket_step = 16
    max_streams: int | None = None

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def make_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], None], *, pool: Any, memory: GraphMemory) -> CudaGraph:
        self._run_once(function)
        free, graph = torch.cuda.mem_get_info(self._device)[0], torch.cuda.CUDAGraph()
        # Threads that copy may allocate meanwhile: only this one's calls are held against the capture.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        return CudaGraph(graph, max(0, free - torch.cuda.mem_get_info(self._device)[0]))

    def _run_once(self, function: Callable[[], None]) -> None:
        """Run the function once before its capture: kernels are compiled or loaded and libraries make their handles at
        their first use, which is not allowed during a capture."""
        self._stream = self._stream or own_stream(torch.cuda, self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def fence(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize
