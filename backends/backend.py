"""`Backend`: all that the engine asks of a device. One process uses one backend."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from backends.opset import OpSet


class BackendError(RuntimeError):
    """A backend is not known, not built, or its device or libraries are missing; the message says which."""


@runtime_checkable
class Backend(Protocol):
    """A device: its operators, memory and layouts. See `backends/__init__.py:get_backend`."""

    name: str
    device: torch.device
    ops: OpSet
    default_block_size: int

    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """The compute dtype for `--dtype auto`."""
        ...

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Shape of one layer's K (and V) cache; the first axis is the block."""
        ...

    def allocate_kv_cache(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for one cache tensor. May be touched lazily; its contents start undefined but finite."""
        ...

    def available_memory_bytes(self) -> int:
        """Bytes that a KV cache could take now, before any safety margin."""
        ...

    def synchronize(self) -> None:
        """Wait for all queued work of this process on the device."""
        ...

    def describe(self) -> dict[str, str]:
        """Facts for `xllm doctor` and the log: device, libraries, which kernels are in use."""
        ...
