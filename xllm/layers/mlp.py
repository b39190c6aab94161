"""`GatedMLP`: the feed-forward block of Llama and its descendants."""

from __future__ import annotations

from torch import Tensor

from xllm.layers.context import LayerContext
from xllm.layers.linear import load_linear


class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    __slots__ = ("_down", "_gate_up", "_silu_mul", "nbytes")

    def __init__(self, context: LayerContext, name: str, hidden_size: int, ffn_size: int, *, bias: bool):
        gate_up = {f"{name}.gate_proj": ffn_size, f"{name}.up_proj": ffn_size}
        self._gate_up = load_linear(context, gate_up, hidden_size, bias=bias)
        self._down = load_linear(context, {f"{name}.down_proj": hidden_size}, ffn_size, bias=bias)
        self._silu_mul = context.ops.silu_mul
        self.nbytes = self._gate_up.nbytes + self._down.nbytes

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._down(self._silu_mul(self._gate_up(x_TD)))
