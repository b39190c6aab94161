"""Seed-OSS: Llama with biases on q, k and v, and one on the output projection that is asked for by itself."""

from __future__ import annotations

from xllm.models.dense import DenseConfig, full_attention, read_dense
from xllm.models.dense import build as build
from xllm.models.raw_config import RawConfig

DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128,
            "attention_bias": True, "eos_token_id": 2, "bos_token_id": 0}


def read_config(raw: RawConfig, architecture: str) -> DenseConfig:
    return read_dense(raw, architecture, qkv_bias=raw.flag("attention_bias"), o_bias=raw.flag("attention_out_bias"),
                      mlp_bias=raw.flag("mlp_bias"), sliding_windows=full_attention(raw))
