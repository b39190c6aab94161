"""The two ends of a model: `Embedding`, the table of token vectors, and `LMHead`, the product that gives logits.

Tensor-parallel ranks share the vocabulary. Where it does not divide, rows of zeros fill up the last ranks' parts.

Letters: T tokens, S rows that want logits, D hidden, V vocabulary, U the vocabulary of one rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xllm.layers.layer_context import LayerContext, Weights
from xllm.layers.linear import Linear


class Embedding:
    """ids_T -> [T, D]. `weight_UD` is kept as it is in the checkpoint, in the compute dtype."""

    __slots__ = ("_embedding", "weight_UD")

    def __init__(self, context: LayerContext, weight_UD: Tensor):
        self._embedding = context.ops.embedding
        self.weight_UD = weight_UD

    def __call__(self, ids_T: Tensor) -> Tensor:
        return self._embedding(ids_T, self.weight_UD)


class SplitEmbedding(Embedding):
    """Each rank looks up the tokens that it has; the sum over all ranks is whole."""

    __slots__ = ("_all_reduce", "_first")

    def __init__(self, context: LayerContext, weight_UD: Tensor):
        super().__init__(context, weight_UD)
        self._all_reduce = context.parallel.tp.all_reduce
        self._first = context.parallel.tp.rank * len(weight_UD)

    def __call__(self, ids_T: Tensor) -> Tensor:
        rows_T = ids_T - self._first
        mine_T = (rows_T >= 0) & (rows_T < len(self.weight_UD))
        x_TD = self._embedding(torch.where(mine_T, rows_T, 0), self.weight_UD)
        return self._all_reduce(torch.where(mine_T[:, None], x_TD, 0.0))


class LMHead:
    """hidden_SD -> logits_SV in fp32, whole on every rank."""

    __slots__ = ("_gather", "_linear", "_vocab_size")

    def __init__(self, context: LayerContext, weight_UD: Tensor, vocab_size: int):
        self._linear, self._vocab_size = Linear(context, weight_UD), vocab_size
        self._gather = context.parallel.tp.all_gather

    def __call__(self, hidden_SD: Tensor) -> Tensor:
        logits_SV = self._gather(self._linear(hidden_SD))
        if logits_SV.shape[1] != self._vocab_size:
            logits_SV = logits_SV[:, : self._vocab_size].contiguous()
        return logits_SV.float()


def take_vocabulary(context: LayerContext, weights: Weights, name: str, vocab_size: int, hidden_size: int) -> Tensor:
    """This rank's rows of `<name>.weight`: [U, D], of one size on all ranks."""
    shard = context.parallel.tp_shard(0)
    weight_UD = weights.take(f"{name}.weight", (vocab_size, hidden_size), shard)
    missing = shard.width(vocab_size) - len(weight_UD)
    return F.pad(weight_UD, (0, 0, 0, missing)) if missing else weight_UD


def make_embedding(context: LayerContext, weight_UD: Tensor) -> Embedding:
    """weight_UD: from `take_vocabulary`."""
    return Embedding(context, weight_UD) if context.parallel.tp.size == 1 else SplitEmbedding(context, weight_UD)
