"""`GatedMLP`: the feed-forward block of Llama and its descendants."""

from __future__ import annotations

from torch import Tensor

from xllm.layers.layer_context import LayerContext, Weights
from xllm.layers.linear import column_linear, row_linear


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up in one product. Ranks share the inner axis."""

    __slots__ = ("_down", "_gate_up", "_silu_mul")

    def __init__(self, context: LayerContext, weights: Weights, name: str, hidden_size: int, ffn_size: int, *,
                 bias: bool):
        inner = ffn_size, context.parallel.tp_shard(0)
        gate_up = {f"{name}.gate_proj": inner, f"{name}.up_proj": inner}
        self._gate_up = column_linear(context, weights, gate_up, hidden_size, bias=bias)
        self._down = row_linear(context, weights, f"{name}.down_proj", hidden_size, ffn_size, bias=bias)
        self._silu_mul = context.ops.silu_mul

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._down(self._silu_mul(self._gate_up(x_TD)))
