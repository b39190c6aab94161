"""Linear layers: cuBLAS through torch, and a kernel for int8 weights where few rows make reading them the cost."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from cuda_ops.launch import INTERPRETED, config, launch

FEW_ROWS = 64  # above it the weight is brought to x's dtype once for all rows


@triton.jit(do_not_specialize=["T"])
def linear_int8_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, T, Y, X, x_stride, BIAS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y = (x @ weight.T) * scale + bias. A code is exact in every dtype of x, so that only the sum needs the scale."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    y = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride + k[None, :]
    weight_ptrs = weight_ptr + y.to(tl.int64)[:, None] * X + k[None, :]
    for first in tl.range(0, X, DEPTH):
        left = X - first
        x = tl.load(x_ptrs + first, (row[:, None] < T) & (k[None, :] < left), 0.0)
        codes = tl.load(weight_ptrs + first, (y[:, None] < Y) & (k[None, :] < left), 0)
        if UPCAST:
            x = x.to(tl.float32)
        acc = tl.dot(x, tl.trans(codes.to(x.dtype)), acc, input_precision="ieee")
    acc *= tl.load(scale_ptr + y, y < Y, 0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + y, y < Y, 0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * Y + y[None, :], acc, (row[:, None] < T) & (y[None, :] < Y))


def linear(x_TX: Tensor, packed: Any) -> Tensor:
    """packed: an object with weight_YX, scale_Y (None, or fp32 and the weight is int8) and bias_Y."""
    if packed.scale_Y is None:
        return F.linear(x_TX, packed.weight_YX, packed.bias_Y)
    if len(x_TX) > FEW_ROWS:
        weight_YX = packed.weight_YX.to(x_TX.dtype) * packed.scale_Y.to(x_TX.dtype)[:, None]
        return F.linear(x_TX, weight_YX, packed.bias_Y)
    return linear_int8(x_TX, packed.weight_YX, packed.scale_Y, packed.bias_Y)


def linear_int8(x_TX: Tensor, weight_YX: Tensor, scale_Y: Tensor, bias_Y: Tensor | None) -> Tensor:
    assert x_TX.stride(1) == 1 and weight_YX.is_contiguous()
    (T, X), Y = x_TX.shape, len(weight_YX)
    y_TY = torch.empty(T, Y, dtype=x_TX.dtype, device=x_TX.device)
    numbers = config("linear_int8", f"{'wide' if x_TX.element_size() == 4 else 'half'}_{16 if T <= 16 else 64}", x_TX)
    grid = (triton.cdiv(Y, numbers["COLUMNS"]), triton.cdiv(T, numbers["ROWS"]))
    launch(linear_int8_kernel, grid, x_TX, weight_YX, scale_Y, bias_Y, y_TY, T, Y, X, x_TX.stride(0),
           BIAS=bias_Y is not None, UPCAST=INTERPRETED, **numbers)  # fmt: skip
    return y_TY


def embedding(ids_T: Tensor, weight_VD: Tensor) -> Tensor:
    return F.embedding(ids_T, weight_VD)
