"""config.json: what is read from it, and what is refused with which words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xllm.errors import ModelError
from xllm.models.dense import DenseConfig
from xllm.models.model_registry import read_model_config

PLAIN = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
         "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512, "torch_dtype": "bfloat16"}
QWEN2 = {**PLAIN, "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
ABSENT = object()


def read(folder: Path, values: object, generation: object = None) -> DenseConfig:
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    config = read_model_config(folder)
    assert isinstance(config, DenseConfig)
    return config


def changed(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**PLAIN, **changes}.items() if value is not ABSENT}


def test_absent_keys_get_the_familys_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, PLAIN)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (4, 16, 1e-6)
    assert (config.checkpoint_dtype, config.max_model_len, config.rope.theta) == ("bfloat16", 512, 10000.0)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)
    flags = (config.tie_word_embeddings, config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm)
    assert not any(flags)
    assert config.sliding_windows == (None, None)


def test_qwen3_default_head_dim_is_128(tmp_path: Path) -> None:
    config = read(tmp_path, {**QWEN2, "architectures": ["Qwen3ForCausalLM"]})
    assert (config.head_dim, config.qk_norm, config.qkv_bias) == (128, True, False)


def test_qwen2_biases_do_not_depend_on_the_config(tmp_path: Path) -> None:
    config = read(tmp_path, {**QWEN2, "attention_bias": False})
    assert (config.qkv_bias, config.o_bias) == (True, False)


@pytest.mark.parametrize(("given", "expected"), [(ABSENT, 4096), (None, None), (77, 77)],
                         ids=["absent", "null", "77"])
def test_mistral_window(tmp_path: Path, given: object, expected: int | None) -> None:
    config = read(tmp_path, changed(architectures=["MistralForCausalLM"], num_key_value_heads=2, sliding_window=given))
    assert config.sliding_windows == (expected, expected)


@pytest.mark.parametrize(("fields", "expected"), [
    ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, (None, None)),
    ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8)),
    ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28}, (None, None)),
    ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
     (8, None)),
    ({"sliding_window": None, "layer_types": ["full_attention"] * 2}, (None, None)),
], ids=["off", "from-layer-1", "beyond-the-last-layer", "by-type", "all-full"])
def test_qwen2_windows(tmp_path: Path, fields: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    assert read(tmp_path, {**QWEN2, **fields}).sliding_windows == expected


def test_end_tokens_of_both_files_are_joined(tmp_path: Path) -> None:
    config = read(tmp_path, changed(eos_token_id=[7, 8]), {"eos_token_id": [9, 7]})
    assert config.eos_token_ids == (9, 7, 8)


def test_transformers_5_layout_reads_like_the_old_one(tmp_path: Path) -> None:
    old = changed(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype="float16")
    new = changed(rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}, torch_dtype=ABSENT,
                  dtype="float16")
    assert read(tmp_path, old) == read(tmp_path, new)
    assert read(tmp_path, new).max_model_len == 1024


@pytest.mark.parametrize(("change", "message"), [
    ({"architectures": ["Lama3ForCausalLM"]}, "'Lama3ForCausalLM' is not supported.*did you mean 'LlamaForCausalLM'"),
    ({"architectures": ["GPT2LMHeadModel"]}, "known: LlamaForCausalLM, MistralForCausalLM"),
    ({"architectures": ABSENT}, "'architectures' is missing"),
    ({"architectures": "LlamaForCausalLM"}, "'architectures' is missing"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantised.*awq"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "config.json: rope type 'longrope' is not supported"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs 'factor'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": -1}}, "rope factor must be"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"vocab_size": ABSENT}, "'vocab_size' is missing"),
    ({"vocab_size": "100"}, "vocab_size must be an integer"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer in"),
    ({"hidden_size": True}, "hidden_size must be an integer"),
    ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
    ({"head_dim": 15}, "head_dim must be even"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be a number in"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number in"),
    ({"attention_bias": "yes"}, "attention_bias must be true or false"),
    ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
    ({"eos_token_id": ["</s>"]}, "eos_token_id must be token ids"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, changed(**change))


@pytest.mark.parametrize(("fields", "message"), [
    ({"layer_types": ["full_attention"]}, "one entry for each of the 2 layers"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention' is not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window is off"),
    ({"max_window_layers": None}, "max_window_layers must be an integer"),
], ids=["too-short", "linear-attention", "window-off", "no-first-layer"])
def test_refused_windows(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, {**QWEN2, **fields})


@pytest.mark.parametrize(("content", "message"), [
    (b"{", "not valid JSON"), (b"\xff\xfe\x00", "not valid JSON"), (b"[]", "must hold a JSON object"),
    (b"[" * 100_000, "not valid JSON"), (b"", "not valid JSON"),
], ids=["cut", "not-utf8", "list", "deep", "empty"])
def test_broken_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_model_config(tmp_path)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        read_model_config(tmp_path)


def test_broken_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json is not valid JSON"):
        read(tmp_path, PLAIN)


def test_reading_a_config_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    code = ("import sys, pathlib; from xllm.models.model_registry import read_model_config; "
            f"read_model_config(pathlib.Path({str(tmp_path)!r})); "
            "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]", found.stdout


ODD_VALUES = [None, True, False, 0, -1, 1, 3, 10**6, 10**400, 1.5, -0.0, 1e-300, 1e308, float("inf"), float("nan"),
              "", "x", [], [None], [[]], ["x", 3], {}, {"x": {}}, {"rope_type": "yarn", "factor": 1e308},
              {"rope_type": "dynamic", "factor": 1e-8}, {"rope_type": ["yarn"]}, {"type": {}}]
ALL_KEYS = [*PLAIN, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
            "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "layer_types",
            "max_window_layers", "hidden_act", "dtype", "quantization_config", "eos_token_id", "bos_token_id",
            "partial_rotary_factor", "original_max_position_embeddings"]


@pytest.mark.parametrize("key", ALL_KEYS)
def test_odd_values_are_read_or_refused_with_words(tmp_path: Path, key: str) -> None:
    """No value of any key ends in anything but a config within bounds or a ModelError that names the file."""
    for value in ODD_VALUES:
        values = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], key: value}
        message = None
        try:
            config = read(tmp_path, values)
        except ModelError as error:
            message = str(error)
        if message is not None:
            assert "config.json" in message
        else:
            assert len(config.sliding_windows) == config.num_layers
            assert 1 <= config.max_model_len < 2**31
