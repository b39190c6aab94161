"""Qwen3: Qwen2 with a norm on each query and key head instead of the biases."""

from __future__ import annotations

from typing import Any

from xllm.models.config import RawConfig, window_per_layer

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read_traits(raw: RawConfig) -> dict[str, Any]:
    """`attention_bias` covers all four projections, as in Llama."""
    attention_bias = raw.flag("attention_bias")
    return {
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "qk_norm": True,
        "sliding_windows": window_per_layer(raw),
    }
