"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and an optional window in the upper layers."""

from __future__ import annotations

from typing import Any

from xllm.models.config import RawConfig, window_per_layer

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read_traits(raw: RawConfig) -> dict[str, Any]:
    """The biases are fixed, whatever `attention_bias` may say."""
    return {"qkv_bias": True, "sliding_windows": window_per_layer(raw)}
