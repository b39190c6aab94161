"""`AdapterSlots`: low-rank adapters (LoRA; Hu et al. 2021) beside the weights, any number of them in one batch.

Slot 0 is the model as it is. The step says for each token which slot it is computed with; linear layers add what their
slot's adapter says. Steps without any adapter cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from backends.opset import OpSet
from xllm.parallel.shard import Shard


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """matrices: layer name (`model.layers.0.self_attn.q_proj`) -> (A [r, X], B [Y, r], the scale multiplied in), fp32,
    in host memory."""

    matrices: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class AdaptedPart:
    """One of the matrices that are stacked in a layer: (Y, X) of the whole one, which part of it this rank has, and how
    many rows those are. order: see `column_linear`."""

    rows: int
    shape: tuple[int, int]
    shard: Shard
    order: Tensor | None = None

    def of(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A [r, X] and B [Y, r] of the whole matrix, cut to this part: of its outputs, or of its inputs."""
        a, b = pair
        if self.shard.axis == 1:
            return a[self.shard.of(a.shape)], b
        return a, in_order(b[self.shard.of(b.shape)], self.order)


def in_order(x_Y: Tensor, order: Tensor | None) -> Tensor:
    """Each so many rows of x, in this order of them."""
    if order is None:
        return x_Y
    return x_Y.unflatten(0, (-1, len(order)))[:, order.to(x_Y.device)].flatten(0, 1)


class Adaptable(Protocol):
    """A linear layer that adapters may change. parts: its stacked matrices by name. num_inputs: of this rank."""

    parts: Mapping[str, AdaptedPart]
    num_inputs: int
    lora: Any


class AdapterSlots:
    """The adapters of one model, and which slots the running step uses. The runner's thread is its only user."""

    def __init__(self, ops: OpSet, *, num_slots: int, dtype: torch.dtype, device: torch.device):
        self.ops, self._dtype, self._device = ops, dtype, device
        self._adapters: list[Adapter | None] = [None] * num_slots
        self._layers: list[Adaptable] = []
        self.slots_T: Tensor | None = None  # int32, of the step; None: no token has an adapter
        self.present: Sequence[int] | None = None  # the slots that occur, where the host knows; None: any

    @contextmanager
    def used(self, slots_T: Tensor, present: Sequence[int] | None = None) -> Iterator[None]:
        """Layers that are called inside compute with these slots."""
        self.slots_T, self.present = slots_T, present
        try:
            yield
        finally:
            self.slots_T = self.present = None

    def register(self, layer: Adaptable) -> None:
        """A layer was built."""
        self._layers.append(layer)

    def forget_layers(self) -> None:
        """The model goes; the adapters stay for the next one."""
        self._layers.clear()

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name -> (Y, X) of all that can be adapted."""
        return {name: part.shape for layer in self._layers for name, part in layer.parts.items()}

    def put(self, slot: int, adapter: Adapter | None) -> None:
        """Fill a slot (from 1 on), or empty it. No step in flight uses it."""
        self._adapters[slot - 1] = adapter
        self.apply()

    def apply(self) -> None:
        """Give every layer its part of all adapters."""
        for layer in self._layers:
            layer.lora = self._stacked(layer)

    def _stacked(self, layer: Adaptable) -> Any:
        """What `OpSet.lora_add` takes; None if no adapter changes this layer."""
        widths = [part.rows for part in layer.parts.values()]
        found = [[_cut(adapter, name, part) for name, part in layer.parts.items()] for adapter in self._adapters]
        rank = max((pair[0].shape[0] for pairs in found for pair in pairs if pair is not None), default=0)
        if not rank:
            return None
        num_slots = len(found)
        a_LRX = torch.zeros(num_slots, len(widths) * rank, layer.num_inputs, dtype=torch.float32)
        b_LYR = torch.zeros(num_slots, sum(widths), rank, dtype=torch.float32)
        for slot, part, first, pair in _places(found, widths):
            a, b = pair
            a_LRX[slot, part * rank:part * rank + len(a)] = a
            b_LYR[slot, first:first + len(b), :b.shape[1]] = b
        return self.ops.pack_lora(a_LRX.to(self._device, self._dtype), b_LYR.to(self._device, self._dtype),
                                  tuple(widths))


def _cut(adapter: Adapter | None, name: str, part: AdaptedPart) -> tuple[Tensor, Tensor] | None:
    pair = None if adapter is None else adapter.matrices.get(name)
    return None if pair is None else part.of(pair)


def _places(found: list[list[tuple[Tensor, Tensor] | None]],
            widths: list[int]) -> Iterator[tuple[int, int, int, tuple[Tensor, Tensor]]]:
    """(slot from 0, part, first row of the part, its matrices)."""
    for slot, pairs in enumerate(found):
        for part, pair in enumerate(pairs):
            if pair is not None:
                yield slot, part, sum(widths[:part]), pair
