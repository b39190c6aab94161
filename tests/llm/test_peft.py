"""Adapters that PEFT itself wrote: the same log-probabilities as with PEFT, or refused with the member's name."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.runner.tiny_model import PROMPT, save_checkpoint
from xllm import LLM, SamplingParams
from xllm.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, about transformers and about what is tested here
IDS = PROMPT[:24]
SCORED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What the config says -> members of LoraConfig. Each differs in its answer from `plain`, with the same numbers.
HONOURED: dict[str, dict[str, Any]] = {
    "lora_alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "alpha of an ending": {"alpha_pattern": {"v_proj": 40}},
    "alpha of a name": {"alpha_pattern": {"model.layers.1.self_attn.q_proj": 40}},
    "alpha of an expression": {"alpha_pattern": {r"layers\.0\..*_proj": 40}},
    "alpha of a whole name": {"alpha_pattern": {"^model.layers.0.mlp.(up|gate)_proj": 40}},
    "alpha of alternatives": {"alpha_pattern": {"q_proj|v_proj": 40}},
    "alpha of a piece, which counts for nothing": {"alpha_pattern": {"roj": 400, "q_proj": 40}},
    "alpha of the first that fits": {"alpha_pattern": {".*_proj": 40, "q_proj": 400}},
    "rank of an ending": {"rank_pattern": {"v_proj": 2}},
    "rank and alpha of expressions": {"rank_pattern": {r".*\.1\..*": 6}, "alpha_pattern": {"o_proj": 9}},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 30}},
    "targets of an expression": {"target_modules": r".*\.1\..*_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "whole names": {"target_modules": ["model.layers.0.self_attn.q_proj", "down_proj"]},
    "excluded": {"exclude_modules": ["up_proj"]},
    "excluded by expression": {"exclude_modules": r".*layers\.0.*"},
    "layers": {"layers_to_transform": [1]},
    "one layer": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("peft") / "base")


@pytest.fixture(scope="module")
def llm(base: Path) -> Iterator[LLM]:
    with LLM(model=str(base), skip_tokenizer_init=True, dtype="float32", max_model_len=64, num_threads=1,
             num_kv_blocks=64, enable_lora=True) as engine:
        yield engine


def save_adapter(base: Path, folder: Path, **members: Any) -> None:
    """An adapter of random numbers, written by PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": ALL, "task_type": "CAUSAL_LM", **members})
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15)
    adapted.save_pretrained(folder)


@torch.inference_mode()
def by_peft(base: Path, folder: Path) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return scored(peft.PeftModel.from_pretrained(model, folder).eval()(torch.tensor([IDS])).logits[0])


def scored(logits_TV: torch.Tensor) -> list[float]:
    found = torch.log_softmax(logits_TV.double(), -1)
    return [found[index, token].item() for index, token in enumerate(IDS[1:])]


def by_us(llm: LLM, folder: Path | None) -> list[float]:
    if folder is not None:
        llm.load_adapter("x", folder)
    try:
        output = llm.generate([{"prompt_token_ids": IDS}], SCORED, use_tqdm=False, lora="" if folder is None else "x")
        assert output[0].prompt_logprobs is not None
        return [entry[token].logprob for entry, token in zip(output[0].prompt_logprobs[1:], IDS[1:])]
    finally:
        if folder is not None:
            llm.unload_adapter("x")


@pytest.fixture(scope="module")
def plain(base: Path, llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("plain")
    save_adapter(base, folder)
    return by_us(llm, folder)


def far(found: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, other, strict=True))


@pytest.mark.parametrize("case", HONOURED)
def test_equals_peft(base: Path, llm: LLM, plain: list[float], tmp_path: Path, case: str) -> None:
    save_adapter(base, tmp_path, **HONOURED[case])
    found = by_us(llm, tmp_path)
    assert far(found, by_peft(base, tmp_path)) < 2e-4
    if case not in ("gaussian", "orthogonal", "all-linear"):  # these say nothing about a trained adapter of ALL
        assert far(found, plain) > 0.01, "the member makes no difference"


def test_what_a_config_leaves_out_is_what_peft_means(base: Path, llm: LLM, tmp_path: Path) -> None:
    """Rank 8 and alpha 8, whatever the tensors' rank is."""
    save_adapter(base, tmp_path, r=8)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in ("r", "lora_alpha")}))
    assert far(by_us(llm, tmp_path), by_peft(base, tmp_path)) < 2e-4
    file.write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(ModelError, match=r"adapter_config\.json: r .*rank 4 .*have 8"):
        llm.load_adapter("x", tmp_path)


def test_an_adapter_of_the_bare_model(base: Path, llm: LLM, tmp_path: Path) -> None:
    """Trained without the head: the names of its layers lack `model.`, and patterns see them so."""
    model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=ALL, alpha_pattern={"^layers.0.*": 40}, task_type="FEATURE_EXTRACTION"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.15)
    adapted.save_pretrained(tmp_path)
    with torch.inference_mode():
        head = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).lm_head
        expected = scored(head(adapted.eval()(torch.tensor([IDS])).last_hidden_state[0]))
    assert far(by_us(llm, tmp_path), expected) < 2e-4


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "tomorrow's", 1])
def test_a_training_that_moved_the_base_is_refused(base: Path, llm: LLM, tmp_path: Path, start: object) -> None:
    save_adapter(base, tmp_path, **({"init_lora_weights": start} if start in ("pissa", "olora") else {}))
    rewrite(tmp_path, init_lora_weights=start)
    with pytest.raises(ModelError, match="init_lora_weights"):
        llm.load_adapter("x", tmp_path)


def rewrite(folder: Path, **members: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **members}))


@pytest.mark.parametrize(("members", "message"), [
    ({"alpha_pattern": {"(": 4}}, "alpha_pattern.*regular expression"), ({"alpha_pattern": [1]}, "alpha_pattern"),
    ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\.q_proj"), ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ({"rank_pattern": {"q_proj": 3}}, "rank_pattern.*rank 3"),
    ({"r": 2.5}, "r must be"), ({"lora_alpha": True}, "lora_alpha"),
    ({"target_modules": ["q_proj"]}, "target_modules"), ({"target_modules": []}, "target_modules"),
    ({"target_modules": 3}, "target_modules"), ({"exclude_modules": "("}, "exclude_modules"),
    ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
    ({"layers_to_transform": ["0"]}, "layers_to_transform"), ({"layers_to_transform": [0]}, "layers_to_transform"),
    ({"use_rslora": "yes"}, "use_rslora"), ({"a_later_member": True}, "a_later_member"),
])
def test_what_cannot_be_is_named(base: Path, llm: LLM, tmp_path: Path, members: dict[str, Any], message: str) -> None:
    save_adapter(base, tmp_path)
    rewrite(tmp_path, **members)
    with pytest.raises(ModelError, match=message):
        llm.load_adapter("x", tmp_path)


def test_members_that_peft_does_not_know_yet_pass_while_they_say_nothing(base: Path, llm: LLM, plain: list[float],
                                                                         tmp_path: Path) -> None:
    save_adapter(base, tmp_path)
    rewrite(tmp_path, a_later_member=False, another=None, a_third={})
    assert by_us(llm, tmp_path) == plain


def test_layers_without_tensors_are_logged(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from xllm.models.adapter import read_adapter

    save_adapter(base, tmp_path, target_modules=["q_proj"])
    rewrite(tmp_path, target_modules=["q_proj", "v_proj"])
    shapes = {f"model.layers.{layer}.self_attn.{name}": (64 if name == "q_proj" else 32, 64)
              for layer in (0, 1) for name in ("q_proj", "v_proj")}
    with caplog.at_level(logging.WARNING):
        read_adapter(tmp_path, shapes, 64)
    assert "lacks 2 of the layers" in caplog.text and "layers.0.self_attn.v_proj" in caplog.text


NOT_BUILT = {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "lora_only", "fan_in_fan_out": True,
             "lora_bias": True, "layer_replication": [[0, 1]], "trainable_token_indices": [3], "use_qalora": True,
             "alora_invocation_tokens": [5], "megatron_config": {"x": 1}, "target_parameters": ["mlp.w"],
             "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 2}, "kasa_config": {"beta": 0.1},
             "velora_config": {"scale": 1.0}, "monteclora_config": {"num_samples": 2}, "ensure_weight_tying": True,
             "task_type": "SEQ_CLS"}


@pytest.mark.parametrize("member", NOT_BUILT)
def test_what_is_not_built_is_refused(base: Path, llm: LLM, tmp_path: Path, member: str) -> None:
    save_adapter(base, tmp_path)
    rewrite(tmp_path, **{member: NOT_BUILT[member]})
    with pytest.raises(ModelError, match=member):
        llm.load_adapter("x", tmp_path)


def test_every_member_of_lora_config_is_known() -> None:
    from xllm.models.adapter_config import HARMLESS, HONOURED, REFUSED

    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert not known - {*HARMLESS, *HONOURED, *REFUSED}
    assert set(NOT_BUILT) == set(REFUSED)
