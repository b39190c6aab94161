"""`Backend`: all that the engine asks of a device. One process uses one backend."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from backends.opset import OpSet
from backends.vmm import VmmDriver


class BackendError(RuntimeError):
    """A backend is not known, not built, or its device or libraries are missing; the message says which."""


@runtime_checkable
class Backend(Protocol):
    """A device: its operators, memory and layouts. See `backends/__init__.py:get_backend`."""

    name: str
    device: torch.device
    ops: OpSet
    default_block_size: int
    vmm: VmmDriver | None  # None: the device has no virtual memory management

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

    def allocate_host(self, num_bytes: int) -> Tensor:
        """Host memory that the device copies to and from at full speed (pinned where that matters): uint8 [num_bytes].
        May be touched lazily; contents undefined."""
        ...

    def available_host_bytes(self) -> int:
        """Bytes of host memory that `allocate_host` could take now."""
        ...

    def synchronize_copies(self) -> None:
        """Wait for the copies between device and host memory that this thread has queued."""
        ...

    def synchronize(self) -> None:
        """Wait for all queued work of this process on the device."""
        ...

    def describe(self) -> dict[str, str]:
        """Facts for `xllm doctor` and the log: device, libraries, which kernels are in use."""
        ...
