"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, and one beside them that every token has."""

from __future__ import annotations

from xllm.models.dense import read_dense, window_per_layer
from xllm.models.mixture import Mixture, MixtureConfig, every_nth_layer, read_number_of_experts, with_mixture
from xllm.models.mixture import build as build
from xllm.models.raw_config import RawConfig

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 16,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "qkv_bias": True,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "decoder_sparse_step": 1,
}


def read_config(raw: RawConfig, architecture: str) -> MixtureConfig:
    """Where windows are used and `layer_types` is absent, every other layer below `max_window_layers` has one."""
    windows = window_per_layer(raw, lambda layer, first: layer % 2 == 0 and layer < first)
    dense = read_dense(raw, architecture, qkv_bias=raw.flag("qkv_bias"), sliding_windows=windows)
    num_experts, num_chosen = read_number_of_experts(raw, 60)
    return with_mixture(dense, Mixture(
        layers=every_nth_layer(raw, dense.num_layers), num_experts=num_experts, num_chosen=num_chosen,
        renormalise=raw.flag("norm_topk_prob"), expert_size=raw.integer("moe_intermediate_size"),
        shared_size=raw.integer("shared_expert_intermediate_size")))
