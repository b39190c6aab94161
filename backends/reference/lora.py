"""Low-rank adapters beside a linear layer, by any op set's own matrix product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backends.reference import linear as reference


@dataclass(frozen=True, slots=True)
class PackedLora:
    """shrink: of each slot from 1 on. expand: of each slot, of each part. parts: widths of the stacked outputs."""

    shrink: list[Any]
    expand: list[list[Any]]
    parts: tuple[int, ...]
    rank: int


class LoraOps:
    """`pack_lora` and `lora_add` over a pair of `pack_linear` and `linear`, so that a row's bits depend on the batch as
    little as that product's do."""

    def __init__(self, pack_linear: Callable[..., Any], linear: Callable[[Tensor, Any], Tensor]):
        self._pack, self._linear = pack_linear, linear

    def pack_lora(self, a_LRX: Tensor, b_LYR: Tensor, parts: tuple[int, ...]) -> PackedLora:
        return PackedLora(shrink=[self._pack(a_RX.contiguous()) for a_RX in a_LRX],
                          expand=[[self._pack(part.contiguous()) for part in b_YR.split(parts)] for b_YR in b_LYR],
                          parts=parts, rank=b_LYR.shape[2])

    def lora_add(self, y_TY: Tensor, x_TX: Tensor, packed: PackedLora, slots_T: Tensor,
                 present: Sequence[int] | None = None) -> None:
        for slot in range(1, len(packed.shrink) + 1) if present is None else present:
            mask_T1 = (slots_T == slot)[:, None]
            h_TR = self._linear(x_TX, packed.shrink[slot - 1])
            first = 0
            for part, (width, expand) in enumerate(zip(packed.parts, packed.expand[slot - 1])):
                h_TR_part = h_TR[:, part * packed.rank:(part + 1) * packed.rank].contiguous()
                y_TY[:, first:first + width] += torch.where(mask_T1, self._linear(h_TR_part, expand), 0.0)
                first += width


REFERENCE_LORA = LoraOps(reference.pack_linear, reference.linear)
