"""The benchmarks' checkpoints: Qwen3 architecture, with experts or without, random fp32 weights, written once into a
folder."""

from __future__ import annotations

import json
from pathlib import Path

SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 64, "intermediate_size": 1536, "vocab_size": 32_000}
SHAPE_135M = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
              "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49_152}  # SmolLM2-135M's

SHAPE_MOE = {**SHAPE, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 256}
SHAPES = {"dense": SHAPE, "moe": SHAPE_MOE}


def write_checkpoint(folder: Path, shape: dict[str, int] = SHAPE) -> Path:
    """Make the checkpoint in `folder` unless it is there; returns the folder. 232 MB, 652 MB of SHAPE_135M,
    968 MB of SHAPE_MOE; seeded."""
    import torch
    from safetensors.torch import save_file

    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    has_experts = "num_experts" in shape
    config = {"architectures": ["Qwen3MoeForCausalLM" if has_experts else "Qwen3ForCausalLM"],
              "model_type": "qwen3_moe" if has_experts else "qwen3", "hidden_act": "silu", "norm_topk_prob": True,
              "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "attention_bias": False,
              "tie_word_embeddings": False, "use_sliding_window": False, "torch_dtype": "float32",
              "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, **shape}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(0)
    # A spread of weights at which random logits are neither flat nor extreme.
    tensors = {name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
               for name, shape in _tensor_shapes(shape).items()}
    save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    (folder / "model.safetensors.tmp").rename(folder / "model.safetensors")
    return folder


def _tensor_shapes(shape: dict[str, int] = SHAPE) -> dict[str, tuple[int, ...]]:
    s = shape
    hidden, head = s["hidden_size"], s["head_dim"]
    q, kv = s["num_attention_heads"] * head, s["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (s["vocab_size"], hidden),
                                          "model.norm.weight": (hidden,), "lm_head.weight": (s["vocab_size"], hidden)}
    for i in range(s["num_hidden_layers"]):
        layer = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
                 "self_attn.o_proj": (hidden, q), "self_attn.q_norm": (head,), "self_attn.k_norm": (head,),
                 **_mlp_shapes(shape), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _mlp_shapes(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, num_experts = shape["hidden_size"], shape.get("num_experts", 0)
    ffn = shape["moe_intermediate_size"] if num_experts else shape["intermediate_size"]
    names = [f"mlp.experts.{expert}" for expert in range(num_experts)] or ["mlp"]
    found: dict[str, tuple[int, ...]] = {"mlp.gate": (num_experts, hidden)} if num_experts else {}
    for name in names:
        found |= {f"{name}.gate_proj": (ffn, hidden), f"{name}.up_proj": (ffn, hidden),
                  f"{name}.down_proj": (hidden, ffn)}
    return found
