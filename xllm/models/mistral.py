"""Mistral: Llama without biases, and with one sliding window for all layers in its first version."""

from __future__ import annotations

from typing import Any

from xllm.models.config import MAX_LAYERS, RawConfig

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,  # absent means 4096; later versions say null
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def read_traits(raw: RawConfig) -> dict[str, Any]:
    """The window is every layer's; `layer_types` plays no part."""
    window = raw.optional_integer("sliding_window")
    return {"sliding_windows": (window,) * raw.integer("num_hidden_layers", high=MAX_LAYERS)}
