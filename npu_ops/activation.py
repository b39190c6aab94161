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
