"""Mixtures of experts on CUDA: the contracts of `opset.py` over the kernels of `cuda_ops/experts.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from backends.cuda_linear import by_run
from backends.expert_choice import ExpertChoice, RouteRule
from backends.reference.linear import PackedLinear, PackedScaled, check_unquantised, pack_linear
from backends.scaled_weight import ScaledWeight
from cuda_ops import experts as kernels


def route(logits_TE: Tensor, rule: RouteRule, bias_E: Tensor | None = None) -> ExpertChoice:
    return ExpertChoice(*kernels.route(logits_TE, rule, bias_E))


def pack_experts(experts: Iterable[Tensor | ScaledWeight], *,
                 quantization: str | None = None) -> kernels.ExpertWeights:
    packed: list[PackedLinear | PackedScaled] = []
    runs = set()
    for weight_YX in experts:
        if isinstance(weight_YX, ScaledWeight):
            check_unquantised(quantization)
            own = by_run(weight_YX)
            packed.append(PackedLinear(own.codes_YX, own.scale_YG.t(), None))
            runs.add(own.group)
        else:
            packed.append(pack_linear(weight_YX, quantization=quantization))
            runs.add(0)
    run, = runs
    return kernels.ExpertWeights(packed, run)


def grouped_linear(x: Tensor, packed: Any, choice: ExpertChoice, *, from_tokens: bool,
                   out: Tensor | None = None) -> Tensor:
    return kernels.grouped_linear(x, packed, _order(choice, len(packed.tensors)), from_tokens=from_tokens, out=out)


def combine(y_RX: Tensor, choice: ExpertChoice, *, out: Tensor | None = None) -> Tensor:
    assert choice.order is not None, "y is not a result of `grouped_linear` with this choice"
    return kernels.combine(y_RX, choice.weights_TK, choice.order, out=out)


def _order(choice: ExpertChoice, num_experts: int) -> kernels.RowOrder:
    """Made once for each choice: the layer's other experts are as many."""
    if choice.order is None:
        choice.order = kernels.sort_rows(choice.ids_TK, num_experts)
    order: kernels.RowOrder = choice.order
    return order
