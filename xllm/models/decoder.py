"""`Decoder`: a stack of layers, each an attention and an mlp behind a norm. Which ones, the family says.

Letters: T tokens in the step, S rows that want logits, D hidden, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from backends.metadata import AttentionMetadata
from xllm.errors import ModelError
from xllm.layers.attention import AttentionPlan
from xllm.layers.layer_context import LayerContext, Weights
from xllm.layers.norm import RMSNorm
from xllm.layers.vocabulary import LMHead, make_embedding, take_vocabulary
from xllm.models.causal_lm import KVCaches
from xllm.models.model_config import DecoderConfig, ModelConfig

log = logging.getLogger(__name__)

T = TypeVar("T")
TABLE, HEAD = "model.embed_tokens", "lm_head"
Factory = Callable[[int, str], T]  # of a layer's number, and the name under which its tensors are


class AttentionBlock(Protocol):
    """Mixes the tokens of each sequence; whatever it keeps of them is in `caches`, this layer's own."""

    def __call__(self, x_TD: Tensor, positions_T: Tensor, caches: tuple[Tensor, ...],
                 meta: AttentionMetadata) -> Tensor: ...


class FeedForward(Protocol):
    """Works on each token alone. May overwrite x_TD."""

    def __call__(self, x_TD: Tensor) -> Tensor: ...


class DecoderLayer:
    """One layer. It owns the norm that follows it: the next layer's input norm, or the model's last."""

    __slots__ = ("_attention", "_mlp", "_next_norm", "_post_attention_norm")

    def __init__(self, attention: AttentionBlock, post_attention_norm: RMSNorm, mlp: FeedForward, next_norm: RMSNorm):
        self._attention, self._post_attention_norm = attention, post_attention_norm
        self._mlp, self._next_norm = mlp, next_norm

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, positions_T: Tensor, caches: tuple[Tensor, ...],
                 meta: AttentionMetadata) -> Tensor:
        """x_TD: the normed residual. Adds to `residual_TD` in place and returns it normed again."""
        x_TD = self._attention(x_TD, positions_T, caches, meta)
        x_TD = self._mlp(self._post_attention_norm.add(x_TD, residual_TD))
        return self._next_norm.add(x_TD, residual_TD)


class Decoder:
    """Embedding, layers, final norm and lm_head: a `CausalLM`.

    With tied embeddings the packed lm_head is a second copy of the table: rows are looked up in the
    one, the other has the layout that the op set's `linear` wants.
    """

    def __init__(self, context: LayerContext, config: DecoderConfig, weights: Weights, *,
                 attention: Factory[AttentionBlock], mlp: Factory[FeedForward], plan: AttentionPlan):
        """attention, mlp: called once a layer, in order; they take their tensors from the same weights.
        plan: what the attention of all layers finds in `meta.plan`."""
        self.config: ModelConfig = config
        self.plan = plan
        self.kv_specs = tuple(spec.on_one_of(context.parallel.tp.size) for spec in config.kv_specs)
        size, eps, last = config.hidden_size, config.rms_norm_eps, config.num_layers - 1

        def layer(index: int) -> DecoderLayer:
            name = f"model.layers.{index}"
            following = "model.norm" if index == last else f"model.layers.{index + 1}.input_layernorm"
            return DecoderLayer(
                attention(index, f"{name}.self_attn"),
                RMSNorm(context, weights, f"{name}.post_attention_layernorm", size, eps), mlp(index, f"{name}.mlp"),
                RMSNorm(context, weights, following, size, eps))

        table_UD, head_UD = _take_ends(context, config, weights)
        self.generates = head_UD is not None
        self._embedding, self.dtype = make_embedding(context, table_UD), table_UD.dtype
        self._first_norm = RMSNorm(context, weights, "model.layers.0.input_layernorm", size, eps)
        self._layers = [layer(index) for index in range(config.num_layers)]
        # Without a head the table stands in for it, and its logits must not be used (`generates`).
        self._lm_head = LMHead(context, table_UD if head_UD is None else head_UD, config.vocab_size)

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, kv_caches: KVCaches, meta: AttentionMetadata) -> Tensor:
        residual_TD = self._embedding(input_ids_T)
        x_TD = self._first_norm(residual_TD)
        for layer, caches in zip(self._layers, kv_caches, strict=True):
            x_TD = layer(x_TD, residual_TD, positions_T, caches, meta)
        return x_TD

    def compute_logits(self, hidden_SD: Tensor) -> Tensor:
        return self._lm_head(hidden_SD)


def _take_ends(context: LayerContext, config: DecoderConfig, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """table_UD and head_UD; no head where the checkpoint is of a model that makes embeddings only.

    What the config ties is one matrix, whichever of the two the checkpoint brings; if it brings both and they differ,
    both count, as in transformers 5. Raises ModelError.
    """
    tied = config.tie_word_embeddings
    names = [name for name in (TABLE, HEAD) if weights.has(f"{name}.weight")] if tied else [TABLE]
    ends = [take_vocabulary(context, weights, name, config.vocab_size, config.hidden_size) for name in names or [TABLE]]
    if tied:
        if len(ends) == 1 or torch.equal(*ends):
            return ends[0], ends[0]
        log.warning("tie_word_embeddings is true in config.json, and the checkpoint has another %s.weight: it is used, "
                    "the embedding is not", HEAD)
        return ends[0], ends[1]
    is_absent = not weights.has(f"{HEAD}.weight")
    if is_absent and (weights.is_bare or not config.has_head):
        return ends[0], None
    try:
        return ends[0], take_vocabulary(context, weights, HEAD, config.vocab_size, config.hidden_size)
    except ModelError as error:
        if not is_absent:
            raise
        raise ModelError(f"{error} (config.json does not tie it to the embedding: tie_word_embeddings)") from None
