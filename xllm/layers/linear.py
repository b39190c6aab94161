"""`Linear`: one packed matrix product, possibly of several checkpoint matrices stacked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xllm.errors import ConfigError
from xllm.layers.adapters import AdapterSlots
from xllm.layers.context import LayerContext


class Linear:
    """y_TY = x_TX @ weight_YX.T + bias_Y, the weight packed once for the op set."""

    __slots__ = ("_linear", "_packed", "nbytes")

    def __init__(self, context: LayerContext, weight_YX: Tensor, bias_Y: Tensor | None = None):
        self._linear = context.ops.linear
        try:
            self._packed = context.ops.pack_linear(weight_YX, bias_Y, quantization=context.quantization)
        except ValueError as error:
            raise ConfigError(f"quantization {context.quantization!r}: {error}") from None
        self.nbytes: int = self._packed.nbytes

    def __call__(self, x_TX: Tensor) -> Tensor:
        return self._linear(x_TX, self._packed)


class AdaptedLinear(Linear):
    """A `Linear` that adapters may change; see `AdapterSlots`."""

    __slots__ = ("_adapters", "lora", "num_inputs", "outputs")

    def __init__(self, context: LayerContext, adapters: AdapterSlots, outputs: Mapping[str, int], weight_YX: Tensor,
                 bias_Y: Tensor | None = None):
        super().__init__(context, weight_YX, bias_Y)
        self._adapters, self.outputs, self.num_inputs = adapters, outputs, weight_YX.shape[1]
        self.lora: Any = None
        adapters.register(self)

    def __call__(self, x_TX: Tensor) -> Tensor:
        y_TY = self._linear(x_TX, self._packed)
        adapters = self._adapters
        if adapters.slots_T is not None and self.lora is not None:
            adapters.ops.lora_add(y_TY, x_TX, self.lora, adapters.slots_T, adapters.present)
        return y_TY


def load_linear(context: LayerContext, outputs: Mapping[str, int], num_inputs: int, *, bias: bool = False) -> Linear:
    """Take `<name>.weight` (and `.bias`) of each entry of `outputs` (name -> rows) and stack them in order.

    Projections that read the same input (q, k, v; gate, up) thus become one product. Those of the layers take adapters,
    where the context has any.
    """
    weights = [context.weights.take(f"{name}.weight", (rows, num_inputs)) for name, rows in outputs.items()]
    biases = [context.weights.take(f"{name}.bias", (rows,)) for name, rows in outputs.items()] if bias else []
    weight_YX, bias_Y = _stack(weights), _stack(biases) if biases else None
    if context.adapters is None or not any(".layers." in name for name in outputs):
        return Linear(context, weight_YX, bias_Y)
    return AdaptedLinear(context, context.adapters, outputs, weight_YX, bias_Y)


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
