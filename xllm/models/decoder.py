"""`Decoder`: the transformer that Llama, Mistral, Qwen2 and Qwen3 share, and the `CausalLM` face of any model.

Letters: T tokens in the step, S rows that want logits, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from backends.metadata import AttentionMetadata
from xllm.layers.attention import Attention, AttentionShape
from xllm.layers.context import LayerContext
from xllm.layers.embedding import Embedding
from xllm.layers.linear import Linear, load_linear
from xllm.layers.mlp import GatedMLP
from xllm.layers.norm import RMSNorm
from xllm.models.config import ModelConfig

KVCaches = Iterable[tuple[Tensor, Tensor]]  # (k_cache, v_cache) of each layer, in order


class CausalLM(Protocol):
    """What the runner calls, inside `torch.inference_mode`. `nbytes`: memory of weights and tables."""

    config: ModelConfig
    nbytes: int

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, kv_caches: KVCaches, meta: AttentionMetadata) -> Tensor:
        """hidden_TD after the final norm. Writes the step's keys and values into `kv_caches`.

        positions_T: int32, below the `max_model_len` that the model was loaded with.
        `meta.plan` is filled already.
        """
        ...

    def compute_logits(self, hidden_SD: Tensor) -> Tensor:
        """logits_SV in fp32, of the rows that the caller picked from `forward`'s result."""
        ...


class DecoderLayer:
    """One layer. It owns the norm that follows it: the next layer's input norm, or the model's last."""

    __slots__ = ("_attention", "_mlp", "_next_norm", "_post_attention_norm", "nbytes")

    def __init__(self, context: LayerContext, config: ModelConfig, index: int, cos_sin_LH: Tensor):
        name, eps = f"model.layers.{index}", config.rms_norm_eps
        shape = AttentionShape(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
            qk_norm_eps=eps if config.qk_norm else None,
            sliding_window=config.sliding_windows[index],
        )
        last = index == config.num_layers - 1
        next_norm = "model.norm" if last else f"model.layers.{index + 1}.input_layernorm"
        self._attention = Attention(context, f"{name}.self_attn", shape, cos_sin_LH)
        self._post_attention_norm = RMSNorm(context, f"{name}.post_attention_layernorm", config.hidden_size, eps)
        self._mlp = GatedMLP(context, f"{name}.mlp", config.hidden_size, config.ffn_size, bias=config.mlp_bias)
        self._next_norm = RMSNorm(context, next_norm, config.hidden_size, eps)
        norms = self._post_attention_norm.nbytes + self._next_norm.nbytes
        self.nbytes = self._attention.nbytes + self._mlp.nbytes + norms

    def __call__(self, x_TD: Tensor, residual_TD: Tensor, positions_T: Tensor, k_cache: Tensor, v_cache: Tensor,
                 meta: AttentionMetadata) -> Tensor:
        """x_TD: the normed residual. Adds to `residual_TD` in place and returns it normed again."""
        x_TD = self._attention(x_TD, positions_T, k_cache, v_cache, meta)
        x_TD = self._mlp(self._post_attention_norm.add(x_TD, residual_TD))
        return self._next_norm.add(x_TD, residual_TD)


class Decoder:
    """Embedding, layers, final norm and lm_head: a `CausalLM`.

    With tied embeddings the packed lm_head is a second copy of the table: rows are looked up in the
    one, the other has the layout that the op set's `linear` wants.
    """

    def __init__(self, context: LayerContext, config: ModelConfig, cos_sin_LH: Tensor):
        self.config = config
        self._embedding = Embedding(context, "model.embed_tokens", config.vocab_size, config.hidden_size)
        self._first_norm = RMSNorm(context, "model.layers.0.input_layernorm", config.hidden_size, config.rms_norm_eps)
        self._layers = [DecoderLayer(context, config, index, cos_sin_LH) for index in range(config.num_layers)]
        if config.tie_word_embeddings:
            self._lm_head = Linear(context, self._embedding.weight_VD)
        else:
            self._lm_head = load_linear(context, {"lm_head": config.vocab_size}, config.hidden_size)
        ends = self._embedding.nbytes + self._first_norm.nbytes + self._lm_head.nbytes
        self.nbytes = cos_sin_LH.nbytes + ends + sum(layer.nbytes for layer in self._layers)

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, kv_caches: KVCaches, meta: AttentionMetadata) -> Tensor:
        residual_TD = self._embedding(input_ids_T)
        x_TD = self._first_norm(residual_TD)
        for layer, (k_cache, v_cache) in zip(self._layers, kv_caches, strict=True):
            x_TD = layer(x_TD, residual_TD, positions_T, k_cache, v_cache, meta)
        return x_TD

    def compute_logits(self, hidden_SD: Tensor) -> Tensor:
        return self._lm_head(hidden_SD).float()
