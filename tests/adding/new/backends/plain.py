"""A backend of its own beside the CPU's: the reference operators and nothing else, in the memory of the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from backends.backend import Capturer
from backends.cpu.memory import available_bytes
from backends.latent_form import LatentWidths, expanded_bytes
from backends.opset import OpSet
from backends.reference import REFERENCE, stored_kv
from backends.reference.kv import cache_shape
from backends.reference.kv_codes import row_width
from backends.stored_field import StoredField
from backends.vmm import VmmDriver

OPS = replace(REFERENCE, name="plain")


class PlainBackend:
    """A `Backend`."""

    name = "plain"
    device = torch.device("cpu")
    ops: OpSet = OPS
    default_block_size = 8
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    kernel_dtypes = dtypes
    kv_dtypes: tuple[torch.dtype, ...] = ()
    dense_kv = False
    max_cache_numbers: int | None = None
    collectives = "gloo"
    num_reserved_blocks = 0
    computes_on_host = True
    kv_memory_share = 0.25
    warm_up_seqs = 0
    strict_ops = False
    takes_scaled_weights = False
    quantization_advice = ""
    vmm: VmmDriver | None = None
    capturer: Capturer | None = None

    def set_num_threads(self, number: int, *, torch_number: int) -> None:
        torch.set_num_threads(number)

    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return cache_shape(num_blocks, block_size, num_kv_heads, head_dim)

    def latent_cache_shapes(self, num_blocks: int, block_size: int, latent_width: int, rotated_width: int,
                            dtype: torch.dtype) -> tuple[tuple[int, ...], ...]:
        return (cache_shape(num_blocks, block_size, 1, row_width(latent_width + rotated_width, dtype)),)

    def expanded_bytes(self, widths: LatentWidths, *, num_positions: int, longest: int) -> int:
        return expanded_bytes(widths, num_positions=num_positions)

    def allocate_kv_cache(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def stored_fields(self, caches: Sequence[Tensor], *, format: str) -> list[StoredField]:
        return stored_kv.stored_fields(caches, format=format)

    def available_memory_bytes(self) -> int:
        return available_bytes()

    def allocate_host(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def share_host(self, memory: np.ndarray) -> Tensor:
        return torch.from_numpy(memory)

    def populate_host(self, memory: Tensor) -> None:
        """It is there from the start."""

    def available_host_bytes(self) -> int:
        return available_bytes()

    def synchronize_copies(self) -> None:
        """Copies are done when they return."""

    def synchronize(self) -> None:
        """Nothing is queued."""

    def release_memory(self) -> None:
        """The system has it back already."""

    def describe(self) -> dict[str, str]:
        return {"device": "plain", "kernels": "plain torch"}
