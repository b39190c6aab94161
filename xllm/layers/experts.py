"""`Experts`: a mixture of experts (Shazeer et al. 2017), each a gated mlp, and what a router chooses of them.

Letters: T tokens, E experts, K experts a token, D hidden, F ffn, R = T * K rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backends.expert_choice import RouteRule
from backends.scaled_weight import ScaledWeight, stack_rows
from xllm.errors import ConfigError, ModelError
from xllm.layers.layer_context import LayerContext, Weights
from xllm.layers.linear import Linear, column_linear, with_common_scale
from xllm.layers.mlp import GatedMLP
from xllm.parallel.shard import Shard

# Rows that are computed at a time: what is between the products takes memory for each of them. Chosen: an expert of 128
# still gets 64 rows on average, enough to make its weights worth reading.
MAX_ROWS = 8192
WHOLE, ALWAYS = Shard(0, 0, 1), RouteRule(num_chosen=1, sigmoid=True)


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """ffn_size: of each expert. parts: what a checkpoint of experts that stand apart calls their gate, up and down.
    has_bias: whether the choice is corrected by `<name>.gate.e_score_correction_bias`. scores_in_fp32: whatever the
    compute dtype.
    """

    hidden_size: int
    ffn_size: int
    num_experts: int
    rule: RouteRule
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    has_bias: bool = False
    scores_in_fp32: bool = False


class Experts:
    """The sum of down_e(silu(gate_e(x)) * up_e(x)) over a token's experts e, by their weights, and the shared expert.

    Ranks share the inner axis of every expert; the router is the same on all. Adapters change the shared expert alone.
    """

    __slots__ = ("_all_reduce", "_bias_E", "_combine", "_down", "_down_linear", "_ffn_size", "_gate_up",
                 "_gated_linear", "_max_tokens", "_room", "_route", "_router", "_router_dtype", "_rule", "_shared")

    def __init__(self, context: LayerContext, weights: Weights, name: str, shape: ExpertShape,
                 shared: GatedMLP | SharedExpert | None = None):
        ops, own = context.ops, with_common_scale(context).ops
        width = context.parallel.tp_shard(0).even_width(shape.ffn_size, f"the width of the experts of {name}")
        self._router_dtype = torch.float32 if shape.scores_in_fp32 else None
        router_ED = weights.take(f"{name}.gate.weight", (shape.num_experts, shape.hidden_size),
                                 dtype=self._router_dtype)
        self._router = Linear(replace(context, quantization=None), router_ED)
        self._bias_E = None
        if shape.has_bias:
            # Never rounded: a choice turns on less than the compute dtype can tell apart.
            self._bias_E = weights.take(f"{name}.gate.e_score_correction_bias", (shape.num_experts,),
                                        dtype=torch.float32)
            if not bool(self._bias_E.isfinite().all()):  # it steers the choice alone: no logit would show it
                raise ModelError(f"tensor '{name}.gate.e_score_correction_bias' holds numbers that are not finite")
        gate_up = _of_one_form(_gate_up_weights(weights, name, shape, context.parallel.tp_shard(0)), name)
        down = _of_one_form(_down_weights(weights, name, shape, context.parallel.tp_shard(1)), name)
        try:
            self._gate_up = own.pack_gated_experts(gate_up, quantization=context.quantization)
            self._down = own.pack_experts(down, quantization=context.quantization)
        except ModelError:
            raise
        except ValueError as error:
            raise ConfigError(f"quantization {context.quantization!r}: {error}") from None
        self._rule, self._max_tokens = shape.rule, max(1, MAX_ROWS // shape.rule.num_chosen)
        self._route, self._combine = ops.route, ops.combine
        self._gated_linear, self._down_linear = own.gated_grouped_linear, own.grouped_linear
        self._all_reduce, self._shared = context.parallel.tp.all_reduce, shared
        self._room: Callable[..., Tensor | None] = _no_room if context.workspace is None else context.workspace.take
        self._ffn_size = width

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Overwrites x_TD where it has more tokens than are computed at a time."""
        if len(x_TD) <= self._max_tokens:
            return self._compute(x_TD)
        for part_TD in x_TD.split(self._max_tokens):
            part_TD.copy_(self._compute(part_TD, self._room("sum", *part_TD.shape, x_TD.dtype)))
        return x_TD

    def _compute(self, x_TD: Tensor, out_TD: Tensor | None = None) -> Tensor:
        """out_TD: for the result, apart from x_TD."""
        (num_tokens, hidden_size), dtype = x_TD.shape, x_TD.dtype
        num_rows = num_tokens * self._rule.num_chosen
        choice = self._route(self._router(x_TD.to(self._router_dtype or dtype)), self._rule, self._bias_E)
        inner = self._gated_linear(x_TD, self._gate_up, choice,
                                   room=self._room("product", num_rows, 2 * self._ffn_size, dtype),
                                   out=self._room("inner", num_rows, self._ffn_size, dtype))
        y_RD = self._down_linear(inner, self._down, choice, from_tokens=False,
                                 out=self._room("product", num_rows, hidden_size, dtype))  # which is free again
        out_TD = self._all_reduce(self._combine(y_RD, choice, out=out_TD))
        return out_TD if self._shared is None else out_TD.add_(self._shared(x_TD))


class SharedExpert:
    """sigmoid(gate(x)) * mlp(x): what every token has beside the experts of its own (Qwen2-MoE)."""

    __slots__ = ("_gate", "_mlp", "_route")

    def __init__(self, context: LayerContext, weights: Weights, name: str, hidden_size: int, ffn_size: int, *,
                 gate: str):
        """gate: the name of its matrix, of one row, which is not quantised and the same on all ranks."""
        self._route = context.ops.route  # torch's sigmoid depends on where in the batch a number stands
        self._mlp = GatedMLP(context, weights, name, hidden_size, ffn_size, bias=False)
        self._gate = column_linear(replace(context, quantization=None), weights, {gate: (1, WHOLE)}, hidden_size)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._mlp(x_TD).mul_(self._route(self._gate(x_TD), ALWAYS).weights_TK)


def _no_room(*_: Any) -> None:
    """As `Workspace.take`: operators take memory of their own."""


def _gate_up_weights(weights: Weights, name: str, shape: ExpertShape, shard: Shard) -> Iterator[Tensor | ScaledWeight]:
    """This rank's [2F, D] of each expert: gate, then up."""
    stacked, size, width = f"{name}.experts.gate_up_proj", (shape.ffn_size, shape.hidden_size), shape.ffn_size
    if weights.has(stacked):
        first, end = shard.bounds(width)
        yield from weights.take_experts(stacked, (shape.num_experts, 2 * width, shape.hidden_size), [
            (slice(first, end), slice(0, shape.hidden_size)),
            (slice(width + first, width + end), slice(0, shape.hidden_size))])
        return
    gate, up, _ = shape.parts
    for expert in range(shape.num_experts):
        yield stack_rows([weights.take_matrix(f"{name}.experts.{expert}.{part}.weight", size, shard)
                          for part in (gate, up)])


def _down_weights(weights: Weights, name: str, shape: ExpertShape, shard: Shard) -> Iterator[Tensor | ScaledWeight]:
    """This rank's [D, F] of each expert."""
    stacked, size = f"{name}.experts.down_proj", (shape.hidden_size, shape.ffn_size)
    if weights.has(stacked):
        part = slice(0, shape.hidden_size), slice(*shard.bounds(shape.ffn_size))
        yield from weights.take_experts(stacked, (shape.num_experts, *size), [part])
        return
    for expert in range(shape.num_experts):
        yield weights.take_matrix(f"{name}.experts.{expert}.{shape.parts[2]}.weight", size, shard)


def _of_one_form(experts: Iterator[Tensor | ScaledWeight], name: str) -> Iterator[Tensor | ScaledWeight]:
    """The same. Raises ModelError if some are plain and others fp8."""
    form = None
    for expert, weight in enumerate(experts):
        if form not in (None, type(weight)):
            raise ModelError(f"{name}.experts: expert {expert} is {'plain' if type(weight) is Tensor else 'fp8'}, "
                             "unlike those before it")
        form = type(weight)
        yield weight
