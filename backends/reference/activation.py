"""Activations in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def silu_mul(gate_up_TF2: Tensor, *, out: Tensor | None = None) -> Tensor:
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    if out is not None:
        return torch.mul(F.silu(gate_TF), up_TF, out=out)
    return F.silu(gate_TF) * up_TF
