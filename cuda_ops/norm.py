"""RMS norms (Zhang and Sennrich 2019), one row a program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.launch import config, launch, wait_for_previous


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps, x_row, D, ADD: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < D
    at = tl.program_id(0).to(tl.int64) * D + offsets
    x = tl.load(x_ptr + tl.program_id(0).to(tl.int64) * x_row + offsets, inside, 0.0).to(tl.float32)
    if ADD:
        # The sum is normalised as it is kept: rounded.
        x = (x + tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + at, x, inside)
        x = x.to(tl.float32)
    weight = tl.load(weight_ptr + offsets, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / D + eps)
    y = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + at, y * weight, inside)


def _norm(x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
    assert x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1)
    assert residual is None or residual.is_contiguous()
    out, D = x.new_empty(x.shape), x.shape[-1]
    block = triton.next_power_of_2(D)
    launch(rms_norm_kernel, (x.numel() // D,), x, residual, weight_D, out, eps,
           D if x.is_contiguous() else x.stride(0), D, ADD=residual is not None,
           BLOCK=block, **config("norm", f"D{block}", x))  # fmt: skip
    return out


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _norm(x_TD, None, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _norm(x_TD, residual_TD, weight_D, eps)
