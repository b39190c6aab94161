"""Low-rank adapters beside a linear layer: two kernels, whatever adapters a batch holds.

The layout is that of "batched gather matrix-vector" kernels (Chen et al. 2023, "Punica"): every token looks its
adapter's matrices up by itself, so that a captured graph serves any mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.launch import launch

# Ranks and inputs of a program of the first kernel, outputs of one of the second. Chosen, not tuned.
SHRINK_ROWS, SHRINK_BLOCK, EXPAND_BLOCK = 8, 256, 128


@dataclass(frozen=True, slots=True)
class PackedLora:
    """a_LRX: [L, num_parts * r, X]. b_LYR: [L, Y, r]. part_Y int32: which part an output belongs to."""

    a_LRX: Tensor
    b_LYR: Tensor
    part_Y: Tensor


@triton.jit(do_not_specialize=["X"])
def lora_shrink_kernel(x_ptr, a_ptr, slots_ptr, h_ptr, X, x_stride, R: tl.constexpr, ROWS: tl.constexpr,
                       BLOCK: tl.constexpr):
    """ROWS of h[t] = A[slot] @ x[t], in fp32; nothing for tokens without an adapter."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t)
    if slot > 0:
        r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        acc = tl.zeros([ROWS], tl.float32)
        rows_ptr = a_ptr + ((slot - 1).to(tl.int64) * R + r[:, None]) * X
        for first in tl.range(0, X, BLOCK):
            inside = first + column < X
            x = tl.load(x_ptr + t * x_stride + first + column, inside, 0.0).to(tl.float32)
            a = tl.load(rows_ptr + first + column[None, :], (r[:, None] < R) & inside[None, :], 0.0).to(tl.float32)
            acc += tl.sum(a * x[None, :], 1)
        tl.store(h_ptr + t * R + r, acc, r < R)


@triton.jit(do_not_specialize=["Y"])
def lora_expand_kernel(y_ptr, b_ptr, part_ptr, slots_ptr, h_ptr, Y, y_stride, R: tl.constexpr, RANK: tl.constexpr,
                       RANK_PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """y[t] += B[slot] @ h[t], each output over its own part of h."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t)
    if slot > 0:
        row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        r = tl.arange(0, RANK_PADDED)
        inside = (row[:, None] < Y) & (r[None, :] < RANK)
        part = tl.load(part_ptr + row, row < Y, 0)
        b = tl.load(b_ptr + ((slot - 1).to(tl.int64) * Y + row[:, None]) * RANK + r[None, :], inside, 0.0)
        h = tl.load(h_ptr + t * R + part[:, None] * RANK + r[None, :], inside, 0.0)
        y = tl.load(y_ptr + t * y_stride + row, row < Y, 0.0).to(tl.float32)
        y += tl.sum(b.to(tl.float32) * h, 1)
        tl.store(y_ptr + t * y_stride + row, y, row < Y)


def pack_lora(a_LRX: Tensor, b_LYR: Tensor, parts: tuple[int, ...]) -> PackedLora:
    part_Y = torch.repeat_interleave(torch.arange(len(parts), dtype=torch.int32), torch.tensor(parts))
    return PackedLora(a_LRX.contiguous(), b_LYR.contiguous(), part_Y.to(a_LRX.device))


def lora_add(y_TY: Tensor, x_TX: Tensor, packed: PackedLora, slots_T: Tensor,
             present: Sequence[int] | None = None) -> None:
    assert x_TX.stride(1) == 1 and y_TY.stride(1) == 1
    (T, Y), R, rank = y_TY.shape, packed.a_LRX.shape[1], packed.b_LYR.shape[2]
    h_TR = torch.empty(T, R, dtype=torch.float32, device=x_TX.device)
    launch(lora_shrink_kernel, (T, triton.cdiv(R, SHRINK_ROWS)), x_TX, packed.a_LRX, slots_T, h_TR, x_TX.shape[1],
           x_TX.stride(0), R=R, ROWS=SHRINK_ROWS, BLOCK=SHRINK_BLOCK, num_warps=4)
    launch(lora_expand_kernel, (T, triton.cdiv(Y, EXPAND_BLOCK)), y_TY, packed.b_LYR, packed.part_Y, slots_T, h_TR, Y,
           y_TY.stride(0), R=R, RANK=rank, RANK_PADDED=triton.next_power_of_2(rank), BLOCK=EXPAND_BLOCK, num_warps=4)
