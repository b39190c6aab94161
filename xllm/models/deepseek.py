"""What DeepSeek V2, V3 and GLM-4.7-Flash share: latent attention, a gated mlp in the first layers, and experts in the
others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xllm.models.deepseek_mixture import deepseek_mlps
from xllm.models.dense import MAX_HEAD_DIM, check_activation
from xllm.models.draft_layers import read_num_draft_layers, skip_draft_layers
from xllm.models.kv_spec import KVSpec
from xllm.models.mixture import Mixture
from xllm.models.model_config import DecoderConfig, ModelConfig, read_common
from xllm.models.raw_config import RawConfig
from xllm.parallel.shard import Shard

if TYPE_CHECKING:
    from backends.backend import Backend
    from xllm.layers.layer_context import LayerContext, Weights
    from xllm.models.causal_lm import CausalLM

LATENT_OPS = frozenset({"latent_rope_write", "latent_attention"})


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(DecoderConfig):
    """q_rank, latent_width, rotated_dim, key_dim, value_dim, interleaved: see `xllm/layers/latent_attention.py`.
    num_draft_layers: see `draft_layers.py`."""

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
    mixture: Mixture
    num_draft_layers: int = 0

    @property
    def kv_specs(self) -> tuple[KVSpec, ...]:
        width = self.latent_width + self.rotated_dim
        return (KVSpec(num_heads=1, widths=(width,), rotated_width=self.rotated_dim),) * self.num_layers

    @property
    def experts_a_token(self) -> int:
        return self.mixture.experts_a_token

    @property
    def special_ops(self) -> frozenset[str]:
        return LATENT_OPS | self.mixture.special_ops

    @property
    def attention_varies(self) -> bool:
        return True

    @property
    def score_scale(self) -> float:
        return float((self.key_dim + self.rotated_dim) ** -0.5) * self.rope.score_factor

    def attention_bytes(self, backend: Backend, *, num_tokens: int, num_positions: int, longest: int, num_shares: int,
                        itemsize: int) -> int:
        """Queries and what they sum at the latents' width, or what is expanded instead, whichever is more."""
        from backends.latent_form import LatentWidths

        num_heads = -(-self.num_heads // num_shares)
        widths = LatentWidths(num_heads=num_heads, key=self.key_dim, rotated=self.rotated_dim, value=self.value_dim,
                              latent=self.latent_width, number_bytes=itemsize)
        expanded = backend.expanded_bytes(widths, num_positions=num_positions, longest=longest)
        return max(2 * num_tokens * num_heads * self.latent_width * itemsize, expanded)

    def check_shared(self, num_ranks: int) -> None:
        shard = Shard(0, 0, num_ranks)
        shard.even_width(self.num_heads, "the number of query heads")
        shard.even_width(self.ffn_size, "the width of the mlp")
        self.mixture.check_shared(num_ranks)


def read_deepseek(raw: RawConfig, architecture: str, *, interleaved: bool, mixture: Mixture,
                  mlp_bias: bool = False) -> DeepseekConfig:
    """The keywords are what the version decides. Raises ModelError."""
    check_activation(raw)
    common, num_heads = read_common(raw, architecture), raw.integer("num_attention_heads")
    if raw.values.get("sliding_window") is not None:
        raise raw.error("sliding_window is not built for latent attention")
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
        mixture=mixture,
        num_draft_layers=read_num_draft_layers(raw))


def build(context: LayerContext, config: ModelConfig, weights: Weights) -> CausalLM:
    """`Family.build` of them."""
    from xllm.layers.latent_attention import LatentAttention, LatentShape
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

    mlp = deepseek_mlps(context, weights, config.mixture, hidden_size=config.hidden_size, ffn_size=config.ffn_size,
                        bias=config.mlp_bias)
    model = Decoder(context, config, weights, attention=attention, mlp=mlp, plan=lambda meta: None)
    skip_draft_layers(weights, config.num_layers, config.num_draft_layers)
    return model
