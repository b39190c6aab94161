"""`gated_by`: `OpSet.gated_grouped_linear` out of two other operators of a set, for sets without one of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backends.expert_choice import ExpertChoice
from backends.expert_ops import GatedGroupedLinearOp, GroupedLinearOp
from backends.opset import SiluMulOp


def gated_by(grouped_linear: GroupedLinearOp, silu_mul: SiluMulOp) -> GatedGroupedLinearOp:
    """The product, then its activation. It takes what is packed for that `grouped_linear`."""

    def gated_grouped_linear(x_TX: Tensor, packed: Any, choice: ExpertChoice, *, room: Tensor | None = None,
                             out: Tensor | None = None) -> Tensor:
        return silu_mul(grouped_linear(x_TX, packed, choice, from_tokens=True, out=room), out=out)

    return gated_grouped_linear
