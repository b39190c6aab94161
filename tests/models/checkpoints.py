"""Tiny random checkpoints written by transformers, and what transformers computes with them.

Every variant stands for a kind of real checkpoint: its config differs in one respect from its
family's plain one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB_SIZE = 211
PROMPT = [(17 * i * i + 5 * i + 3) % VOCAB_SIZE for i in range(37)]
NUM_NEW_TOKENS = 64
CORRECTION = ".e_score_correction_bias"
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


@dataclass(frozen=True)
class Variant:
    """`family`: prefix of the transformers classes. `changes`: config fields that differ from the plain one."""

    id: str
    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    disk_dtype: torch.dtype = torch.float32
    shard_size: str = "1GB"
    stacked: bool = False  # experts in one tensor, as transformers 5 holds them


def rope(rope_type: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **fields}}


def deepseek(**fields: Any) -> dict[str, Any]:
    """Without experts. Widths that no two parts share."""
    return {"num_key_value_heads": 4, "first_k_dense_replace": 3, "kv_lora_rank": 24, "q_lora_rank": 40,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20, **fields}


def deepseek_moe(**fields: Any) -> dict[str, Any]:
    """The first layer is dense; a token has three of twelve experts, and the shared ones."""
    return deepseek(**{"first_k_dense_replace": 1, "n_routed_experts": 12, "num_experts_per_tok": 3,
                       "moe_intermediate_size": 40, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, **fields})


def glm(**fields: Any) -> dict[str, Any]:
    """The first layer is dense; half of each head is rotated."""
    return {"n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 24, **fields}


DEEPSEEK_YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.9, mscale_all_dim=0.6)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56}
VARIANTS = [
    Variant("llama-gqa", "Llama"),
    Variant("llama-mha", "Llama", {"num_key_value_heads": 4}),
    Variant("llama-mqa", "Llama", {"num_key_value_heads": 1}),
    Variant("llama-tied", "Llama", {"tie_word_embeddings": True}),
    Variant("llama-attention-bias", "Llama", {"attention_bias": True}),
    Variant("llama-mlp-bias", "Llama", {"mlp_bias": True}),
    Variant("llama-head-dim-32", "Llama", {"head_dim": 32}),
    Variant("llama-theta-500000", "Llama", rope("default", rope_theta=500000.0)),
    Variant("llama-rope-linear", "Llama", rope("linear", factor=2.5)),
    Variant("llama-rope-dynamic-within", "Llama", rope("dynamic", factor=2.0)),
    Variant("llama-rope-dynamic-beyond", "Llama", {**rope("dynamic", factor=2.0), "max_position_embeddings": 64}),
    Variant("llama-rope-llama3", "Llama", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                               original_max_position_embeddings=32)),
    Variant("llama-rope-yarn", "Llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    Variant("llama-sharded", "Llama", shard_size="64KB"),
    Variant("llama-bf16-on-disk", "Llama", disk_dtype=torch.bfloat16),
    Variant("llama-fp16-on-disk-sharded", "Llama", disk_dtype=torch.float16, shard_size="64KB"),
    Variant("mistral-no-window", "Mistral", {"sliding_window": None}),
    Variant("mistral-window-21", "Mistral", {"sliding_window": 21}),
    Variant("mistral-head-dim-32", "Mistral", {"sliding_window": None, "head_dim": 32}),
    Variant("qwen2", "Qwen2"),
    Variant("qwen2-tied", "Qwen2", {"tie_word_embeddings": True}),
    Variant("qwen2-window-13-from-layer-1", "Qwen2", {"use_sliding_window": True, "sliding_window": 13,
                                                      "max_window_layers": 1}),
    Variant("qwen2-rope-yarn", "Qwen2", rope("yarn", factor=2.0, original_max_position_embeddings=64, beta_fast=16.0,
                                             beta_slow=2.0, truncate=False)),
    Variant("qwen3", "Qwen3", {"head_dim": 16}),
    Variant("qwen3-tied-head-dim-32-bf16", "Qwen3", {"head_dim": 32, "tie_word_embeddings": True},
            disk_dtype=torch.bfloat16),
    Variant("qwen3-attention-bias", "Qwen3", {"head_dim": 16, "attention_bias": True}),
    Variant("qwen3-mixed-windows", "Qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 9,
                                             "layer_types": MIXED}),
    Variant("qwen3-rope-yarn-mscale", "Qwen3", {"head_dim": 16, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.8, mscale_all_dim=0.4)}),
    Variant("mixtral", "Mixtral", MIXTRAL),
    Variant("mixtral-stacked-window-21", "Mixtral", {**MIXTRAL, "sliding_window": 21}, stacked=True),
    Variant("mixtral-bf16-on-disk-sharded", "Mixtral", MIXTRAL, disk_dtype=torch.bfloat16, shard_size="64KB"),
    Variant("qwen2-moe", "Qwen2Moe", QWEN_MOE),
    Variant("qwen2-moe-stacked-no-bias-normalised", "Qwen2Moe", {**QWEN_MOE, "qkv_bias": False,
                                                                 "norm_topk_prob": True}, stacked=True),
    Variant("qwen2-moe-windows-layer-1-plain", "Qwen2Moe", {
        **QWEN_MOE, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "mlp_only_layers": [1]}),
    Variant("qwen3-moe", "Qwen3Moe", {**QWEN_MOE, "head_dim": 16, "norm_topk_prob": True}),
    Variant("qwen3-moe-stacked-tied", "Qwen3Moe", {**QWEN_MOE, "tie_word_embeddings": True}, stacked=True),
    Variant("qwen3-moe-every-second-layer-bias", "Qwen3Moe", {
        **QWEN_MOE, "decoder_sparse_step": 2, "attention_bias": True}),
    Variant("qwen3-moe-window-9-one-expert", "Qwen3Moe", {
        **QWEN_MOE, "num_experts_per_tok": 1, "use_sliding_window": True, "sliding_window": 9}),
    Variant("deepseek-v2", "DeepseekV2", deepseek()),
    Variant("deepseek-v2-lite", "DeepseekV2", deepseek(q_lora_rank=None)),
    Variant("deepseek-v2-bias-yarn", "DeepseekV2", deepseek(attention_bias=True, mlp_bias=True, **DEEPSEEK_YARN)),
    Variant("deepseek-v3", "DeepseekV3", deepseek()),
    Variant("deepseek-v3-yarn-bf16", "DeepseekV3", deepseek(**DEEPSEEK_YARN), disk_dtype=torch.bfloat16),
    Variant("deepseek-v3-plain-q-bias-halves", "DeepseekV3", deepseek(q_lora_rank=None, attention_bias=True,
                                                                     rope_interleave=False)),
    Variant("deepseek-v2-lite-moe", "DeepseekV2", deepseek_moe(q_lora_rank=None, n_group=1, topk_group=1)),
    Variant("deepseek-v2-moe-groups-scaled-bias", "DeepseekV2", deepseek_moe(
        topk_method="group_limited_greedy", routed_scaling_factor=4.0, mlp_bias=True)),
    Variant("deepseek-v2-moe-stacked-all-layers", "DeepseekV2", deepseek_moe(first_k_dense_replace=0), stacked=True),
    Variant("deepseek-v3-moe", "DeepseekV3", deepseek_moe()),
    Variant("deepseek-v3-moe-yarn-bf16-sharded", "DeepseekV3", deepseek_moe(n_shared_experts=1, **DEEPSEEK_YARN),
            disk_dtype=torch.bfloat16, shard_size="64KB"),
    Variant("deepseek-v3-moe-one-group-not-normalised", "DeepseekV3", deepseek_moe(
        n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.5), stacked=True),
    Variant("glm4-moe", "Glm4Moe", glm()),
    Variant("glm4-moe-bias-qk-norm-scaled", "Glm4Moe", glm(attention_bias=True, use_qk_norm=True,
                                                           routed_scaling_factor=2.5)),
    Variant("glm4-moe-yarn-quarter-stacked", "Glm4Moe", glm(
        head_dim=32, use_qk_norm=True, norm_topk_prob=False, n_group=4, topk_group=2, **rope(
            "yarn", factor=4.0, original_max_position_embeddings=32, partial_rotary_factor=0.25)), stacked=True),
    Variant("glm4-moe-whole-heads", "Glm4Moe", glm(**rope("default", partial_rotary_factor=1.0))),
    Variant("glm4-moe-lite-layer-2-plain", "Glm4MoeLite", deepseek_moe(mlp_layer_types=["sparse", "sparse", "dense"])),
]
BY_ID = {variant.id: variant for variant in VARIANTS}


def save_checkpoint(variant: Variant, folder: Path) -> Path:
    """Write the variant's checkpoint into `folder`; the same weights each time."""
    config = getattr(transformers, f"{variant.family}Config")(**{**SIZES, **variant.changes})
    model = getattr(transformers, f"{variant.family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_random_weight(name, weight.shape, generator))
        corrections = {name: bias.shape for name, bias in model.named_buffers() if name.endswith(CORRECTION)}
        kept = {name: _random_weight(name, shape, generator) for name, shape in corrections.items()}
    model.to(variant.disk_dtype)
    for name, bias in kept.items():  # fp32 in every checkpoint
        model.get_submodule(name.removesuffix(CORRECTION)).e_score_correction_bias = bias
    model.save_pretrained(folder, max_shard_size=variant.shard_size, save_original_format=not variant.stacked)
    return folder


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Scaled so that activations keep their size and the logits differ clearly."""
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1.0 + 0.2 * noise
    return 0.3 * noise if name.endswith("bias") else noise * 1.5 / shape[-1]**0.5


@dataclass(frozen=True)
class Truth:
    """Greedy decoding by transformers: `logits_TV` of the prompt and all new tokens but the last."""

    tokens: list[int]
    logits_TV: Tensor


@torch.inference_mode()
def transformers_greedy(folder: Path) -> Truth:
    """Load the checkpoint in fp32, prefill PROMPT at once, then decode token by token over the KV cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    step = model(torch.tensor([PROMPT]), use_cache=True)
    logits = [step.logits[0]]
    tokens = [int(step.logits[0, -1].argmax())]
    while len(tokens) < NUM_NEW_TOKENS:
        step = model(torch.tensor([tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits[0])
        tokens.append(int(step.logits[0, -1].argmax()))
    return Truth(tokens, torch.cat(logits))

