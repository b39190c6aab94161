"""`CommonScale`: quantised products whose inputs lie on several ranks, with the codes of one rank.

A code is a number over its row's largest one, and a rank sees a part of the row only. So the largest number of the
whole row goes into a column of its own, against one of zeros on the other side of the product: it sets the scale, in
whichever way the op set computes that, and adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backends.expert_choice import ExpertChoice
from backends.opset import OpSet
from backends.scaled_weight import ScaledWeight
from xllm.parallel.groups import Group


class CommonScale:
    """The products of an op set, for a part of the inputs and a format of the weights that is not None.

    Letters: T tokens, X the inputs of this rank, Y outputs.
    """

    def __init__(self, ops: OpSet, group: Group, quantization: str):
        self._ops, self._group = ops, group
        self._rounds_inputs = quantization == "w8a8"

    def pack_linear(self, weight_YX: Tensor | ScaledWeight, bias_Y: Tensor | None = None, *,
                    quantization: str | None = None) -> Any:
        """All ranks pack the same layers in the same order: they tell each other the largest numbers."""
        return self._ops.pack_linear(self._widened(weight_YX), bias_Y, quantization=quantization)

    def linear(self, x_TX: Tensor, packed: Any) -> Tensor:
        return self._ops.linear(self._widened_input(x_TX), packed)

    def pack_experts(self, experts: Iterable[Tensor | ScaledWeight], *, quantization: str | None = None) -> Any:
        def widened() -> Iterator[Tensor]:
            for weight_YX in experts:
                yield self._widened(weight_YX)

        return self._ops.pack_experts(widened(), quantization=quantization)

    def grouped_linear(self, x: Tensor, packed: Any, choice: ExpertChoice, *, from_tokens: bool,
                       out: Tensor | None = None) -> Tensor:
        """All ranks have the same choice, and one kind of device: their rows stand in the same order."""
        return self._ops.grouped_linear(self._widened_input(x), packed, choice, from_tokens=from_tokens, out=out)

    def _widened(self, weight_YX: Tensor | ScaledWeight) -> Tensor:
        assert isinstance(weight_YX, Tensor), "what has its own scales is not quantised"
        columns = [weight_YX, self._largest(weight_YX)]
        if self._rounds_inputs:
            columns.append(torch.zeros_like(columns[1]))
        return torch.cat(columns, dim=1)

    def _widened_input(self, x_TX: Tensor) -> Tensor:
        x_TX = F.pad(x_TX, (0, 1))
        return torch.cat((x_TX, self._largest(x_TX)), dim=1) if self._rounds_inputs else x_TX

    def _largest(self, x_TX: Tensor) -> Tensor:
        """Of each row on all ranks, by its absolute value: [T, 1]."""
        return self._group.all_reduce_max(x_TX.abs().amax(dim=1, keepdim=True))
