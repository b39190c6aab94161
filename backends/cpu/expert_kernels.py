"""The compiled operators of mixtures of experts. Numbers that the kernels do not take go to plain torch.

Letters: T tokens, E experts, K experts a token, R = T * K rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import byref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backends.cpu.experts import SortedExperts
from backends.cpu.kernels import FP32, Kernels, PanelLinear
from backends.cpu.structs import Packed, RouteStruct
from backends.expert_choice import ExpertChoice, RouteRule
from backends.scaled_weight import ScaledWeight


@dataclass(frozen=True, slots=True)
class PlacedRows:
    """Rows sorted by expert, those of one expert by token. tokens_R, places_TK: int32, see `xllm_sort_rows`. starts_E1:
    int64, with R at the end."""

    tokens_R: Tensor
    places_TK: Tensor
    starts_E1: Tensor


class PanelExperts:
    """Experts in the panels of linear.c or w8a8.c, and an array of what C knows of them. multiply: the C function."""

    __slots__ = ("array", "experts", "multiply", "nbytes", "num_outputs")

    def __init__(self, multiply: Any, experts: list[PanelLinear]):
        self.multiply, self.experts = multiply, experts  # whose tensors the array points to
        self.array = (Packed * len(experts))(*(expert.struct for expert in experts))
        self.nbytes = sum(expert.nbytes for expert in experts)
        self.num_outputs = experts[0].num_outputs


class ExpertKernels:
    """The operators of one loaded library, as `Kernels` has them; each honours the contract in `opset.py`."""

    def __init__(self, kernels: Kernels):
        self._kernels = kernels
        self._plain = SortedExperts(kernels.pack_linear, kernels.linear)

    def route(self, logits_TE: Tensor, rule: RouteRule, bias_E: Tensor | None = None) -> ExpertChoice:
        logits_TE = logits_TE.float().contiguous()
        bias_E = None if bias_E is None else bias_E.float().contiguous()
        num_tokens, num_experts = logits_TE.shape
        ids_TK = torch.empty((num_tokens, rule.num_chosen), dtype=torch.int32)
        weights_TK = torch.empty((num_tokens, rule.num_chosen), dtype=FP32)
        self._kernels.route_c(byref(RouteStruct(
            logits_TE.data_ptr(), None if bias_E is None else bias_E.data_ptr(), ids_TK.data_ptr(),
            weights_TK.data_ptr(), num_tokens, num_experts, rule.num_chosen, rule.sigmoid, rule.num_groups,
            rule.num_kept_groups, rule.summed_per_group, rule.renormalise, rule.scale)), self._kernels.threads())
        return ExpertChoice(ids_TK, weights_TK)

    def pack_experts(self, experts: Iterable[Tensor | ScaledWeight], *, quantization: str | None = None) -> Any:
        packed = self._plain.pack_experts(experts, quantization=quantization)
        if any(type(expert) is not PanelLinear for expert in packed.experts):
            return packed
        kernels = self._kernels
        is_w8a8 = packed.experts[0].multiply is kernels.linear_w8a8_c
        return PanelExperts(kernels.grouped_linear_w8a8_c if is_w8a8 else kernels.grouped_linear_c, packed.experts)

    def grouped_linear(self, x: Tensor, packed: Any, choice: ExpertChoice, *, from_tokens: bool,
                       out: Tensor | None = None) -> Tensor:
        if type(packed) is not PanelExperts:
            return self._plain.grouped_linear(x, packed, choice, from_tokens=from_tokens, out=out)
        order = self._placed_rows(choice, len(packed.experts))
        rows = x if x.dtype is FP32 else x.float()
        y_RY = (out if out is not None and x.dtype is FP32
                else rows.new_empty((choice.ids_TK.numel(), packed.num_outputs)))
        packed.multiply(packed.array, len(packed.experts), order.starts_E1.data_ptr(), rows.data_ptr(), rows.stride(0),
                        order.tokens_R.data_ptr() if from_tokens else None, y_RY.data_ptr(), self._kernels.threads())
        if x.dtype is FP32:
            return y_RY
        return y_RY.to(x.dtype) if out is None else out.copy_(y_RY)

    def combine(self, y_RX: Tensor, choice: ExpertChoice, *, out: Tensor | None = None) -> Tensor:
        order = choice.order
        if y_RX.dtype is not FP32 or type(order) is not PlacedRows:
            return self._plain.combine(y_RX, choice, out=out)  # its order is the same
        num_tokens, num_chosen = choice.ids_TK.shape
        out_TX = y_RX.new_empty((num_tokens, y_RX.shape[1])) if out is None else out
        self._kernels.combine_c(y_RX.data_ptr(), order.places_TK.data_ptr(), choice.weights_TK.data_ptr(),
                                out_TX.data_ptr(), num_tokens, num_chosen, y_RX.shape[1], self._kernels.threads())
        return out_TX

    def _placed_rows(self, choice: ExpertChoice, num_experts: int) -> PlacedRows:
        """Computed once for each choice."""
        if type(choice.order) is not PlacedRows:
            ids_TK = choice.ids_TK
            starts_E1 = torch.empty(num_experts + 1, dtype=torch.int64)
            tokens_R, places_TK = torch.empty(ids_TK.numel(), dtype=torch.int32), torch.empty_like(ids_TK)
            self._kernels.sort_rows_c(ids_TK.data_ptr(), *ids_TK.shape, num_experts, starts_E1.data_ptr(),
                                      tokens_R.data_ptr(), places_TK.data_ptr())
            choice.order = PlacedRows(tokens_R, places_TK, starts_E1)
        order: PlacedRows = choice.order
        return order
