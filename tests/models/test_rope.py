"""The rotary table against transformers' own rotary embedding, at real sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from xllm.errors import ModelError
from xllm.layers.rope_config import COMMON_MEMBERS, MEMBERS, RopeConfig, read_rope
from xllm.layers.rotary import rope_table

NUM_POSITIONS = 1500
DEVICE = torch.device("cpu")

CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic-within": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-original-length-from-config": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
    "yarn-no-truncation": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "truncate": False,
                           "original_max_position_embeddings": 4096},
    "yarn-betas": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "beta_fast": 20.0, "beta_slow": 3.0,
                   "original_max_position_embeddings": 4096},
    "yarn-mscale": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 4096},
    "yarn-attention-factor": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 1.3,
                              "original_max_position_embeddings": 4096},
}


def transformers_table(parameters: dict[str, Any], head_dim: int, positions: list[int]) -> torch.Tensor:
    config = LlamaConfig(hidden_size=head_dim * 2, num_attention_heads=2, max_position_embeddings=32768,
                         rope_parameters=dict(parameters))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([positions]))
    half = head_dim // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)


@pytest.mark.parametrize("head_dim", [64, 128, 80])
@pytest.mark.parametrize("name", CASES)
def test_table_equals_transformers(name: str, head_dim: int) -> None:
    rope = read_rope({"rope_parameters": CASES[name]}, max_position_embeddings=32768, default_theta=1e4)
    table_LH = rope_table(rope, head_dim, NUM_POSITIONS, DEVICE)
    assert table_LH.dtype == torch.float32
    expected = transformers_table(CASES[name], head_dim, list(range(NUM_POSITIONS)))
    torch.testing.assert_close(table_LH, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("length", [33, 64, 100])
def test_dynamic_row_beyond_the_original_length_is_the_one_of_a_sequence_that_ends_there(length: int) -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
    rope = RopeConfig(rope_type="dynamic", factor=3.0, original_max_len=32)
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=32, rope_parameters=parameters)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    last = torch.cat((cos[0, -1, :8], sin[0, -1, :8]))
    torch.testing.assert_close(rope_table(rope, 16, 128, DEVICE)[length - 1], last, rtol=0, atol=1e-5)


def test_transformers_4_and_5_layouts_read_alike() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    for type_key in ("rope_type", "type"):
        old = {"rope_theta": 5e5, "rope_scaling": {type_key: "llama3", **scaling}}
        assert read_rope(old, max_position_embeddings=131072, default_theta=1e4) == \
            read_rope(new, max_position_embeddings=131072, default_theta=1e4)


@pytest.mark.parametrize(("rope", "message"), [
    ({"rope_type": "default", "factor": 2.0}, "'default' has no 'factor'"),
    ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, "no 'beta_fast'"),
    ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}, "no 'original_max_position"),
    ({"rope_type": "yarn", "factor": 2.0, "short_factor": [1.0]}, "no 'short_factor'"),
    ({"rope_type": "yarn", "factor": 2.0, "trunkate": False}, "no 'trunkate'"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, "truncate must be"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": None}, "truncate must be"),
    ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "'longrope' is not supported"),
    ({"rope_type": "proportional", "factor": 2.0}, "'proportional' is not supported"),
    ({"rope_type": "default", "mrope_section": [2, 3, 3]}, "mrope_section"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
], ids=str)
def test_members_that_do_not_belong_are_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_rope({"rope_parameters": rope}, max_position_embeddings=2048, default_theta=1e4)


def test_every_member_of_transformers_is_known_or_refused() -> None:
    known = {member for members in MEMBERS.values() for member in members} | set(COMMON_MEMBERS)
    assert set(RopeParameters.__annotations__) - known == {"short_factor", "long_factor", "mrope_section"}


def test_no_rope_fields_mean_plain_rope() -> None:
    rope = read_rope({"rope_scaling": None}, max_position_embeddings=2048, default_theta=1e4)
    assert rope == RopeConfig(rope_type="default", theta=1e4, original_max_len=2048)


@pytest.mark.parametrize(("parameters", "expected"), [
    ({"rope_type": "default"}, 4096),
    ({"rope_type": "linear", "factor": 2.5}, 10240),
    ({"rope_type": "dynamic", "factor": 2.0}, 8192),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, 4000),
    ({"rope_type": "yarn", "factor": 4.0}, 16384),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 1000}, 4096),
], ids=lambda value: value.get("rope_type") if isinstance(value, dict) else str(value))
def test_max_model_len_counts_the_scaling(parameters: dict[str, Any], expected: int) -> None:
    rope = read_rope({"rope_parameters": parameters}, max_position_embeddings=4096, default_theta=1e4)
    assert rope.max_model_len(4096) == expected
