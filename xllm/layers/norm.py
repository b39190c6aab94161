"""`RMSNorm`, alone and with the residual stream."""

from __future__ import annotations

from torch import Tensor

from xllm.layers.context import LayerContext


class RMSNorm:
    """RMS norm over the last axis with a learned weight."""

    __slots__ = ("_add_rms_norm", "_eps", "_rms_norm", "weight_D")

    def __init__(self, context: LayerContext, name: str, size: int, eps: float):
        self._rms_norm = context.ops.rms_norm
        self._add_rms_norm = context.ops.add_rms_norm
        self._eps = eps
        self.weight_D = context.weights.take(f"{name}.weight", (size,))

    def __call__(self, x_TD: Tensor) -> Tensor:
        return self._rms_norm(x_TD, self.weight_D, self._eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        """residual += x in place; the norm of that sum. `x_TD` must not be used afterwards."""
        return self._add_rms_norm(x_TD, residual_TD, self.weight_D, self._eps)

    @property
    def nbytes(self) -> int:
        return self.weight_D.nbytes
