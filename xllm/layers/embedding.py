"""`Embedding`: the table of token vectors."""

from __future__ import annotations

from torch import Tensor

from xllm.layers.context import LayerContext


class Embedding:
    """ids_T -> [T, D]. `weight_VD` is kept as it is in the checkpoint, in the compute dtype."""

    __slots__ = ("_embedding", "weight_VD")

    def __init__(self, context: LayerContext, name: str, vocab_size: int, hidden_size: int):
        self._embedding = context.ops.embedding
        self.weight_VD = context.weights.take(f"{name}.weight", (vocab_size, hidden_size))

    def __call__(self, ids_T: Tensor) -> Tensor:
        return self._embedding(ids_T, self.weight_VD)

    @property
    def nbytes(self) -> int:
        return self.weight_VD.nbytes
