"""The configs of released mixtures of experts, in the words they were released with; those of quantised checkpoints
without their `quantization_config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.backend import Backend
from xllm.errors import ModelError
from xllm.models.mixture import Mixture
from xllm.models.model_registry import read_model_config
from xllm.runner.kv_cache import block_bytes

from .test_deepseek import V2_LITE

DEEPSEEK_V2 = {
    **V2_LITE, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_group": 3, "topk_method": "group_limited_greedy",
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2 = {
    **DEEPSEEK_V3, "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
    "max_position_embeddings": 131072, "model_type": "kimi_k2", "n_group": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0,
    "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "seq_aux": True, "topk_group": 1, "vocab_size": 163840,
}
GLM_4_5_AIR = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 131072,
    "model_type": "glm4_moe", "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8,
    "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "pad_token_id": 151329,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1, "torch_dtype": "bfloat16",
    "use_cache": True, "use_qk_norm": False, "vocab_size": 151552,
}
GLM_4_5 = {
    **GLM_4_5_AIR, "first_k_dense_replace": 3, "hidden_size": 5120, "intermediate_size": 12288,
    "moe_intermediate_size": 1536, "n_routed_experts": 160, "num_hidden_layers": 92, "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip


def first_dense(num_dense: int, num_layers: int) -> tuple[bool, ...]:
    return (False,) * num_dense + (True,) * (num_layers - num_dense)


FP32 = {"scores_in_fp32": True}
SIGMOID = {**FP32, "sigmoid": True, "is_corrected": True, "renormalise": True, "summed_per_group": 2, "num_chosen": 8}
# The longest sequence, bytes of KV a token in bf16, and of one of so many ranks: latents are on each of them.
RELEASED: dict[str, tuple[dict[str, Any], Mixture, int, int, tuple[int, int]]] = {
    "DeepSeek-V2-Lite": (V2_LITE, Mixture(layers=first_dense(1, 27), num_experts=64, num_chosen=6, expert_size=1408,
                                          shared_size=2816, **FP32), 163840, 31104, (4, 31104)),
    "DeepSeek-V2": (DEEPSEEK_V2, Mixture(
        layers=first_dense(1, 60), num_experts=160, num_chosen=6, expert_size=1536, shared_size=3072, num_groups=8,
        num_kept_groups=3, scale=16.0, **FP32), 163840, 69120, (8, 69120)),
    "DeepSeek-V3": (DEEPSEEK_V3, Mixture(
        layers=first_dense(3, 61), num_experts=256, expert_size=2048, shared_size=2048, num_groups=8, num_kept_groups=4,
        scale=2.5, **SIGMOID), 163840, 70272, (8, 70272)),
    "Kimi-K2": (KIMI_K2, Mixture(layers=first_dense(1, 61), num_experts=384, expert_size=2048, shared_size=2048,
                                 scale=2.827, **SIGMOID), 131072, 70272, (16, 70272)),
    "GLM-4.5": (GLM_4_5, Mixture(layers=first_dense(3, 92), num_experts=160, expert_size=1536, shared_size=1536,
                                 scale=2.5, **SIGMOID), 131072, 376832, (8, 47104)),
    "GLM-4.5-Air": (GLM_4_5_AIR, Mixture(layers=first_dense(1, 46), num_experts=128, expert_size=1408, shared_size=1408,
                                         **SIGMOID), 131072, 188416, (16, 23552)),
    "Qwen3-30B-A3B": (QWEN3_30B_A3B, Mixture(layers=(True,) * 48, num_experts=128, num_chosen=8, expert_size=768,
                                             renormalise=True), 40960, 98304, (8, 24576)),
    "Mixtral-8x7B": (MIXTRAL_8X7B, Mixture(layers=(True,) * 32, num_experts=8, num_chosen=2, expert_size=14336,
                                           renormalise=True), 32768, 131072, (2, 65536)),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config(tmp_path: Path, backend: Backend, name: str) -> None:
    values, mixture, max_model_len, token_bytes, (num_ranks, rank_bytes) = RELEASED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config: Any = read_model_config(tmp_path)
    assert (config.mixture, config.max_model_len) == (mixture, max_model_len)
    config.check_shared(num_ranks)
    shared = [spec.on_one_of(num_ranks) for spec in config.kv_specs]
    assert [block_bytes(backend, specs, 16, torch.bfloat16) / 16 for specs in (config.kv_specs, shared)] == [
        token_bytes, rank_bytes]


def test_what_is_special_about_them(tmp_path: Path) -> None:
    configs: dict[str, Any] = {}
    for name, (values, *_) in RELEASED.items():
        (tmp_path / "config.json").write_text(json.dumps(values))
        configs[name] = read_model_config(tmp_path)
    glm, air, kimi = configs["GLM-4.5"], configs["GLM-4.5-Air"], configs["Kimi-K2"]
    assert (glm.qk_norm, air.qk_norm, glm.qkv_bias, glm.o_bias, glm.num_draft_layers) == (True, False, True, False, 1)
    assert glm.rope.rotated_dim(glm.head_dim) == 64 and glm.eos_token_ids == (151329, 151336, 151338)
    assert (kimi.num_draft_layers, kimi.interleaved, kimi.rope.beta_fast, kimi.rope.theta) == (0, True, 1.0, 50000.0)
    assert kimi.score_scale == pytest.approx(192**-0.5 * 1.3466**2, rel=1e-4)


def test_kimi_k2_by_another_name(tmp_path: Path) -> None:
    """It is published as a DeepSeek V3; others write its own name."""
    found = []
    for name in ("DeepseekV3ForCausalLM", "KimiK2ForCausalLM"):
        (tmp_path / "config.json").write_text(json.dumps({**KIMI_K2, "architectures": [name]}))
        found.append(vars(read_model_config(tmp_path)) | {"architecture": None})
    assert found[0] == found[1]


@pytest.mark.parametrize(("changes", "message"), [
    ({"partial_rotary_factor": 1.5}, r"partial_rotary_factor 1\.5 is more than 1"),
    ({"partial_rotary_factor": "half"}, "partial_rotary_factor must be a number"),
    ({"head_dim": 126}, "rotates 63 of 126 numbers of a head; it must be an even number from 4 on"),
    ({"topk_method": "greedy"}, "topk_method 'greedy' is not supported; supported: noaux_tc"),
    ({"architectures": ["Glm4MoeLiteForCausalLM"], "num_key_value_heads": 96, "mlp_layer_types": ["dense"]},
     "mlp_layer_types must be a list with 'dense' or 'sparse' for each of the 46 layers"),
    ({"architectures": ["Glm4MoeLiteForCausalLM"], "num_key_value_heads": 96},
     r"partial_rotary_factor 0\.5 is not supported; only whole heads are rotated"),
], ids=str)
def test_refused_of_glm(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**GLM_4_5_AIR, **changes}))
    with pytest.raises(ModelError, match=message):
        read_model_config(tmp_path)
