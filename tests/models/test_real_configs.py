"""The configs of released checkpoints, in the words they were released with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xllm.layers.rope_config import RopeConfig
from xllm.models.dense import DenseConfig
from xllm.models.model_registry import read_model_config

from .checkpoints import VARIANTS, Variant, save_checkpoint

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}
QWEN2_5_7B_INSTRUCT_YARN = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
    "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 152064,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
}
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}
MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


def read(folder: Path, values: dict[str, Any]) -> DenseConfig:
    (folder / "config.json").write_text(json.dumps(values))
    config = read_model_config(folder)
    assert isinstance(config, DenseConfig)
    return config


def test_qwen3_0_6b(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN3_0_6B) == DenseConfig(
        architecture="Qwen3ForCausalLM", vocab_size=151936, hidden_size=1024, num_layers=28, num_heads=16,
        num_kv_heads=8, head_dim=128, ffn_size=3072, rms_norm_eps=1e-6, tie_word_embeddings=True, qk_norm=True,
        rope=RopeConfig(theta=1e6, original_max_len=40960), sliding_windows=(None,) * 28, max_model_len=40960,
        checkpoint_dtype="bfloat16", eos_token_ids=(151645,), bos_token_id=151643)


def test_qwen2_5_with_yarn(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN2_5_7B_INSTRUCT_YARN)
    assert (config.head_dim, config.qkv_bias, config.o_bias) == (128, True, False)
    assert (config.max_model_len, config.sliding_windows) == (131072, (None,) * 28)
    assert (config.rope.rope_type, config.rope.factor, config.rope.original_max_len) == ("yarn", 4.0, 32768)
    assert config.rope.attention_factor == pytest.approx(1.13863, abs=1e-5)


def test_llama_3_2_1b(tmp_path: Path) -> None:
    config = read(tmp_path, LLAMA_3_2_1B)
    assert (config.head_dim, config.max_model_len, config.eos_token_ids) == (64, 131072, (128001, 128008, 128009))
    assert config.rope == RopeConfig(rope_type="llama3", theta=5e5, factor=32.0, original_max_len=8192)


def test_mistral_7b_v01(tmp_path: Path) -> None:
    config = read(tmp_path, MISTRAL_7B_V01)
    assert (config.head_dim, config.max_model_len, config.sliding_windows) == (128, 32768, (4096,) * 32)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "layer_types" not in v.changes], ids=lambda v: v.id)
def test_transformers_4_layout_of_every_variant_reads_alike(variant: Variant, tmp_path: Path) -> None:
    """transformers 5 wrote the file; the same facts in the words of transformers 4 give the same config."""
    expected = read_model_config(save_checkpoint(variant, tmp_path))
    values = json.loads((tmp_path / "config.json").read_text())
    values.pop("layer_types", None)
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        values["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    values["torch_dtype"] = values.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_model_config(tmp_path) == expected
