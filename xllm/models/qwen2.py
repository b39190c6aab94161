"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and an optional window in the upper layers."""

from __future__ import annotations

from xllm.models.dense import DenseConfig, read_dense, window_per_layer
from xllm.models.dense import build as build
from xllm.models.raw_config import RawConfig

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read_config(raw: RawConfig, architecture: str) -> DenseConfig:
    """The biases are fixed, whatever `attention_bias` may say."""
    return read_dense(raw, architecture, qkv_bias=True, sliding_windows=window_per_layer(raw))
