"""`LayerContext`: what every layer is given when it is built, and the `Weights` it pulls from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from backends.opset import OpSet
from xllm.layers.adapters import AdapterSlots
from xllm.parallel.context import ParallelContext


class Weights(Protocol):
    """Where layers get their tensors. Each name can be taken once."""

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in the compute dtype, on the device, owned by the caller.

        Raises:
            ModelError: it is missing or has another shape; the message names tensor and file.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """Handed down a model's constructors; layers keep the ops they call and nothing else of it."""

    ops: OpSet
    parallel: ParallelContext
    weights: Weights
    quantization: str | None = None
    adapters: AdapterSlots | None = None  # None: no adapter can be loaded
