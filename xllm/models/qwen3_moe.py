"""Qwen3-MoE: Qwen3 with experts."""

from __future__ import annotations

from xllm.models.dense import read_dense
from xllm.models.mixture import Mixture, MixtureConfig, every_nth_layer, read_number_of_experts, with_mixture
from xllm.models.mixture import build as build
from xllm.models.model_config import MAX_LAYERS
from xllm.models.raw_config import RawConfig

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
}


def read_config(raw: RawConfig, architecture: str) -> MixtureConfig:
    """A window is every layer's; `max_window_layers` plays no part."""
    attention_bias = raw.flag("attention_bias")
    window = raw.optional_integer("sliding_window") if raw.flag("use_sliding_window") else None
    dense = read_dense(raw, architecture, qkv_bias=attention_bias, o_bias=attention_bias, qk_norm=True,
                       sliding_windows=(window,) * raw.integer("num_hidden_layers", high=MAX_LAYERS))
    num_experts, num_chosen = read_number_of_experts(raw, 128)
    return with_mixture(dense, Mixture(
        layers=every_nth_layer(raw, dense.num_layers), num_experts=num_experts, num_chosen=num_chosen,
        renormalise=raw.flag("norm_topk_prob"), expert_size=raw.integer("moe_intermediate_size")))
