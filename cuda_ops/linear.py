"""Linear layers: cuBLAS through torch, and kernels for weights of one byte where few rows make reading them the cost.

With many rows fp8 weights are multiplied as they are where the device can (compute capability 8.9, bfloat16), by x
that is brought to fp8 as well; else a weight of one byte is brought to x's dtype once for all rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from cuda_ops.kv import to_e4m3
from cuda_ops.launch import INTERPRETED, config, launch, wait_for_previous

FEW_ROWS = 64
FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)
FP8_MULTIPLE = 16  # sizes of a product of fp8 numbers


@triton.jit
def widen_e4m3(codes, dtype: tl.constexpr):
    """int8 bits of e4m3 as numbers of a wider dtype, exactly; NaN has no code here.

    Its bits, put where the wider dtype has its own, have an exponent that is too small by the difference of the biases.
    """
    if dtype == tl.float32:
        return ((codes.to(tl.int32) << 20) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    elif dtype == tl.bfloat16:
        small = ((codes.to(tl.int16) << 4) & -0x7810).to(tl.bfloat16, bitcast=True)
        return small * tl.full(small.shape, 1.329227995784916e36, tl.bfloat16)
    else:
        small = ((codes.to(tl.int16) << 7) & -0x4080).to(tl.float16, bitcast=True)
        return small * tl.full(small.shape, 256.0, tl.float16)


@triton.jit(do_not_specialize=["T"])
def linear_bytes_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, T, Y, X, x_stride, FP8: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = (x @ weight.T) * scale + bias. A code is exact in every dtype of x, so that only the sum needs the scale."""
    wait_for_previous(PDL)
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
        if FP8:
            weight = widen_e4m3(codes, x.dtype)
        else:
            weight = codes.to(x.dtype)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    acc *= tl.load(scale_ptr + y, y < Y, 0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + y, y < Y, 0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * Y + y[None, :], acc, (row[:, None] < T) & (y[None, :] < Y))


@triton.jit
def quantise_rows_kernel(x_ptr, codes_ptr, scale_ptr, X, x_stride, BLOCK: tl.constexpr):
    """codes = x / scale in e4m3, the scale a row's largest number over 448; a row that is not finite becomes NaN."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, X, BLOCK):
        x = tl.load(x_ptr + row * x_stride + first + lane, first + lane < X, 0.0).to(tl.float32)
        # The bits of a number without its sign are in the order of their sizes, NaN and inf the largest.
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(largest, 0)
    finite = bits < 0x7F800000
    scale = tl.where(finite, bits, 0).to(tl.float32, bitcast=True) * 0.002232142857142857
    factor = tl.where(scale > 1e-30, 1 / scale, 0.0)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")))
    for first in tl.range(0, X, BLOCK):
        x = tl.load(x_ptr + row * x_stride + first + lane, first + lane < X, 0.0).to(tl.float32)
        y = tl.where(finite, x * factor, 0.0)
        tl.store(codes_ptr + row * X + first + lane, to_e4m3(y), first + lane < X)


def linear(x_TX: Tensor, packed: Any) -> Tensor:
    """packed: an object with weight_YX, scale_Y (None, or fp32 and the weight is int8 or fp8) and bias_Y."""
    weight_YX, scale_Y, bias_Y = packed.weight_YX, packed.scale_Y, packed.bias_Y
    if scale_Y is None:
        return F.linear(x_TX, weight_YX, bias_Y)
    if len(x_TX) <= FEW_ROWS:
        return linear_bytes(x_TX, weight_YX, scale_Y, bias_Y)
    if weight_YX.dtype is FP8 and multiplies_fp8(x_TX, weight_YX):
        return linear_fp8(x_TX, weight_YX, scale_Y, bias_Y)
    return F.linear(x_TX, weight_YX.to(x_TX.dtype) * scale_Y.to(x_TX.dtype)[:, None], bias_Y)


def linear_bytes(x_TX: Tensor, weight_YX: Tensor, scale_Y: Tensor, bias_Y: Tensor | None) -> Tensor:
    """The weight is widened in registers."""
    assert x_TX.stride(1) == 1 and weight_YX.is_contiguous()
    (T, X), Y = x_TX.shape, len(weight_YX)
    y_TY = torch.empty(T, Y, dtype=x_TX.dtype, device=x_TX.device)
    bucket = f"{'wide' if x_TX.element_size() == 4 else 'half'}_{16 if T <= 16 else 64}"
    numbers = config("linear_fp8" if weight_YX.dtype is FP8 else "linear_int8", bucket, x_TX)
    grid = (triton.cdiv(Y, numbers["COLUMNS"]), triton.cdiv(T, numbers["ROWS"]))
    launch(linear_bytes_kernel, grid, x_TX, weight_YX.view(torch.int8), scale_Y, bias_Y, y_TY, T, Y, X, x_TX.stride(0),
           FP8=weight_YX.dtype is FP8, BIAS=bias_Y is not None, UPCAST=INTERPRETED, **numbers)  # fmt: skip
    return y_TY


def multiplies_fp8(x_TX: Tensor, weight_YX: Tensor) -> bool:
    """Whether torch multiplies such numbers with a scale per row here; it gives bfloat16 alone."""
    sizes_fit = all(size % FP8_MULTIPLE == 0 for size in weight_YX.shape)
    return x_TX.dtype is torch.bfloat16 and sizes_fit and x_TX.device.type == "cuda" and _has_fp8(x_TX.device.index)


@lru_cache
def _has_fp8(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= FP8_CAPABILITY


def linear_fp8(x_TX: Tensor, weight_YX: Tensor, scale_Y: Tensor, bias_Y: Tensor | None) -> Tensor:
    """Rows of x are brought to fp8, each with a scale of its own."""
    codes_TX, scale_T = quantise_rows(x_TX)
    by_row = F.ScalingType.RowWise
    y_TY = F.scaled_mm(codes_TX, weight_YX.t(), scale_T[:, None], by_row, scale_Y[None, :], by_row,
                       output_dtype=x_TX.dtype)  # fmt: skip
    return y_TY if bias_Y is None else y_TY.add_(bias_Y)


def quantise_rows(x_TX: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn [T, X], fp32 scale [T])."""
    assert x_TX.stride(1) == 1
    T, X = x_TX.shape
    codes_TX = torch.empty(T, X, dtype=torch.uint8, device=x_TX.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=x_TX.device)
    numbers = config("quantise_rows", "any", x_TX)
    launch(quantise_rows_kernel, (T,), x_TX, codes_TX, scale_T, X, x_TX.stride(0), **numbers)
    return codes_TX.view(FP8), scale_T


def embedding(ids_T: Tensor, weight_VD: Tensor) -> Tensor:
    return F.embedding(ids_T, weight_VD)
