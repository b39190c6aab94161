"""GLM-4.7-Flash: the latent attention and the experts of DeepSeek V3."""

from __future__ import annotations

from xllm.models.deepseek import DeepseekConfig, read_deepseek
from xllm.models.deepseek import build as build
from xllm.models.deepseek_mixture import layers_from, read_v3_mixture
from xllm.models.model_config import MAX_LAYERS
from xllm.models.raw_config import RawConfig

DEFAULTS = {
    "rms_norm_eps": 1e-5, "max_position_embeddings": 202752, "eos_token_id": 1, "bos_token_id": 0, "q_lora_rank": 768,
    "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "first_k_dense_replace": 1,
    "rope_interleave": True, "n_shared_experts": 1, "moe_intermediate_size": 1536, "num_experts_per_tok": 4,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.8,
}


def read_config(raw: RawConfig, architecture: str) -> DeepseekConfig:
    """Which layers have experts, `mlp_layer_types` may say one by one."""
    num_layers, kinds = raw.integer("num_hidden_layers", high=MAX_LAYERS), raw.values.get("mlp_layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != num_layers
                              or any(kind not in ("dense", "sparse") for kind in kinds)):
        raise raw.error(f"mlp_layer_types must be a list with 'dense' or 'sparse' for each of the {num_layers} layers")
    layers = layers_from(raw, num_layers) if kinds is None else tuple(kind == "sparse" for kind in kinds)
    return read_deepseek(raw, architecture, interleaved=raw.flag("rope_interleave"),
                         mixture=read_v3_mixture(raw, layers, num_experts=64))
