"""`RMSNorm`, alone and with the residual stream."""

from __future__ import annotations

from torch import Tensor

from xllm.layers.layer_context import LayerContext, Weights


class RMSNorm:
    """RMS norm over the last axis with a learned weight, whole on every rank."""

    __slots__ = ("_add_rms_norm", "_eps", "_rms_norm", "_weight_D")

    def __init__(self, context: LayerContext, weights: Weights, name: str, size: int, eps: float):
        self._rms_norm = context.ops.rms_norm
        self._add_rms_norm = context.ops.add_rms_norm
        self._eps = eps
        self._weight_D = weights.take(f"{name}.weight", (size,))

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._rms_norm(x_TD, self._weight_D, self._eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        """residual += x in place; the norm of that sum. `x_TD` must not be used afterwards."""
        return self._add_rms_norm(x_TD, residual_TD, self._weight_D, self._eps)
