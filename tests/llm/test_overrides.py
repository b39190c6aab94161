"""`hf_overrides` and `rope_scaling` change what config.json says: answers are those of a checkpoint that says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from serving.commands.cli import main
from tests.runner.tiny_model import PROMPT, save_checkpoint
from xllm import LLM, SamplingParams
from xllm.errors import ConfigError, ModelError

IDS = PROMPT[:30]
SCORED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# Settings, and what a config.json would say instead of them.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope_scaling": ({"rope_scaling": YARN}, {"rope_parameters": {**YARN, "rope_theta": 10000.0}}),
    "rope_scaling with theta": ({"rope_scaling": {"rope_type": "default", "rope_theta": 300.0}},
                                {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    "nested": ({"hf_overrides": {"rope_parameters": {"rope_theta": 300.0}}},
               {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    "the older name": ({"hf_overrides": {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 300.0}}},
                       {"rope_parameters": {**YARN, "rope_theta": 300.0}}),
    "both": ({"hf_overrides": {"rms_norm_eps": 0.3}, "rope_scaling": json.dumps({"type": "linear", "factor": 3.0})},
             {"rms_norm_eps": 0.3, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}}),
    "a member alone": ({"hf_overrides": '{"rms_norm_eps": 0.5}'}, {"rms_norm_eps": 0.5}),
    "the alias": ({"json_model_override_args": {"num_hidden_layers": 2, "rms_norm_eps": 0.5}}, {"rms_norm_eps": 0.5}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("overrides") / "base")


def edited(base: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """The same weights under another config.json."""
    for file in base.iterdir():
        (folder / file.name).symlink_to(file)
    config = change(json.loads((base / "config.json").read_text()))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_us(folder: Path, ids: list[int] = IDS, **settings: Any) -> list[float]:
    with LLM(model=str(folder), skip_tokenizer_init=True, dtype="float32", num_threads=1, num_kv_blocks=32,
             **{"max_model_len": 64, **settings}) as llm:
        output = llm.generate([{"prompt_token_ids": ids}], SCORED, use_tqdm=False)[0]
    assert output.prompt_logprobs is not None
    return [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:])]


@torch.inference_mode()
def by_transformers(folder: Path, ids: list[int] = IDS) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return [found[index, token].item() for index, token in enumerate(ids[1:])]


@pytest.mark.parametrize("case", CASES)
def test_an_override_is_as_if_the_file_said_it(base: Path, tmp_path: Path, case: str) -> None:
    settings, members = CASES[case]
    folder = edited(base, tmp_path, lambda config: {**config, **members})
    found = by_us(base, **settings)
    assert found == pytest.approx(by_transformers(folder), abs=2e-4)
    assert max(abs(a - b) for a, b in zip(found, by_us(base))) > 0.01, "the override makes no difference"


def test_null_takes_a_member_away(base: Path, tmp_path: Path) -> None:
    folder = edited(base, tmp_path, lambda config: {**config, "quantization_config": {"quant_method": "awq"}})
    with pytest.raises(ModelError, match="quantization_config: awq"):
        by_us(folder)
    assert by_us(folder, hf_overrides={"quantization_config": None}) == by_us(base)


@pytest.mark.parametrize(("settings", "message"), [
    ({"hf_overrides": "{"}, "hf_overrides is not valid JSON"), ({"hf_overrides": "[1]"}, "hf_overrides must be a JSON"),
    ({"rope_scaling": "yarn"}, "rope_scaling is not valid JSON"),
    ({"rope_scaling": "3"}, "rope_scaling must be a JSON"),
    ({"hf_overrides": 3}, "hf_overrides is not valid"),
    ({"hf_overrides": {"rope_thet": 3.0}}, "hf_overrides: 'rope_thet'"),
    ({"hf_overrides": {"num_attention_haeds": 3}}, "hf_overrides: 'num_attention_haeds' is no member"),
    ({"rope_scaling": {"rope_type": "yarn", "facto": 2.0}}, "rope_scaling: .*no 'facto'"),
    ({"rope_scaling": {"rope_type": "spiral"}}, "rope_scaling: rope type 'spiral'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": -1}}, "rope factor.*with rope_scaling"),
    ({"hf_overrides": {"vocab_size": "many"}}, "vocab_size.*with hf_overrides"),
    ({"hf_overrides": {"rope_parameters": {"factor": 2.0}}}, "no 'factor'.*with hf_overrides"),
], ids=str)
def test_what_cannot_be_is_named(base: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        by_us(base, **settings)


def test_the_flags_say_what_is_wrong(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(base), "--hf-overrides", "{'a': 1}", "--prompt", "x"]) == 1
    assert "hf_overrides is not valid JSON" in capsys.readouterr().err


def test_stored_kv_is_kept_apart(base: Path, tmp_path: Path) -> None:
    """A block on disk was rotated by one rope; it is nothing for another."""
    tiers = {"host_cache_size": "4MiB", "disk_cache_size": "16MiB", "disk_cache_dir": str(tmp_path), "block_size": 8}

    def last(**settings: Any) -> int:
        with LLM(model=str(base), skip_tokenizer_init=True, dtype="float32", num_threads=1, num_kv_blocks=32,
                 max_model_len=64, **tiers, **settings) as llm:
            output = llm.generate([{"prompt_token_ids": IDS}], SamplingParams(temperature=0, max_tokens=1),
                                  use_tqdm=False)[0]
        assert output.num_cached_tokens is not None
        return output.num_cached_tokens

    first, again, other = last(), last(), last(rope_scaling=YARN)
    assert (first, other) == (0, 0) and again >= 16


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


def test_dynamic_rope_is_exact_or_refused(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """vllm#3488: beyond the original length transformers rotates a prompt by its own length; within, all is plain."""
    folder = edited(base, tmp_path, lambda config: {
        **config, "max_position_embeddings": 32, "rope_parameters": {**DYNAMIC, "rope_theta": 10000.0}})
    with caplog.at_level(logging.WARNING):
        assert by_us(folder, max_model_len=None) == pytest.approx(by_transformers(folder), abs=2e-4)
    assert "the longest sequence is 32 tokens and not 64" in caplog.text and "--allow-inexact-rope" in caplog.text
    with pytest.raises(ConfigError, match=r"max_model_len 64.*beyond 32 tokens.*--allow-inexact-rope"):
        by_us(folder)
    longer = PROMPT[:37]
    found, expected = by_us(folder, longer, allow_inexact_rope=True), by_transformers(folder, longer)
    assert max(abs(a - b) for a, b in zip(found, expected)) > 0.01, "then nothing need be refused"
