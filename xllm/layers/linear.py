"""`Linear`: one packed matrix product, possibly of several checkpoint matrices stacked, possibly shared among ranks.

A column layer gives each tensor-parallel rank some of the outputs, from the whole input; a row layer takes a part of
the input and sums over the ranks. One of each needs one sum. On one rank both are a plain `Linear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from backends.gated_experts import gated_by
from backends.scaled_weight import ScaledWeight, stack_rows
from xllm.errors import ConfigError
from xllm.layers.adapter_slots import AdaptedPart, AdapterSlots, in_order
from xllm.layers.common_scale import CommonScale
from xllm.layers.layer_context import LayerContext, Weights
from xllm.parallel.shard import Shard

NO_ORDERS: Mapping[str, Tensor | None] = {}


class Linear:
    """y_TY = x_TX @ weight_YX.T + bias_Y, the weight packed once for the op set."""

    __slots__ = ("_linear", "_packed")

    def __init__(self, context: LayerContext, weight_YX: Tensor | ScaledWeight, bias_Y: Tensor | None = None):
        self._linear = context.ops.linear
        try:
            self._packed = context.ops.pack_linear(weight_YX, bias_Y, quantization=context.quantization)
        except ValueError as error:
            raise ConfigError(f"quantization {context.quantization!r}: {error}") from None

    def __call__(self, x_TX: Tensor) -> Tensor:
        return self._linear(x_TX, self._packed)


class AdaptedLinear(Linear):
    """A `Linear` that adapters may change; see `AdapterSlots`."""

    __slots__ = ("_adapters", "lora", "num_inputs", "parts")

    def __init__(self, context: LayerContext, adapters: AdapterSlots, parts: Mapping[str, AdaptedPart],
                 weight_YX: Tensor | ScaledWeight, bias_Y: Tensor | None = None):
        super().__init__(context, weight_YX, bias_Y)
        self._adapters, self.parts, self.num_inputs = adapters, parts, weight_YX.shape[1]
        self.lora: Any = None
        adapters.register(self)

    def __call__(self, x_TX: Tensor) -> Tensor:
        y_TY = self._linear(x_TX, self._packed)
        adapters = self._adapters
        if adapters.slots_T is not None and self.lora is not None:
            adapters.ops.lora_add(y_TY, x_TX, self.lora, adapters.slots_T, adapters.present)
        return y_TY


class SummedLinear:
    """A `Linear` over a part of the inputs, and what adapters add there; all ranks get the sum of their results."""

    __slots__ = ("_all_reduce", "_part")

    def __init__(self, context: LayerContext, part: Linear):
        self._part, self._all_reduce = part, context.parallel.tp.all_reduce

    def __call__(self, x_TX: Tensor) -> Tensor:
        return self._all_reduce(self._part(x_TX))


def column_linear(context: LayerContext, weights: Weights, outputs: Mapping[str, tuple[int, Shard]], num_inputs: int, *,
                  bias: bool = False, orders: Mapping[str, Tensor | None] = NO_ORDERS) -> Linear:
    """Take this rank's rows of `<name>.weight` (and `.bias`) of each entry of `outputs`, and stack them in order.

    outputs: name -> (rows of the whole matrix, the shard of them). Projections that read the same input (q, k, v; gate,
    up) thus become one product. orders: in which order outputs are kept, by name: of each so many, again and again.
    Raises ConfigError if rows cannot be split evenly.
    """
    kept = {name: AdaptedPart(rows=shard.even_width(rows, f"the outputs of {name}"), shape=(rows, num_inputs),
                              shard=shard, order=orders.get(name)) for name, (rows, shard) in outputs.items()}
    parts = [_in_order(weights.take_matrix(f"{name}.weight", (rows, num_inputs), shard), orders.get(name))
             for name, (rows, shard) in outputs.items()]
    biases = [in_order(weights.take(f"{name}.bias", (rows,), shard), orders.get(name))
              for name, (rows, shard) in outputs.items()] if bias else []
    return _one_rank_linear(context, kept, stack_rows(parts), torch.cat(biases) if biases else None)


def _in_order(weight_YX: Tensor | ScaledWeight, order: Tensor | None) -> Tensor | ScaledWeight:
    if isinstance(weight_YX, ScaledWeight) and order is not None:
        codes_YX = in_order(weight_YX.codes_YX.view(torch.uint8), order).view(weight_YX.codes_YX.dtype)
        return ScaledWeight(codes_YX, in_order(weight_YX.scale_YG, order), weight_YX.group)
    return weight_YX if isinstance(weight_YX, ScaledWeight) else in_order(weight_YX, order)


def row_linear(context: LayerContext, weights: Weights, name: str, num_outputs: int, num_inputs: int, *,
               bias: bool = False) -> Linear | SummedLinear:
    """Take this rank's columns of `<name>.weight`. The bias is added once, by rank 0. Where numbers are rounded to
    codes, they are the codes that one rank would have.

    Raises ConfigError if the inputs cannot be split evenly.
    """
    shard, group = context.parallel.tp_shard(1), context.parallel.tp
    shard.even_width(num_inputs, f"the inputs of {name}")
    weight_YX = weights.take_matrix(f"{name}.weight", (num_outputs, num_inputs), shard)
    bias_Y = weights.take(f"{name}.bias", (num_outputs,)) if bias else None
    part = {name: AdaptedPart(rows=num_outputs, shape=(num_outputs, num_inputs), shard=shard)}
    if group.size == 1:
        return _one_rank_linear(context, part, weight_YX, bias_Y)
    context = with_common_scale(context)
    return SummedLinear(context, _one_rank_linear(context, part, weight_YX, bias_Y if group.rank == 0 else None))


def with_common_scale(context: LayerContext) -> LayerContext:
    """The context for products whose inputs lie on several ranks: where numbers are rounded to codes, to those that one
    rank would have. So what comes before such a product has to leave its results as numbers."""
    group, ops = context.parallel.tp, context.ops
    if group.size == 1 or context.quantization is None:
        return context
    common = CommonScale(ops, group, context.quantization)
    return replace(context, ops=replace(
        ops, linear=common.linear, pack_linear=common.pack_linear, pack_experts=common.pack_experts,
        grouped_linear=common.grouped_linear, pack_gated_experts=ops.pack_experts,
        gated_grouped_linear=gated_by(ops.grouped_linear, ops.silu_mul)))


def _one_rank_linear(context: LayerContext, parts: Mapping[str, AdaptedPart],
                     weight_YX: Tensor | ScaledWeight, bias_Y: Tensor | None) -> Linear:
    """A product without collectives; it takes adapters where the context has any."""
    if context.adapters is None:
        return Linear(context, weight_YX, bias_Y)
    return AdaptedLinear(context, context.adapters, parts, weight_YX, bias_Y)
