"""RMS norms."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_ops.contracts import check


def rms_norm(*, x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * gamma over gamma's axes, in x's dtype. Gemma's form: pass 1 + weight."""
    check("npu_rms_norm", input=x, gamma=gamma, epsilon=epsilon)
    out: Tensor = torch.ops.npu.npu_rms_norm(x, gamma, epsilon=epsilon)[0]
    return out


def add_rms_norm(*, x: Tensor, residual: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    """residual += x in place, then its norm in a new tensor. (The in-place form of the operator is not documented.)"""
    check("npu_add_rms_norm", x1=x, x2=residual, gamma=gamma, epsilon=epsilon)
    normed, _, total = torch.ops.npu.npu_add_rms_norm(x, residual, gamma, epsilon=epsilon)
    residual.copy_(total)
    out: Tensor = normed
    return out
