"""Qwen3: Qwen2 with a norm on each query and key head instead of the biases."""

from __future__ import annotations

from xllm.models.dense import DenseConfig, read_dense, window_per_layer
from xllm.models.dense import build as build
from xllm.models.raw_config import RawConfig

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read_config(raw: RawConfig, architecture: str) -> DenseConfig:
    """`attention_bias` covers all four projections, as in Llama."""
    attention_bias = raw.flag("attention_bias")
    return read_dense(raw, architecture, qkv_bias=attention_bias, o_bias=attention_bias, qk_norm=True,
                      sliding_windows=window_per_layer(raw))
