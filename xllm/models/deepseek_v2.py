"""DeepSeek V2, V2-Lite and V2.5."""

from __future__ import annotations

from xllm.models.deepseek import DeepseekConfig, read_deepseek
from xllm.models.deepseek import build as build
from xllm.models.deepseek_mixture import layers_from, read_v2_mixture
from xllm.models.model_config import MAX_LAYERS
from xllm.models.raw_config import RawConfig

DEFAULTS = {
    "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "eos_token_id": 2, "bos_token_id": 1, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 0,
    "n_shared_experts": 2, "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0, "topk_method": "greedy",
}


def read_config(raw: RawConfig, architecture: str) -> DeepseekConfig:
    """Rotated pairs are interleaved in every checkpoint."""
    layers = layers_from(raw, raw.integer("num_hidden_layers", high=MAX_LAYERS))
    mixture = read_v2_mixture(raw, layers, num_experts=64)
    return read_deepseek(raw, architecture, interleaved=True, mixture=mixture, mlp_bias=raw.flag("mlp_bias"))
