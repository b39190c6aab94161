"""The benchmarks' checkpoints: Qwen3 architecture, random fp32 weights, written once into a folder."""

from __future__ import annotations

import json
from pathlib import Path

SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 64, "intermediate_size": 1536, "vocab_size": 32_000}
SHAPE_135M = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
              "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49_152}  # SmolLM2-135M's


def write_checkpoint(folder: Path, shape: dict[str, int] = SHAPE) -> Path:
    """Make the checkpoint in `folder` unless it is there; returns the folder. 232 MB, 652 MB of SHAPE_135M; seeded."""
    import torch
    from safetensors.torch import save_file

    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
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
    hidden, ffn, head = s["hidden_size"], s["intermediate_size"], s["head_dim"]
    q, kv = s["num_attention_heads"] * head, s["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (s["vocab_size"], hidden),
                                          "model.norm.weight": (hidden,), "lm_head.weight": (s["vocab_size"], hidden)}
    for i in range(s["num_hidden_layers"]):
        layer = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
                 "self_attn.o_proj": (hidden, q), "self_attn.q_norm": (head,), "self_attn.k_norm": (head,),
                 "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
                 "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes
