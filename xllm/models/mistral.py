"""Mistral: Llama without biases, and with one sliding window for all layers in its first version."""

from __future__ import annotations

from xllm.models.dense import DenseConfig, read_dense
from xllm.models.dense import build as build
from xllm.models.model_config import MAX_LAYERS
from xllm.models.raw_config import RawConfig

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,  # absent means 4096; later versions say null
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def read_config(raw: RawConfig, architecture: str) -> DenseConfig:
    """The window is every layer's; `layer_types` plays no part."""
    window = raw.optional_integer("sliding_window")
    windows = (window,) * raw.integer("num_hidden_layers", high=MAX_LAYERS)
    return read_dense(raw, architecture, sliding_windows=windows)
