"""GLM-4.5, 4.6 and 4.7: grouped-query attention whose heads are rotated in part, and the experts of DeepSeek V3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xllm.models.deepseek_mixture import deepseek_mlps, layers_from, read_v3_mixture
from xllm.models.dense import build_with, full_attention, read_dense
from xllm.models.draft_layers import read_num_draft_layers, skip_draft_layers
from xllm.models.mixture import MixtureConfig, mixture_fields
from xllm.models.model_config import ModelConfig
from xllm.models.raw_config import RawConfig

if TYPE_CHECKING:
    from xllm.layers.layer_context import LayerContext, Weights
    from xllm.models.causal_lm import CausalLM

DEFAULTS = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8, "partial_rotary_factor": 0.5,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "moe_intermediate_size": 1408, "num_experts_per_tok": 8,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class Glm4MoeConfig(MixtureConfig):
    """num_draft_layers: see `draft_layers.py`."""

    num_draft_layers: int


def read_config(raw: RawConfig, architecture: str) -> Glm4MoeConfig:
    dense = read_dense(raw, architecture, qkv_bias=raw.flag("attention_bias"), qk_norm=raw.flag("use_qk_norm"),
                       sliding_windows=full_attention(raw), rotates_parts=True)
    mixture = read_v3_mixture(raw, layers_from(raw, dense.num_layers), num_experts=128)
    return Glm4MoeConfig(**mixture_fields(dense, mixture), num_draft_layers=read_num_draft_layers(raw))


def build(context: LayerContext, config: ModelConfig, weights: Weights) -> CausalLM:
    assert isinstance(config, Glm4MoeConfig)
    model = build_with(context, config, weights, deepseek_mlps(
        context, weights, config.mixture, hidden_size=config.hidden_size, ffn_size=config.ffn_size, bias=False))
    skip_draft_layers(weights, config.num_layers, config.num_draft_layers)
    return model
