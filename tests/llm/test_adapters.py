"""Adapters: many in one batch, each as if it were merged into the weights, with every feature on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runner.tiny_model import PROMPT, save_checkpoint
from xllm import LLM, SamplingParams
from xllm.errors import ConfigError, EngineStateError, ModelError, RequestError

RANKS = {"a": 4, "b": 7, "c": 1}
TARGETS = {"a": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
           "b": ("q_proj", "v_proj"), "c": ("down_proj", "up_proj")}
SAMPLING = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=2, logprobs=2)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {}, "chunked": {"max_num_batched_tokens": 11}, "graph": {"graph_mode": "checked"}, "xtensor": {
        "kv_layout": "xtensor"}, "ngram": {"speculative_method": "ngram"}, "preemption": {"num_kv_blocks": 9,
                                                                                         "watermark": 0.0},
    "inline": {"async_scheduling": False}, "tiers": {"host_cache_size": "4MiB"},
}


def write_adapter(folder: Path, name: str, shapes: dict[str, torch.Size], **config: Any) -> dict[str, torch.Tensor]:
    """An adapter of random numbers; returns what is to be added to each weight."""
    generator, rank = torch.Generator().manual_seed(ord(name[0])), RANKS[name[0]]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": list(TARGETS[name[0]]),
                "bias": "none", **config}
    scale = 6 / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    tensors, changes = {}, {}
    for layer, shape in shapes.items():
        if not layer.endswith(tuple(f"{target}.weight" for target in TARGETS[name[0]])):
            continue
        a = torch.randn(rank, shape[1], generator=generator) / shape[1]**0.5
        b = torch.randn(shape[0], rank, generator=generator) * 0.1
        stem = "base_model.model." + layer.removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, b
        changes[layer] = scale * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return changes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint, adapters a, b and c, and for each a checkpoint with the adapter merged into its weights."""
    root = tmp_path_factory.mktemp("lora")
    base = save_checkpoint(root / "base")
    weights = load_file(base / "model.safetensors")
    found = {"base": base}
    for name in RANKS:
        changes = write_adapter(root / name, name, {key: value.shape for key, value in weights.items()},
                                use_rslora=name == "b")
        merged = root / f"merged-{name}"
        merged.mkdir()
        for file in base.iterdir():
            (merged / file.name).write_bytes(file.read_bytes())
        save_file({key: value + changes.get(key, 0) for key, value in weights.items()}, merged / "model.safetensors")
        found |= {name: root / name, f"merged-{name}": merged}
    return found


def engine(folder: Path, **settings: Any) -> LLM:
    return LLM(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=64, num_threads=1,
               **{"num_kv_blocks": 64, **settings})


def modules(folders: dict[str, Path]) -> tuple[str, ...]:
    return tuple(f"{name}={folders[name]}" for name in RANKS)


@pytest.fixture(scope="module")
def merged(folders: dict[str, Path]) -> dict[str, Any]:
    """What the merged checkpoints (and the base, as "") say."""
    found = {}
    for name in ("", *RANKS):
        with engine(folders[f"merged-{name}" if name else "base"]) as llm:
            found[name] = llm.generate([{"prompt_token_ids": PROMPT[:25]}], SAMPLING, use_tqdm=False)[0]
    outputs = {tuple(output.outputs[0].token_ids) for output in found.values()}
    assert len(outputs) == 4, "the adapters make no difference"
    return found


def same(found: Any, expected: Any) -> None:
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    for ours, theirs in zip(found.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        first = next(iter(theirs))
        assert ours[first].logprob == pytest.approx(theirs[first].logprob, abs=2e-4)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_batch_of_adapters_equals_merged_weights(folders: dict[str, Path], merged: dict[str, Any],
                                                   feature: str) -> None:
    names = ["a", "", "b", "c", "a"]
    with engine(folders["base"], lora_modules=modules(folders), **FEATURES[feature]) as llm:
        for _ in range(2):  # the second time with a warm cache
            prompts = [{"prompt_token_ids": PROMPT[:25]}] * len(names)
            outputs = llm.generate(prompts, SAMPLING, use_tqdm=False, lora=names)
            for name, output in zip(names, outputs):
                same(output, merged[name])
        graphs = llm.stats().graphs
    if feature == "graph":
        assert any("lora" in kind for kind in graphs.replays_total)


def test_caches_are_kept_apart(folders: dict[str, Path], merged: dict[str, Any]) -> None:
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with engine(folders["base"], lora_modules=modules(folders), block_size=8) as llm:
        for _ in range(2):
            for name in ("a", "", "b"):
                output = llm.generate([{"prompt_token_ids": PROMPT[:25]}], plain, use_tqdm=False, lora=name)[0]
                assert output.outputs[0].token_ids == merged[name].outputs[0].token_ids
        assert output.num_cached_tokens >= 16, "the second turn finds what the first one left"


def test_adapters_come_and_go(folders: dict[str, Path], merged: dict[str, Any], tmp_path: Path) -> None:
    prompt = [{"prompt_token_ids": PROMPT[:25]}]
    with engine(folders["base"], enable_lora=True, max_loras=1, graph_mode="checked") as llm:
        with pytest.raises(RequestError, match="no adapter"):
            llm.generate(prompt, SAMPLING, use_tqdm=False, lora="a")
        for name in ("a", "b", "a"):
            llm.load_adapter(name, folders[name])
            same(llm.generate(prompt, SAMPLING, use_tqdm=False, lora=name)[0], merged[name])
            same(llm.generate(prompt, SAMPLING, use_tqdm=False)[0], merged[""])
            with pytest.raises(EngineStateError, match="max_loras"):
                llm.load_adapter("another", folders["c"])
            llm.unload_adapter(name)
        with pytest.raises(RequestError, match="no adapter"):
            llm.unload_adapter("a")
    with engine(folders["base"]) as llm, pytest.raises(EngineStateError, match="enable-lora"):
        llm.load_adapter("a", folders["a"])


def test_a_sleeping_engine_keeps_its_adapters(folders: dict[str, Path], merged: dict[str, Any]) -> None:
    with engine(folders["base"], lora_modules=modules(folders)) as llm:
        llm._core.control.sleep(2)
        llm._core.control.wake_up()
        same(llm.generate([{"prompt_token_ids": PROMPT[:25]}], SAMPLING, use_tqdm=False, lora="b")[0], merged["b"])


@pytest.mark.parametrize(("change", "message"), [
    ({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "bias"),
    ({"lora_alpha": "x"}, "lora_alpha"),
])
def test_what_is_not_built_is_named(folders: dict[str, Path], tmp_path: Path, change: dict, message: str) -> None:
    shapes = {key: value.shape for key, value in load_file(folders["base"] / "model.safetensors").items()}
    write_adapter(tmp_path / "x", "a", shapes, **change)
    with engine(folders["base"], enable_lora=True) as llm, pytest.raises(ModelError, match=message):
        llm.load_adapter("x", tmp_path / "x")


def test_broken_files_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    shapes = {key: value.shape for key, value in load_file(folders["base"] / "model.safetensors").items()}
    write_adapter(tmp_path / "x", "a", shapes)
    file = tmp_path / "x" / "adapter_model.safetensors"
    good = load_file(file)
    first = min(key for key in good if "lora_A" in key)
    bad: list[tuple[dict[str, torch.Tensor], str]] = [
        ({key: value for key, value in good.items() if key != first}, "lora_B only"),
        (good | {first: good[first][:, :-1].contiguous()}, "shapes"),
        (good | {first: torch.full_like(good[first], math.nan)}, "finite"),
        (good | {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}, "lm_head"),
        (good | {"base_model.model.x.weight": torch.zeros(2, 2)}, "neither"),
        ({}, "no lora_A"),
    ]
    with engine(folders["base"], enable_lora=True, max_lora_rank=4) as llm:
        for tensors, message in bad:
            save_file(tensors, file)
            with pytest.raises(ModelError, match=message):
                llm.load_adapter("x", tmp_path / "x")
        file.write_bytes(b"nothing")
        with pytest.raises(ModelError, match="corrupt"):
            llm.load_adapter("x", tmp_path / "x")
        with pytest.raises(ModelError, match="max_lora_rank"):
            llm.load_adapter("b", folders["b"])
        with pytest.raises(ModelError, match="does not exist"):
            llm.load_adapter("y", tmp_path)
        llm.load_adapter("c", folders["c"])
    with pytest.raises(ConfigError, match="NAME=FOLDER"):
        engine(folders["base"], lora_modules=("x",))
    with pytest.raises(ConfigError, match="lora_modules: x"):
        engine(folders["base"], lora_modules=(f"x={tmp_path}",))
