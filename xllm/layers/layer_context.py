"""What a layer is given when it is built: a `LayerContext`, and `Weights` to take its tensors from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from backends.opset import OpSet
from backends.scaled_weight import ScaledWeight
from xllm.layers.adapter_slots import AdapterSlots
from xllm.layers.workspace import Workspace
from xllm.parallel.parallel_context import ONE_RANK, ParallelContext
from xllm.parallel.shard import Shard

Part = tuple[slice, ...]  # of a tensor: along each of its axes, with a first index and one behind the last


class Weights(Protocol):
    """Where layers get their tensors. Each name can be taken once.

    is_bare: the checkpoint was saved from a model without a head; its names lack the `model.` of those asked for here.
    """

    is_bare: bool

    def take(self, name: str, shape: tuple[int, ...], shard: Shard | None = None, *,
             dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in the compute dtype, on the device, contiguous, owned by the caller.

        shape: of the whole tensor. shard: the part to return, of which alone the bytes are read; None: all of it.
        dtype: instead of the compute dtype; float32 gives what the checkpoint has, unrounded.
        Raises:
            ModelError: it is missing or has another shape; the message names tensor and file.
        """
        ...

    def take_matrix(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> Tensor | ScaledWeight:
        """As `take`, of a matrix that becomes a product: as the checkpoint's own fp8 where that is kept."""
        ...

    def take_experts(self, name: str, shape: tuple[int, int, int],
                     parts: Sequence[Part]) -> Iterator[Tensor | ScaledWeight]:
        """The matrices [Y, X] that lie stacked in one tensor of that shape, [E, Y, X], one after the other: of each,
        the rows and columns of each of `parts`, one below the other, of which alone the bytes are read.

        All are plain, or all are fp8 as `take_matrix` gives it. Raises as `take` does.
        """
        ...

    def has(self, name: str) -> bool:
        """Whether the tensor can be taken."""
        ...

    def skip(self, prefix: str) -> int:
        """Leave out all tensors whose names begin so, which no layer will take; how many there were."""
        ...


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """Handed down a model's constructors; layers keep the ops and groups they call and nothing else of it.

    max_model_len: positions are below it. adapters: told of every layer that adapters may change; None: none can be
    loaded. workspace: for what is between products of experts; None: operators take memory of their own, as graphs want
    it and as is best where freed memory is kept for the next tensor anyway.
    """

    ops: OpSet
    device: torch.device
    max_model_len: int
    parallel: ParallelContext = ONE_RANK
    quantization: str | None = None
    adapters: AdapterSlots | None = None
    workspace: Workspace | None = None
