"""DeepSeek V3, R1 and those with its architecture, as far as their layers have no experts."""

from __future__ import annotations

from xllm.models.deepseek import DeepseekConfig, read_deepseek
from xllm.models.deepseek import build as build
from xllm.models.raw_config import RawConfig

DEFAULTS = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "eos_token_id": 1, "bos_token_id": 0, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 3,
    "rope_interleave": True,
}


def read_config(raw: RawConfig, architecture: str) -> DeepseekConfig:
    return read_deepseek(raw, architecture, interleaved=raw.flag("rope_interleave"))
