"""`Decoder`: a stack of layers, each an attention and an mlp behind a norm. Which ones, the family says.

Letters: T tokens in the step, S rows that want logits, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

from backends.metadata import AttentionMetadata
from xllm.layers.attention import AttentionPlan
from xllm.layers.context import LayerContext, Weights
from xllm.layers.norm import RMSNorm
from xllm.layers.vocabulary import LMHead, make_embedding, take_vocabulary
from xllm.models.causal_lm import KVCaches
from xllm.models.config import DecoderConfig, ModelConfig

T = TypeVar("T")
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

        table_UD = take_vocabulary(context, weights, "model.embed_tokens", config.vocab_size, size)
        self._embedding, self.dtype = make_embedding(context, table_UD), table_UD.dtype
        self._first_norm = RMSNorm(context, weights, "model.layers.0.input_layernorm", size, eps)
        self._layers = [layer(index) for index in range(config.num_layers)]
        if config.tie_word_embeddings:
            weights.skip("lm_head.weight")  # some checkpoints have it a second time
        else:
            table_UD = take_vocabulary(context, weights, "lm_head", config.vocab_size, size)
        self._lm_head = LMHead(context, table_UD, config.vocab_size)

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, kv_caches: KVCaches, meta: AttentionMetadata) -> Tensor:
        residual_TD = self._embedding(input_ids_T)
        x_TD = self._first_norm(residual_TD)
        for layer, caches in zip(self._layers, kv_caches, strict=True):
            x_TD = layer(x_TD, residual_TD, positions_T, caches, meta)
        return x_TD

    def compute_logits(self, hidden_SD: Tensor) -> Tensor:
        return self._lm_head(hidden_SD)
