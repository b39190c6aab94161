"""DeepSeek V3, V3.1, R1 and others with its architecture, such as Kimi-K2 and Moonlight."""

from __future__ import annotations

from xllm.models.deepseek import DeepseekConfig, read_deepseek
from xllm.models.deepseek import build as build
from xllm.models.deepseek_mixture import layers_from, read_v3_mixture
from xllm.models.model_config import MAX_LAYERS
from xllm.models.raw_config import RawConfig

DEFAULTS = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "eos_token_id": 1, "bos_token_id": 0, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 3,
    "rope_interleave": True, "n_shared_experts": 1, "moe_intermediate_size": 2048, "num_experts_per_tok": 8,
    "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}


def read_config(raw: RawConfig, architecture: str) -> DeepseekConfig:
    layers = layers_from(raw, raw.integer("num_hidden_layers", high=MAX_LAYERS))
    mixture = read_v3_mixture(raw, layers, num_experts=256)
    return read_deepseek(raw, architecture, interleaved=raw.flag("rope_interleave"), mixture=mixture)
