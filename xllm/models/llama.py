"""Llama 2 and 3, and the many checkpoints that call themselves Llama."""

from __future__ import annotations

from typing import Any

from xllm.models.config import MAX_LAYERS, RawConfig

DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "eos_token_id": 2, "bos_token_id": 1}


def read_traits(raw: RawConfig) -> dict[str, Any]:
    """`attention_bias` covers all four projections; attention is always full."""
    attention_bias = raw.flag("attention_bias")
    return {
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": raw.flag("mlp_bias"),
        "sliding_windows": (None,) * raw.integer("num_hidden_layers", high=MAX_LAYERS),
    }
