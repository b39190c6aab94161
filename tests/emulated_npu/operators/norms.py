"""RMS norm and the gated activation."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.emulated_npu.operators.registry import emulates


@emulates("npu::npu_rms_norm")
def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    if input.dtype != gamma.dtype:
        raise RuntimeError(f"npu_rms_norm: input is {input.dtype}, gamma {gamma.dtype}")
    if input.shape[input.dim() - gamma.dim() :] != gamma.shape:
        raise RuntimeError(f"npu_rms_norm: gamma {tuple(gamma.shape)} does not end {tuple(input.shape)}")
    dims = tuple(range(-gamma.dim(), 0))
    wide = input.float()
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


@emulates("npu::npu_add_rms_norm")
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    if x1.dtype != x2.dtype or x1.shape != x2.shape:
        raise RuntimeError("npu_add_rms_norm: x1 and x2 differ in shape or type")
    total = x1 + x2
    normed, rstd = rms_norm(total, gamma, epsilon)
    return normed, rstd, total


@emulates("npu::npu_swiglu")
def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    if input.shape[dim] % 2:
        raise RuntimeError(f"npu_swiglu: {input.shape[dim]} elements cannot be halved")
    gate, up = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)
