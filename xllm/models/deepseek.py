"""What DeepSeek V2 and V3 share: latent attention, and a gated mlp in the first layers. Mixtures of experts, in the
other layers, are not built."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xllm.models.dense import MAX_HEAD_DIM, check_activation
from xllm.models.kv_spec import KVSpec
from xllm.models.model_config import MAX_LAYERS, DecoderConfig, ModelConfig, read_common
from xllm.models.raw_config import RawConfig
from xllm.parallel.shard import Shard

if TYPE_CHECKING:
    from xllm.layers.layer_context import LayerContext, Weights
    from xllm.models.causal_lm import CausalLM
    from xllm.models.decoder import FeedForward

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(DecoderConfig):
    """q_rank, latent_width, rotated_dim, key_dim, value_dim, interleaved: see `xllm/layers/latent_attention.py`.
    num_draft_layers: layers behind the last that predict further tokens, which are not used."""

    num_heads: int
    q_rank: int | None
    latent_width: int
    rotated_dim: int
    key_dim: int
    value_dim: int
    interleaved: bool
    attention_bias: bool
    mlp_bias: bool
    ffn_size: int
    num_draft_layers: int = 0

    @property
    def kv_specs(self) -> tuple[KVSpec, ...]:
        width = self.latent_width + self.rotated_dim
        return (KVSpec(num_heads=1, widths=(width,), rotated_width=self.rotated_dim),) * self.num_layers

    @property
    def special_ops(self) -> frozenset[str]:
        return frozenset({"latent_rope_write", "latent_attention"})

    @property
    def score_scale(self) -> float:
        return float((self.key_dim + self.rotated_dim) ** -0.5) * self.rope.score_factor

    def check_shared(self, num_ranks: int) -> None:
        shard = Shard(0, 0, num_ranks)
        shard.even_width(self.num_heads, "the number of query heads")
        shard.even_width(self.ffn_size, "the width of the mlp")


def read_deepseek(raw: RawConfig, architecture: str, *, interleaved: bool, mlp_bias: bool = False) -> DeepseekConfig:
    """Raises ModelError, also for layers that are mixtures of experts."""
    check_activation(raw)
    common = read_common(raw, architecture)
    num_layers, num_heads = common["num_layers"], raw.integer("num_attention_heads")
    num_dense = raw.whole("first_k_dense_replace")
    if num_dense < num_layers:
        raise raw.error(f"mixtures of experts are not built yet: of {num_layers} layers only the first {num_dense} "
                        "have none (first_k_dense_replace)")
    if (raw.optional_integer("num_key_value_heads") or num_heads) != num_heads:
        raise raw.error(f"num_key_value_heads ({raw.values['num_key_value_heads']}) is not num_attention_heads "
                        f"({num_heads}): latent attention makes keys and values for each head")
    rotated_dim = raw.integer("qk_rope_head_dim", high=MAX_HEAD_DIM)
    if rotated_dim % 2:
        raise raw.error(f"qk_rope_head_dim must be even, got {rotated_dim}")
    return DeepseekConfig(
        **common, num_heads=num_heads, q_rank=raw.optional_integer("q_lora_rank"),
        latent_width=raw.integer("kv_lora_rank"), rotated_dim=rotated_dim,
        key_dim=raw.integer("qk_nope_head_dim", high=MAX_HEAD_DIM),
        value_dim=raw.integer("v_head_dim", high=MAX_HEAD_DIM), interleaved=interleaved,
        attention_bias=raw.flag("attention_bias"), mlp_bias=mlp_bias, ffn_size=raw.integer("intermediate_size"),
        num_draft_layers=raw.whole("num_nextn_predict_layers", high=MAX_LAYERS)
        or raw.whole("num_mtp_layers", high=MAX_LAYERS))  # transformers' own name


def build(context: LayerContext, config: ModelConfig, weights: Weights) -> CausalLM:
    """`Family.build` of both."""
    from xllm.layers.latent_attention import LatentAttention, LatentShape
    from xllm.layers.mlp import GatedMLP
    from xllm.layers.rotary import rope_table
    from xllm.models.decoder import Decoder

    assert isinstance(config, DeepseekConfig)
    shape = LatentShape(
        hidden_size=config.hidden_size, num_heads=config.num_heads, q_rank=config.q_rank,
        latent_width=config.latent_width, rotated_dim=config.rotated_dim, key_dim=config.key_dim,
        value_dim=config.value_dim, bias=config.attention_bias, interleaved=config.interleaved,
        scale=config.score_scale)
    cos_sin_XR = rope_table(config.rope, config.rotated_dim, context.max_model_len, context.device)

    def attention(index: int, name: str) -> LatentAttention:
        return LatentAttention(context, weights, name, shape, cos_sin_XR)

    def mlp(index: int, name: str) -> FeedForward:
        return GatedMLP(context, weights, name, config.hidden_size, config.ffn_size, bias=config.mlp_bias)

    model = Decoder(context, config, weights, attention=attention, mlp=mlp, plan=lambda meta: None)
    _skip_draft_layers(config, weights)
    return model


def _skip_draft_layers(config: DeepseekConfig, weights: Weights) -> None:
    behind = range(config.num_layers, config.num_layers + config.num_draft_layers)
    if sum(weights.skip(f"model.layers.{index}.") for index in behind):
        log.warning("the checkpoint's layers for multi-token prediction (%d, from number %d on) are not used",
                    config.num_draft_layers, config.num_layers)
