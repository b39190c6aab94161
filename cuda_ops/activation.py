"""Activations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.launch import config, launch, wait_for_previous


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, F, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous(PDL)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < F
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_up_ptr + row * 2 * F + offsets, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + offsets, inside, 0.0).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * F + offsets, silu * up, inside)


def silu_mul(gate_up_TF2: Tensor, *, out: Tensor | None = None) -> Tensor:
    assert gate_up_TF2.is_contiguous()
    num_rows, F = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    out_TF = torch.empty(num_rows, F, dtype=gate_up_TF2.dtype, device=gate_up_TF2.device) if out is None else out
    numbers = config("silu_mul", "any", gate_up_TF2)
    launch(silu_mul_kernel, (num_rows, triton.cdiv(F, numbers["BLOCK"])), gate_up_TF2, out_TF, F, **numbers)
    return out_TF
