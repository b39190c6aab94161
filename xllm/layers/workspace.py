"""`Workspace`: memory that layers use one after the other, for what is between their products."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# What glibc takes for large at first. Less does not raise the peak, and a new tensor is the shortest way to it.
LARGE_BYTES = 128 * 1024


class Workspace(threading.local):
    """Memory that the parts of a long step use again. Where each took its own and freed it, glibc would keep some of
    that, by chance: up to as much again as is in use. It only grows, and each thread has its own."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[num_rows, width] of anything, on the host. It ends the life of the one of that name before."""
        num_bytes = num_rows * width * dtype.itemsize
        if num_bytes < LARGE_BYTES:
            return torch.empty((num_rows, width), dtype=dtype)
        if name not in self._memory or self._memory[name].nbytes < num_bytes:
            self._memory.pop(name, None)  # before the larger one comes
            self._memory[name] = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory[name][:num_bytes].view(dtype).view(num_rows, width)
