"""Llama 2 and 3, and the many checkpoints that call themselves Llama."""

from __future__ import annotations

from xllm.models.dense import DenseConfig, full_attention, read_dense
from xllm.models.dense import build as build
from xllm.models.raw_config import RawConfig

DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "eos_token_id": 2, "bos_token_id": 1}


def read_config(raw: RawConfig, architecture: str) -> DenseConfig:
    """`attention_bias` covers all four projections; attention is always full."""
    attention_bias = raw.flag("attention_bias")
    return read_dense(raw, architecture, qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=raw.flag("mlp_bias"),
                      sliding_windows=full_attention(raw))
