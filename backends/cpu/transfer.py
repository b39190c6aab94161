"""The argument of transfer.c: one part of one layer on its way between the cache and the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import Structure, byref, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from backends.reference.kv_codes import FP8, QUANTISED
from backends.reference.stored_kv import FORMATS, check_format, lie_transposed, part_bytes

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, FP8: 4}  # numbers of `FORMATS`


class Transfer(Structure):
    """`Transfer` of transfer.c."""

    _fields_ = [
        ("cache", c_void_p), ("stored", c_void_p), ("block_ids", c_void_p), ("slots", c_void_p),
        ("cache_stride", c_int64), ("stored_stride", c_int64), ("num_blocks", c_int64), ("num_heads", c_int64),
        ("R", c_int64), ("C", c_int64), ("by_row", c_int32), ("dtype", c_int32), ("format", c_int32),
    ]  # fmt: skip


def transfers(caches: Sequence[Tensor], block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor,
              format: str) -> Iterator[Any]:
    """One part after the other. No torch operator runs here: a worker thread's would start a pool of its own.

    Raises ValueError for a quantised cache and a format that is not its own.
    """
    if caches[0].dtype in QUANTISED:
        check_format(caches[0], format)
    assert block_ids_B.dtype is slots_B.dtype is torch.int64 and len(block_ids_B) == len(slots_B)
    assert block_ids_B.is_contiguous() and slots_B.is_contiguous() and stored_SX.dtype is torch.uint8
    address, width = stored_SX.data_ptr(), stored_SX.shape[1]
    for cache, transposed in zip(caches, lie_transposed(caches)):
        _, num_kv_heads, block_size, head_dim = cache.shape
        rows, columns = (head_dim, block_size) if transposed else (block_size, head_dim)
        yield byref(Transfer(
            cache.data_ptr(), address, block_ids_B.data_ptr(), slots_B.data_ptr(), cache.stride(0) * cache.itemsize,
            stored_SX.stride(0), len(block_ids_B), num_kv_heads, rows, columns, not transposed, DTYPES[cache.dtype],
            FORMATS.index(format),
        ))  # fmt: skip
        num_bytes = part_bytes(cache, format)
        address, width = address + num_bytes, width - num_bytes
    assert width == 0, "stored_SX is not `stored_bytes` wide"
