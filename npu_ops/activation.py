"""Activations."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_ops.contracts import check


def swiglu(*, gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last axis."""
    check("npu_swiglu", input=gate_up, dim=-1)
    out: Tensor = torch.ops.npu.npu_swiglu(gate_up, dim=-1)
    return out


def silu_mul(gate_up_TF2: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The same of [T, 2F], into `out` if that is given."""
    inner_TF = swiglu(gate_up=gate_up_TF2)
    return inner_TF if out is None else out.copy_(inner_TF)
