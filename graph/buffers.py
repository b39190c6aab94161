"""`StaticBuffers`: one set of the tensors that captured graphs read and write under fixed addresses.

The inputs of a set lie in one piece of memory with a twin on the host: a step is written into the twin with numpy and
goes to the device in one copy. A graph of a smaller bucket uses the first rows of each field, so all graphs of a set
share its memory; two sets let a step be filled while the one before it still runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Of each field: what CUDA's allocator gives, so that kernels find the alignment that they were compiled for.
ALIGNMENT_BYTES = 256

Sizes = Mapping[str, int]  # axis letter -> length


@dataclass(frozen=True, slots=True)
class Field:
    """A static tensor. axes: a letter each, whose length a bucket gives; inner axes are always at full length, so that
    the rows of a bucket lie together. shared: an output whose reader is done before the next replay of any set."""

    name: str
    dtype: torch.dtype
    axes: tuple[str, ...]
    shared: bool = False

    def shape(self, sizes: Sizes, capacity: Sizes) -> tuple[int, ...]:
        return (sizes[self.axes[0]], *(capacity[axis] for axis in self.axes[1:]))


class StaticBuffers:
    """One set. `wait` is the fence of the last step that was queued with it.

    capacity: the longest axis of any bucket. inputs: put the largest last, copies end behind the last one in use.
    allocate_host: bytes that the device copies from at full speed (`Backend.allocate_host`). given: outputs, of full
    capacity, that belong to the caller.
    """

    def __init__(self, inputs: Sequence[Field], outputs: Sequence[Field], capacity: Sizes, *, device: torch.device,
                 allocate_host: Callable[[int], Tensor], shared: dict[str, Tensor] | None = None,
                 given: Mapping[str, Tensor] | None = None):
        self.capacity = capacity
        self.inputs = {field.name: field for field in inputs}
        self.outputs = {field.name: field for field in outputs}
        self._offsets, end = {}, 0
        for field in inputs:
            self._offsets[field.name] = end
            end += -(-_num_bytes(field, capacity, capacity) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.device_bytes = torch.zeros(end, dtype=torch.uint8, device=device)
        self.host_bytes = allocate_host(end)
        self._device = device
        self._results = dict(given or {})
        self._shared = {} if shared is None else shared
        self.wait: Callable[[], None] = _nothing

    def view(self, name: str, sizes: Sizes, *, host: bool = False) -> Tensor:
        """An input at a bucket's size, on the device or of the host's twin."""
        field = self.inputs[name]
        start, num_bytes = self._offsets[name], _num_bytes(field, sizes, self.capacity)
        flat = (self.host_bytes if host else self.device_bytes)[start:start + num_bytes]
        return flat.view(field.dtype).view(field.shape(sizes, self.capacity))

    def result(self, name: str, sizes: Sizes) -> Tensor:
        """An output at a bucket's size. Its memory is allocated when it is first asked for, outside any capture."""
        field = self.outputs[name]
        tensors = self._shared if field.shared else self._results
        if name not in tensors:
            tensors[name] = torch.zeros(field.shape(self.capacity, self.capacity), dtype=field.dtype,
                                        device=self._device)
        return tensors[name][: sizes[field.axes[0]]]

    def upload(self, end: int) -> None:
        """Queue the copy of the first `end` bytes of the twin."""
        self.device_bytes[:end].copy_(self.host_bytes[:end], non_blocking=True)

    def end_of(self, name: str, sizes: Sizes) -> int:
        """The byte behind an input at a bucket's size."""
        return self._offsets[name] + _num_bytes(self.inputs[name], sizes, self.capacity)


class StepMemory:
    """A `GraphMemory`: the views of a set that one captured step uses.

    inputs, outputs: on the device; they never move. hosts: the twins of the inputs, which `fill` writes.
    num_live: how many rows of the step, by axis, are no padding. Set by the code that fills; a graph cannot see it.
    """

    def __init__(self, buffers: StaticBuffers, inputs: Sequence[str], outputs: Sequence[str], sizes: Sizes):
        self.buffers, self.sizes = buffers, sizes
        self.inputs = {name: buffers.view(name, sizes) for name in inputs}
        self.hosts = {name: buffers.view(name, sizes, host=True) for name in inputs}
        self.outputs = {name: buffers.result(name, sizes) for name in outputs}
        self.num_live: dict[str, int] = dict(sizes)
        self._arrays = {name: host.numpy() for name, host in self.hosts.items()}
        self._widths: dict[str, int] = {}
        self._end = max(buffers.end_of(name, sizes) for name in inputs)

    def host_array(self, name: str) -> np.ndarray:
        """The twin of an input, refilled in place."""
        return self._arrays[name]

    def fill(self, name: str, values: np.ndarray, padding: float = 0, *, width: int = 0) -> None:
        """Write the first rows of an input's twin; the others become `padding`. Of two axes, only the columns of the
        values, and at least `width`, are written: what lies behind them is never read."""
        array, rows = self._arrays[name], len(values)
        if array.ndim == 1:
            array[:rows], array[rows:] = values, padding
            return
        filled = values.shape[1]
        self._widths[name] = width = max(filled, width)
        array[:rows, :filled], array[:rows, filled:width], array[rows:, :width] = values, padding, padding

    def upload(self) -> None:
        """Queue the copy to the device."""
        self.buffers.upload(self._end)

    def live_input(self, name: str) -> Tensor:
        """The part of an input that must have been written for this step."""
        tensor = self.inputs[name]
        return tensor if tensor.ndim == 1 else tensor[:, : self._widths.get(name, tensor.shape[1])]

    def live_output(self, name: str) -> Tensor:
        """The rows of an output that are no padding."""
        return self.outputs[name][: self.num_live[self.buffers.outputs[name].axes[0]]]


def _num_bytes(field: Field, sizes: Sizes, capacity: Sizes) -> int:
    return math.prod(field.shape(sizes, capacity)) * field.dtype.itemsize


def _nothing() -> None:
    pass
