"""Mixtures of experts on the CPU without compiled kernels: rows sorted by expert, one product for each that was hit.

Letters: T tokens, K experts a token, R = T * K rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from backends.expert_choice import ExpertChoice
from backends.reference.experts import PackedExperts, weighted_sum
from backends.scaled_weight import ScaledWeight


@dataclass(frozen=True, slots=True)
class SortedRows:
    """tokens_R: whose row stands where, in the order of the experts. places_R: where the row of token t and choice k
    stands, at t * K + k. hits: (expert, its first row, the one behind its last)."""

    tokens_R: Tensor
    places_R: Tensor
    hits: list[tuple[int, int, int]]


def sorted_rows(choice: ExpertChoice) -> SortedRows:
    """Computed once for each choice."""
    if type(choice.order) is not SortedRows:
        ids_R = choice.ids_TK.flatten()
        ids_R, sources_R = ids_R.sort(stable=True)
        experts, counts = ids_R.unique_consecutive(return_counts=True)
        ends = counts.cumsum(0).tolist()
        choice.order = SortedRows(
            sources_R // choice.ids_TK.shape[1], sources_R.argsort(),
            list(zip(experts.tolist(), [0, *ends], ends)))
    order: SortedRows = choice.order
    return order


class SortedExperts:
    """The operators over a pair of `pack_linear` and `linear`, so that a row's bits depend on the batch as little as
    that product's do."""

    def __init__(self, pack_linear: Callable[..., Any], linear: Callable[[Tensor, Any], Tensor]):
        self._pack, self._linear = pack_linear, linear

    def pack_experts(self, experts: Iterable[Tensor | ScaledWeight], *,
                     quantization: str | None = None) -> PackedExperts:
        packed, num_outputs = [], 0
        for weight_YX in experts:
            packed.append(self._pack(weight_YX, quantization=quantization))
            num_outputs = len(weight_YX)
        return PackedExperts(packed, num_outputs)

    def grouped_linear(self, x: Tensor, packed: Any, choice: ExpertChoice, *, from_tokens: bool,
                       out: Tensor | None = None) -> Tensor:
        order = sorted_rows(choice)
        y_RY = x.new_empty((len(order.tokens_R), packed.num_outputs)) if out is None else out
        for expert, begin, end in order.hits:
            rows = x[order.tokens_R[begin:end]] if from_tokens else x[begin:end]
            y_RY[begin:end] = self._linear(rows, packed.experts[expert])
        return y_RY

    def combine(self, y_RX: Tensor, choice: ExpertChoice, *, out: Tensor | None = None) -> Tensor:
        y_TKX = y_RX[sorted_rows(choice).places_R].unflatten(0, choice.ids_TK.shape)
        total_TX = weighted_sum(y_TKX, choice.weights_TK)
        return total_TX.to(y_RX.dtype) if out is None else out.copy_(total_TX)
