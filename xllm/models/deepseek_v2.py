"""DeepSeek V2 and V2-Lite, as far as their layers have no experts."""

from __future__ import annotations

from xllm.models.deepseek import DeepseekConfig, read_deepseek
from xllm.models.deepseek import build as build
from xllm.models.raw_config import RawConfig

DEFAULTS = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "eos_token_id": 2, "bos_token_id": 1, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 0,
}


def read_config(raw: RawConfig, architecture: str) -> DeepseekConfig:
    """Rotated pairs are interleaved in every checkpoint."""
    return read_deepseek(raw, architecture, interleaved=True, mlp_bias=raw.flag("mlp_bias"))
