"""Linear layers: cuBLAS through torch, and kernels for weights of one byte where few rows make reading them the cost.

With many rows fp8 weights are multiplied as they are where the device can (compute capability 8.9, bfloat16), by x
that is brought to fp8 as well; else a weight of one byte is brought to x's dtype once for all rows. With "w8a8" x is
brought to int8 by a kernel of its own, and int32 sums are a kernel's where rows are few, else cuBLAS's: the same bits.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from cuda_ops.kv_codes import size_bits, to_e4m3, widen_e4m3
from cuda_ops.launch import INTERPRETED, config, launch, wait_for_previous

FEW_ROWS = 64  # up to so many rows reading the weight is the cost, and the kernel for weights of one byte is taken
FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)  # ada: the first whose tensor cores multiply fp8 numbers
FP8_MULTIPLE = 16  # sizes of cuBLAS's product of fp8 numbers are multiples of it
LEAST_DEPTH = 16  # inputs of a product of 16 bit numbers on tensor cores
INT8_MULTIPLE = 8  # sizes of torch's int8 product (`_int_mm`) are multiples of it; it also wants more than 16 rows


@triton.jit(do_not_specialize=["T"])
def linear_bytes_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, T, Y, X, x_stride, RUN: tl.constexpr, FP8: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y = (x @ weight.T) * scale + bias. A code is exact in every dtype of x, so that only the sum needs the scale;
    with RUN each run of inputs has a sum."""
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
        if RUN:
            acc += scaled_dot(x, weight, scale_ptr, first, y, Y, X, RUN, DEPTH)
        else:
            acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if RUN == 0:
        acc *= tl.load(scale_ptr + y, y < Y, 0.0)[None, :]
    if BIAS:
        acc += tl.load(bias_ptr + y, y < Y, 0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * Y + y[None, :], acc, (row[:, None] < T) & (y[None, :] < Y))


@triton.jit
def scaled_dot(x, weight, scale_ptr, first, y, Y, X, RUN: tl.constexpr, DEPTH: tl.constexpr):
    """x @ (weight * scale).T of the DEPTH inputs from `first` on. scale_ptr: fp32 [G, Y], a row for each RUN inputs."""
    if RUN % DEPTH == 0:
        scale = tl.load(scale_ptr + first // RUN * Y + y, y < Y, 0.0)
        return tl.dot(x, tl.trans(weight), input_precision="ieee") * scale[None, :]
    else:
        k = first + tl.arange(0, DEPTH)
        places = (k // RUN).to(tl.int64)[None, :] * Y + y[:, None]
        scale = tl.load(scale_ptr + places, (y[:, None] < Y) & (k[None, :] < X), 0.0)
        return tl.dot(x, tl.trans((weight.to(tl.float32) * scale).to(x.dtype)), input_precision="ieee")


@triton.jit
def dequantise_kernel(codes_ptr, scale_ptr, out_ptr, Y, X, RUN, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Some inputs of some rows of a weight of e4m3 with scales as `scaled_dot` has them."""
    y = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (y < Y) & (k < X)
    numbers = widen_e4m3(tl.load(codes_ptr + y * X + k, inside, 0), tl.float32)
    scale = tl.load(scale_ptr + (k // RUN).to(tl.int64) * Y + y, inside, 0.0)
    tl.store(out_ptr + y * X + k, numbers * scale, inside)


@triton.jit(do_not_specialize=["T"])
def linear_w8a8_kernel(
    codes_ptr, row_scale_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, T, Y, X, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = (codes @ weight.T) * row_scale * scale + bias, the product in int32."""
    wait_for_previous(PDL)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    y = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    acc = tl.zeros([ROWS, COLUMNS], tl.int32)
    codes_ptrs = codes_ptr + row.to(tl.int64)[:, None] * X + k[None, :]
    weight_ptrs = weight_ptr + y.to(tl.int64)[:, None] * X + k[None, :]
    for first in tl.range(0, X, DEPTH):
        left = X - first
        codes = tl.load(codes_ptrs + first, (row[:, None] < T) & (k[None, :] < left), 0)
        weight = tl.load(weight_ptrs + first, (y[:, None] < Y) & (k[None, :] < left), 0)
        acc = tl.dot(codes, tl.trans(weight), acc, out_dtype=tl.int32)
    store_scaled(acc, row_scale_ptr, scale_ptr, bias_ptr, y_ptr, row, y, T, Y, BIAS)


@triton.jit(do_not_specialize=["T"])
def rescale_kernel(
    sums_ptr, row_scale_ptr, scale_ptr, bias_ptr, y_ptr, T, Y, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What `linear_w8a8_kernel` does once it has the sums."""
    wait_for_previous(PDL)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    y = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums_ptrs = sums_ptr + row.to(tl.int64)[:, None] * Y + y[None, :]
    sums = tl.load(sums_ptrs, (row[:, None] < T) & (y[None, :] < Y), 0)
    store_scaled(sums, row_scale_ptr, scale_ptr, bias_ptr, y_ptr, row, y, T, Y, BIAS)


@triton.jit
def store_scaled(sums, row_scale_ptr, scale_ptr, bias_ptr, y_ptr, row, y, T, Y, BIAS: tl.constexpr):
    out = sums.to(tl.float32) * tl.load(row_scale_ptr + row, row < T, 0.0)[:, None]
    out *= tl.load(scale_ptr + y, y < Y, 0.0)[None, :]
    if BIAS:
        out += tl.load(bias_ptr + y, y < Y, 0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * Y + y[None, :], out, (row[:, None] < T) & (y[None, :] < Y))


@triton.jit
def quantise_rows_kernel(x_ptr, codes_ptr, scale_ptr, X, x_stride, FP8: tl.constexpr, BLOCK: tl.constexpr):
    """codes = x / scale in e4m3 or int8, a scale a row's largest number over the largest code; a row that is not finite
    becomes NaN. Launched without fusion: a product that is rounded next must be rounded before."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, X, BLOCK):
        x = tl.load(x_ptr + row * x_stride + first + lane, first + lane < X, 0.0).to(tl.float32)
        largest = tl.maximum(largest, size_bits(x))
    bits = tl.max(largest, 0)
    finite = bits < 0x7F800000
    row_largest = tl.where(finite, bits, 0).to(tl.float32, bitcast=True)
    top: tl.constexpr = 448.0 if FP8 else 127.0
    is_zero = row_largest < 7.888609052210118e-31  # 2^-100
    factor = tl.where(is_zero, 0.0, tl.div_rn(tl.full([1], top, tl.float32), tl.where(is_zero, 1.0, row_largest)))
    tl.store(scale_ptr + row, tl.where(finite, row_largest * (1 / top), float("nan")))
    for first in tl.range(0, X, BLOCK):
        x = tl.load(x_ptr + row * x_stride + first + lane, first + lane < X, 0.0).to(tl.float32)
        y = tl.where(finite, x * factor, 0.0)
        if FP8:
            codes = to_e4m3(y)
        else:
            # Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits.
            codes = ((y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.uint8)
        tl.store(codes_ptr + row * X + first + lane, codes, first + lane < X)


def linear(x_TX: Tensor, packed: Any) -> Tensor:
    """packed: an object with weight_YX, scale_Y (None, or fp32 and the weight is int8 or fp8), bias_Y and `dynamic`."""
    weight_YX, scale_Y, bias_Y = packed.weight_YX, packed.scale_Y, packed.bias_Y
    if scale_Y is None:
        return F.linear(x_TX, weight_YX, bias_Y)
    if packed.dynamic:
        return linear_w8a8(x_TX, weight_YX, scale_Y, bias_Y)
    if len(x_TX) <= FEW_ROWS:
        return linear_bytes(x_TX, weight_YX, scale_Y, bias_Y)
    if weight_YX.dtype is FP8 and multiplies_fp8(x_TX, weight_YX):
        return linear_fp8(x_TX, weight_YX, scale_Y, bias_Y)
    return F.linear(x_TX, weight_YX.to(x_TX.dtype) * scale_Y.to(x_TX.dtype)[:, None], bias_Y)


def linear_bytes(x_TX: Tensor, weight_YX: Tensor, scale: Tensor, bias_Y: Tensor | None, *, run: int = 0) -> Tensor:
    """The weight is widened in registers.

    run: inputs of an output that share a scale, scale is [G, Y] then, a row for each run; 0: all do, and it is [Y].
    """
    assert x_TX.stride(1) == 1 and weight_YX.is_contiguous() and scale.is_contiguous()
    (T, X), Y = x_TX.shape, len(weight_YX)
    y_TY = torch.empty(T, Y, dtype=x_TX.dtype, device=x_TX.device)
    bucket = f"{'wide' if x_TX.element_size() == 4 else 'half'}_{16 if T <= 16 else 64}"
    numbers = within_runs(config("linear_fp8" if weight_YX.dtype is FP8 else "linear_int8", bucket, x_TX), run)
    grid = (triton.cdiv(Y, numbers["COLUMNS"]), triton.cdiv(T, numbers["ROWS"]))
    launch(linear_bytes_kernel, grid, x_TX, weight_YX.view(torch.int8), scale, bias_Y, y_TY, T, Y, X, x_TX.stride(0),
           RUN=run, FP8=weight_YX.dtype is FP8, BIAS=bias_Y is not None, UPCAST=INTERPRETED, **numbers)  # fmt: skip
    return y_TY


def within_runs(numbers: dict[str, int], run: int) -> dict[str, int]:
    """The same with a DEPTH that divides `run`, so that a product has one scale an output. Where that would be too
    small to multiply each number of the weight is scaled for itself: scales take much memory, and have few stages."""
    depth = gcd(numbers["DEPTH"], run)
    return {**numbers, "DEPTH": depth} if depth >= LEAST_DEPTH else {**numbers, "num_stages": 2}


def dequantise(weight_YX: Tensor, scale_GY: Tensor, run: int, dtype: torch.dtype) -> Tensor:
    """The matrix that fp8 codes and a scale for each run of inputs stand for: fp32 products, rounded to `dtype`."""
    assert weight_YX.is_contiguous() and scale_GY.is_contiguous()
    Y, X = weight_YX.shape
    out_YX = torch.empty(Y, X, dtype=dtype, device=weight_YX.device)
    numbers = config("dequantise", "any", weight_YX)
    grid = (triton.cdiv(Y, numbers["ROWS"]), triton.cdiv(X, numbers["BLOCK"]))
    launch(dequantise_kernel, grid, weight_YX.view(torch.int8), scale_GY, out_YX, Y, X, run, **numbers)
    return out_YX


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


def multiplies_int8(x_TX: Tensor, weight_YX: Tensor) -> bool:
    """Whether torch multiplies such numbers here; the kernel is for the others, and for few rows."""
    return x_TX.device.type == "cuda" and fits_int_mm(len(x_TX), weight_YX)


def fits_int_mm(num_rows: int, weight_YX: Tensor) -> bool:
    return num_rows > FEW_ROWS and all(size % INT8_MULTIPLE == 0 for size in weight_YX.shape)


def linear_w8a8(x_TX: Tensor, weight_YX: Tensor, scale_Y: Tensor, bias_Y: Tensor | None) -> Tensor:
    """Rows of x are brought to int8, each with a scale of its own."""
    codes_TX, scale_T = quantise_rows(x_TX, torch.int8)
    if multiplies_int8(x_TX, weight_YX):
        return rescale(torch._int_mm(codes_TX, weight_YX.t()), scale_T, scale_Y, bias_Y, x_TX.dtype)
    (T, X), Y = x_TX.shape, len(weight_YX)
    y_TY = torch.empty(T, Y, dtype=x_TX.dtype, device=x_TX.device)
    numbers = config("linear_w8a8", "16" if T <= 16 else "any", x_TX)
    grid = (triton.cdiv(Y, numbers["COLUMNS"]), triton.cdiv(T, numbers["ROWS"]))
    launch(linear_w8a8_kernel, grid, codes_TX, scale_T, weight_YX, scale_Y, bias_Y, y_TY, T, Y, X,
           BIAS=bias_Y is not None, enable_fp_fusion=False, **numbers)  # fmt: skip
    return y_TY


def rescale(sums_TY: Tensor, scale_T: Tensor, scale_Y: Tensor, bias_Y: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sums * scale_T * scale_Y + bias in fp32, then in `dtype`. sums_TY: int32."""
    T, Y = sums_TY.shape
    y_TY = torch.empty(T, Y, dtype=dtype, device=sums_TY.device)
    numbers = config("rescale", "any", sums_TY)
    grid = (triton.cdiv(Y, numbers["COLUMNS"]), triton.cdiv(T, numbers["ROWS"]))
    launch(rescale_kernel, grid, sums_TY, scale_T, scale_Y, bias_Y, y_TY, T, Y, BIAS=bias_Y is not None,
           enable_fp_fusion=False, **numbers)  # fmt: skip
    return y_TY


def quantise_rows(x_TX: Tensor, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn or int8 [T, X], fp32 scale [T])."""
    assert x_TX.stride(1) == 1
    T, X = x_TX.shape
    codes_TX = torch.empty(T, X, dtype=torch.uint8, device=x_TX.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=x_TX.device)
    numbers = config("quantise_rows", "any", x_TX)
    launch(quantise_rows_kernel, (T,), x_TX, codes_TX, scale_T, X, x_TX.stride(0), FP8=dtype is FP8,
           enable_fp_fusion=False, **numbers)  # fmt: skip
    return codes_TX.view(dtype), scale_T


def embedding(ids_T: Tensor, weight_VD: Tensor) -> Tensor:
    return F.embedding(ids_T, weight_VD)
