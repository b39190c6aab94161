"""Which architectures are known, and the module that knows each. Closed, and imported lazily."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import cast

from xllm.errors import ModelError, shortened
from xllm.model_files import is_there, read_json
from xllm.models.family import Family
from xllm.models.fp8_format import read_fp8_format
from xllm.models.model_config import ModelConfig
from xllm.models.not_built import missing_of
from xllm.models.overrides import Overrides, ReadMembers
from xllm.models.raw_config import RawConfig
from xllm.suggestion import nearest

log = logging.getLogger(__name__)
NO_OVERRIDES = Overrides()
FAMILIES = {
    "LlamaForCausalLM": "xllm.models.llama",
    "MistralForCausalLM": "xllm.models.mistral",
    "MixtralForCausalLM": "xllm.models.mixtral",
    "Qwen2ForCausalLM": "xllm.models.qwen2",
    "Qwen2MoeForCausalLM": "xllm.models.qwen2_moe",
    "Qwen3ForCausalLM": "xllm.models.qwen3",
    "Qwen3MoeForCausalLM": "xllm.models.qwen3_moe",
    "DeepseekV2ForCausalLM": "xllm.models.deepseek_v2",
    "DeepseekV3ForCausalLM": "xllm.models.deepseek_v3",
    "Glm4MoeForCausalLM": "xllm.models.glm4_moe",
    "Glm4MoeLiteForCausalLM": "xllm.models.glm4_moe_lite",
    "KimiK2ForCausalLM": "xllm.models.deepseek_v3",
    # Without a head, as embedding models are published.
    "LlamaModel": "xllm.models.llama",
    "MistralModel": "xllm.models.mistral",
    "Qwen2Model": "xllm.models.qwen2",
    "Qwen3Model": "xllm.models.qwen3",
}


def family_of(architecture: str) -> Family:
    """The family of an architecture in `FAMILIES`."""
    return cast(Family, importlib.import_module(FAMILIES[architecture]))


def read_model_config(path: Path, overrides: Overrides = NO_OVERRIDES) -> ModelConfig:
    """Read `config.json` (and `generation_config.json` if it is there) of a checkpoint folder.

    Raises:
        ModelError: a file is missing or broken, or the checkpoint is of a kind that is not supported.
        ConfigError: an override is wrong, or of a member that is not read.
    """
    file = path / "config.json"
    values = ReadMembers(overrides.apply(read_json(file)))
    try:
        config = _read(values, path)
    except ModelError as error:
        raise ModelError(f"{error} (with {overrides.flags})" if overrides else str(error)) from None
    overrides.check_used(values, config.architecture)
    return config


def _read(values: ReadMembers, path: Path) -> ModelConfig:
    file = path / "config.json"
    architecture = _known_architecture(values.get("architectures"), file)
    family = family_of(architecture)
    raw = RawConfig(values, family.DEFAULTS, file)
    fp8 = read_fp8_format(raw)
    generation = path / "generation_config.json"
    extra_eos: tuple[int, ...] = ()
    if is_there(generation):
        extra_eos = RawConfig(read_json(generation), {}, generation).token_ids("eos_token_id")
    config = family.read_config(raw, architecture)
    return replace(config, fp8=fp8, eos_token_ids=_within(config.vocab_size, extra_eos + config.eos_token_ids, path))


def _within(vocab_size: int, eos_token_ids: tuple[int, ...], path: Path) -> tuple[int, ...]:
    """Those that can be drawn, each once. Tiny models are published with the ids of the large ones they stand for."""
    kept = tuple(token_id for token_id in dict.fromkeys(eos_token_ids) if 0 <= token_id < vocab_size)
    beyond = next((token_id for token_id in eos_token_ids if not 0 <= token_id < vocab_size), None)
    if beyond is not None:
        log.warning("%s: eos_token_id %s is outside the vocabulary of %d tokens and never ends a text", path,
                    shortened(str(beyond)), vocab_size)
    return kept


def _known_architecture(architectures: object, file: Path) -> str:
    """The first in a config.json's list that is known. Raises ModelError, listing those that are, if none is."""
    named = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    for name in named:
        if name in FAMILIES:
            return name
    known = ", ".join(FAMILIES)
    if not named:
        raise ModelError(f"{file}: 'architectures' is missing or empty; known architectures: {known}")
    if missing := missing_of(named[0]):
        raise ModelError(f"{file}: architecture {named[0]!r} is not built: it has {missing}; known: {known}")
    raise ModelError(f"{file}: architecture {named[0]!r} is not supported; known: {known}"
                     f"{nearest(named[0][:64], list(FAMILIES))}")
