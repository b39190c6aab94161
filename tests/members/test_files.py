"""docs/members-files.md names every member of the installed libraries' types, and says what is true of it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.modeling_rope_utils import RopeParameters
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from tests.llm.test_generation_config import OTHER
from tests.llm.test_peft import NOT_BUILT
from tests.members.table import Member, faults_of, read_tables
from tests.text.tiny_tokenizers import byte_level, wordpiece
from xllm.errors import ConfigError, ModelError
from xllm.generation_config import read_sampling_defaults
from xllm.layers.rope_config import read_rope
from xllm.models.adapter_config import AdapterConfig
from xllm.models.embedding_modules import LEGACY_MODES, read_embedding_modules
from xllm.models.model_registry import read_model_config
from xllm.text.tokenizer import load_tokenizer

TABLES = read_tables("members-files.md")
ROWS = [(title, member) for title, table in TABLES.items() for member in table.values()]
WIDTH = 8
MODEL = {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
         "num_hidden_layers": 1, "num_attention_heads": 2}


def of_configs() -> set[str]:
    classes = (transformers.LlamaConfig, transformers.MistralConfig, transformers.Qwen2Config, transformers.Qwen3Config,
               transformers.MixtralConfig, transformers.Qwen2MoeConfig, transformers.Qwen3MoeConfig,
               transformers.DeepseekV2Config, transformers.DeepseekV3Config, transformers.Glm4MoeConfig,
               transformers.Glm4MoeLiteConfig)
    return {field.name for config in classes for field in dataclasses.fields(config)}


def of_tokenizers() -> set[str]:
    """What their constructors take out of the file, by their own text."""
    base = transformers.PreTrainedTokenizerBase
    texts = [inspect.getsource(function) for function in (base.__init__, TokenizersBackend.__init__,
                                                          base._from_pretrained)]
    return set(base.SPECIAL_TOKENS_ATTRIBUTES) | {
        name for text in texts for name in re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', text)}


# sentence-transformers is not installed; its three files are small, and unknown members of them are refused.
WALKED: dict[str, Callable[[], set[str]]] = {
    "config.json": of_configs,
    "rope_parameters": lambda: set(RopeParameters.__annotations__),
    "quantization_config": lambda: set(AUTO_QUANTIZATION_CONFIG_MAPPING),
    "quantization_config of fp8": lambda: {"quant_method", "fmt", "ignored_layers", *inspect.signature(
        transformers.FineGrainedFP8Config).parameters} - {"kwargs"},
    "adapter_config.json": lambda: {field.name for field in dataclasses.fields(peft.LoraConfig)},
    "generation_config.json": lambda: set(transformers.GenerationConfig().__dict__),
    "tokenizer_config.json": of_tokenizers,
    "sentence_bert_config.json": lambda: {"max_seq_length", "do_lower_case"},
    "modules.json": lambda: {"idx", "name", "path", "type", "kwargs"},
    "1_Pooling/config.json": lambda: {"pooling_mode", "include_prompt", "embedding_dimension",
                                      "word_embedding_dimension", *LEGACY_MODES},
    "2_Dense/config.json": lambda: {"in_features", "out_features", "bias", "activation_function", "module_input_name",
                                    "module_output_name", "use_residual"},
    "2_Normalize/config.json": lambda: {"module_input_name", "module_output_name"},
}


def test_every_table_is_walked() -> None:
    assert set(TABLES) == set(WALKED)


@pytest.mark.parametrize("title", WALKED)
def test_no_member_is_missing(title: str) -> None:
    members = WALKED[title]()
    assert len(members) >= 2 and not members - set(TABLES[title])


@pytest.mark.parametrize(("title", "member"), ROWS, ids=[f"{title}:{member.path}" for title, member in ROWS])
def test_a_row_says_what_it_must(title: str, member: Member) -> None:
    assert not faults_of(member)


def write(file: Path, content: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file.parent


def load_config(folder: Path, **members: Any) -> None:
    read_model_config(write(folder / "config.json", {**MODEL, **members}))


def load_generation(folder: Path, **members: Any) -> None:
    read_sampling_defaults("auto", write(folder / "generation_config.json", members))


def load_adapter(folder: Path, **members: Any) -> None:
    AdapterConfig({"peft_type": "LORA", **members}, folder / "adapter_config.json")


def load_rope(folder: Path, **members: Any) -> None:
    read_rope({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, **members}}, max_position_embeddings=64,
              default_theta=1e4)


def load_tokens(folder: Path, **members: Any) -> None:
    forced = len(members) == 2
    (byte_level if forced or "add_prefix_space" in members else wordpiece)(folder)
    file = folder / "tokenizer_config.json"
    write(file, {**json.loads(file.read_text()), "tokenizer_class": "Qwen2Tokenizer", **members})
    load_tokenizer(folder)


def load_modules(folder: Path, pooling: dict[str, Any] | None = None, dense: dict[str, Any] | None = None,
                 normalize: dict[str, Any] | None = None, entry: dict[str, Any] | None = None,
                 model: dict[str, Any] | None = None) -> None:
    names = ["Transformer", "Pooling", "Normalize", "Dense"]
    listed = [{"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "",
               "type": f"sentence_transformers.models.{name}", **(entry or {})} for i, name in enumerate(names)]
    write(folder / "1_Pooling" / "config.json", {"pooling_mode": "mean", **(pooling or {})})
    write(folder / "3_Dense" / "config.json", {"in_features": WIDTH, "out_features": 2, "bias": False, **(dense or {})})
    save_file({"linear.weight": torch.zeros(2, WIDTH)}, folder / "3_Dense" / "model.safetensors")
    write(folder / "sentence_bert_config.json", {"max_seq_length": 512, **(model or {})})
    write(folder / "2_Normalize" / "config.json", normalize or {})
    read_embedding_modules(write(folder / "modules.json", listed), "auto", WIDTH)


CLEAN_UP = "clean_up_tokenization_spaces"
# How to load the file with one member at another value, and such values.
LOADED: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "config.json": (load_config, {"hidden_act": "gelu"}),
    "rope_parameters": (load_rope, {"short_factor": [1.0], "long_factor": [1.0], "mrope_section": [1, 1, 2]}),
    "generation_config.json": (load_generation, OTHER),
    "adapter_config.json": (load_adapter, NOT_BUILT),
    "tokenizer_config.json": (load_tokens, {CLEAN_UP: True, "add_prefix_space": True}),
    "sentence_bert_config.json": (lambda folder, **member: load_modules(folder, model=member), {"do_lower_case": True}),
    "modules.json": (lambda folder, **member: load_modules(folder, entry=member), {"kwargs": {"a": 1}}),
    "1_Pooling/config.json": (lambda folder, **member: load_modules(folder, pooling=member), {
        "include_prompt": False, "embedding_dimension": 9, "word_embedding_dimension": 9}),
    "2_Dense/config.json": (lambda folder, **member: load_modules(folder, dense=member), {
        "in_features": 9, "module_input_name": "token_embeddings", "module_output_name": "other",
        "use_residual": True}),
    "2_Normalize/config.json": (lambda folder, **member: load_modules(folder, normalize=member), {
        "module_input_name": "token_embeddings", "module_output_name": "other"}),
}
REFUSED_ROWS = [(title, member.path) for title, member in ROWS if member.handling == "refused"]


@pytest.mark.parametrize(("title", "path"), REFUSED_ROWS, ids=str)
def test_what_is_called_refused_is_refused(tmp_path: Path, title: str, path: str) -> None:
    if title == "quantization_config":
        with pytest.raises(ModelError, match=f"config.json: .*quantization_config: {path}"):
            load_config(tmp_path, quantization_config={"quant_method": path})
        return
    if path.startswith(f"{CLEAN_UP}_"):
        members = {CLEAN_UP: True, path: True}
    else:
        members = {path: LOADED[title][1][path]}
    with pytest.raises((ModelError, ConfigError), match=CLEAN_UP if len(members) == 2 else path):
        LOADED[title][0](tmp_path, **members)


def test_without_any_of_them_all_load(tmp_path: Path) -> None:
    """What the refusals above are due to is the one member."""
    for title, (load, _) in LOADED.items():
        folder = tmp_path / title
        folder.mkdir(parents=True)
        load(folder)


def test_members_of_sentence_transformers_that_are_not_in_the_tables_are_refused(tmp_path: Path) -> None:
    for number, part in enumerate(("pooling", "dense", "normalize")):
        with pytest.raises(ModelError, match="unknown member 'another'"):
            load_modules(tmp_path / str(number), **{part: {"another": 1}})
