"""Architectures that are known and not built: each says what of it is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from xllm.errors import ModelError
from xllm.models.model_registry import FAMILIES, read_model_config
from xllm.models.not_built import NOT_BUILT

ELSEWHERE = {"MiniMaxM1ForCausalLM", "MiniMaxText01ForCausalLM"}  # of checkpoints that bring their own code


@pytest.mark.parametrize(("architecture", "missing"), [
    ("Qwen3NextForCausalLM", "state of each sequence"), ("Qwen3_5MoeForConditionalGeneration", "linear attention"),
    ("JambaForCausalLM", "state spaces"), ("NemotronHForCausalLM", "state of"), ("KimiLinearForCausalLM", "state of"),
    ("GraniteMoeHybridForCausalLM", "state of"), ("FalconH1ForCausalLM", "state of"),
    ("MiniMaxText01ForCausalLM", "linear attention"), ("DeepseekV32ForCausalLM", "indexer"),
    ("GptOssForCausalLM", "attention sinks, biases of experts, a clamped activation and weights in mxfp4"),
    ("KimiK25ForConditionalGeneration", "an encoder beside the decoder"),
])
def test_what_is_missing_is_named(tmp_path: Path, architecture: str, missing: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    said = rf"config\.json: architecture '{architecture}' is not built: it has .*{missing}.*; known: LlamaForCausalLM"
    with pytest.raises(ModelError, match=said):
        read_model_config(tmp_path)


def test_the_names_are_right() -> None:
    """Those of transformers, and none that is built."""
    found: set[str] = set()
    for name in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()):
        found.update((name,) if isinstance(name, str) else name)
    assert set(NOT_BUILT) - found == ELSEWHERE
    assert not set(NOT_BUILT) & set(FAMILIES)
