"""`HostMover`: copies KV blocks between the device's cache tensors and host memory, in the stored format.

A host slot holds one block of all layers as one run of bytes (`KVCodec`), so that it goes to disk as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from backends.backend import Backend
from xllm.kv.tickets import Ticket
from xllm.runner.kv_cache import KVCache

if TYPE_CHECKING:
    from xllm.runner.kv_codec import KVCodec


# At a time, before `is_busy` is asked again. Chosen: 5 ms at the 0.2 GB/s measured in docs/performance.md.
POPULATED_BYTES = 1 << 20


class HostMover:
    """A `Mover` over a `KVCache`. `save` and `load_layer` may run at the same time, each in its own thread."""

    def __init__(self, backend: Backend, kv_cache: KVCache, codec: KVCodec, num_host_slots: int,
                 memory: Tensor | None = None):
        """memory: uint8, of so many payloads; None: it allocates its own."""
        self._ops, self._layers, self._codec = backend.ops, kv_cache.layers, codec
        self.num_layers = len(kv_cache.layers)
        self.num_host_slots = num_host_slots
        self.payload_bytes = codec.payload_bytes
        if memory is None:
            memory = backend.allocate_host(num_host_slots * codec.payload_bytes)
        self._host = memory.view(num_host_slots, -1)
        self._host_bytes = self._host.numpy()
        self._synchronize = backend.synchronize_copies
        self._populate = backend.populate_host

    @torch.inference_mode()
    def save(self, block_ids: np.ndarray, slots: np.ndarray) -> None:
        blocks, places = torch.from_numpy(block_ids.astype(np.int64)), torch.from_numpy(slots.astype(np.int64))
        for layer, caches in enumerate(self._layers):
            self._codec.export_layer(self._ops, caches, blocks, self._host, places, layer)
        self._synchronize()

    @torch.inference_mode()
    def load_layer(self, slots: np.ndarray, block_ids: np.ndarray, layer: int) -> None:
        blocks, places = torch.from_numpy(block_ids.astype(np.int64)), torch.from_numpy(slots.astype(np.int64))
        self._codec.import_layer(self._ops, self._layers[layer], blocks, self._host, places, layer)
        self._synchronize()

    def payload(self, slot: int) -> memoryview:
        return memoryview(self._host_bytes[slot])  # type: ignore[arg-type]


    def populate(self, is_busy: Callable[[], bool], stopping: threading.Event) -> None:
        """Touch the host memory piece by piece while the engine is not busy, so that the system provides it before
        copies need it: the first touch is about nine times slower than a copy where it was measured
        (docs/performance.md)."""
        flat = self._host.view(-1)
        for start in range(0, len(flat), POPULATED_BYTES):
            while is_busy() and not stopping.wait(0.05):
                pass
            if stopping.is_set():
                return
            self._populate(flat[start : start + POPULATED_BYTES])


class Populator(threading.Thread):
    """A thread that runs `HostMover.populate` until it is done or told to stop."""

    def __init__(self, mover: HostMover, is_busy: Callable[[], bool]):
        super().__init__(name="xllm-kv-populate", daemon=True)
        self._mover, self._is_busy = mover, is_busy
        self._stopping = threading.Event()
        self.start()

    def run(self) -> None:
        self._mover.populate(self._is_busy, self._stopping)

    def stop(self) -> None:
        self._stopping.set()
        self.join()


def gated(layers: Sequence[tuple[Tensor, ...]], tickets: Sequence[Ticket]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the layers' caches in order, each once every ticket's load has brought that layer; blocks until then."""
    for layer, caches in enumerate(layers):
        for ticket in tickets:
            ticket.wait(layer)
        yield caches


def published(layers: Iterable[tuple[Tensor, ...]], ticket: Ticket) -> Iterator[tuple[Tensor, ...]]:
    """Yield the layers' caches in order, and advance the ticket by a layer whenever the next one is asked for: the one
    before it has been computed then. The caller finishes the ticket after the last layer, behind which nothing is asked
    for."""
    for caches in layers:
        yield caches
        ticket.advance()
