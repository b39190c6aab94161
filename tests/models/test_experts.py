"""Models with experts: their files, what is refused, formats of the weights, long steps, and the engine above them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends.backend import Backend
from backends.cpu.cpu import CpuBackend
from backends.opset import EXPERT_OPS
from backends.reference import REFERENCE
from tests.models.checkpoints import BY_ID, PROMPT, save_checkpoint, transformers_greedy
from tests.models.harness import PagedRunner, greedy
from tests.ops.test_linear import stored_weight
from xllm import LLM, SamplingParams, env
from xllm.errors import ConfigError, ModelError
from xllm.layers import experts, workspace
from xllm.layers.workspace import Workspace
from xllm.models.footprint import StoredShape, footprint
from xllm.models.loader import load_model
from xllm.models.model_registry import read_model_config
from xllm.worker.loading import _check_ops

Make = Callable[[str], Path]
APART, STACKED = "qwen3-moe", "qwen2-moe-stacked-no-bias-normalised"
EXPERTS = "model.layers.1.mlp.experts"


def load(folder: Path, backend: Backend, **options: Any) -> Any:
    return load_model(folder, backend=backend, dtype=torch.float32, max_model_len=128, **options)


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def change_config(folder: Path, **members: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **members}))
    return folder


@pytest.mark.parametrize(("variant", "change", "message"), [
    (APART, lambda w: w.pop(f"{EXPERTS}.9.down_proj.weight"),
     rf"'{EXPERTS}.9.down_proj.weight' is missing in .*model.safetensors"),
    (APART, lambda w: w.update({f"{EXPERTS}.10.up_proj.weight": torch.zeros(40, 64)}),
     rf"'{EXPERTS}.10.up_proj.weight' is not part of this architecture"),
    (APART, lambda w: w.update({f"{EXPERTS}.3.gate_proj.weight": torch.zeros(41, 64)}),
     rf"'{EXPERTS}.3.gate_proj.weight' has shape \[41, 64\], the config asks for \[40, 64\]"),
    (STACKED, lambda w: w.update({f"{EXPERTS}.gate_up_proj": torch.zeros(11, 80, 64)}),
     rf"'{EXPERTS}.gate_up_proj' has shape \[11, 80, 64\], the config asks for \[10, 80, 64\]"),
    (STACKED, lambda w: w.pop(f"{EXPERTS}.down_proj"), rf"'{EXPERTS}.0.down_proj.weight' is missing"),
], ids=["missing", "extra", "wide", "stacked-extra", "stacked-missing"])
def test_missing_and_extra_experts_are_named(make_checkpoint: Make, backend: Backend, variant: str,
                                             change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    folder = make_checkpoint(variant)
    change_weights(folder, change)
    with pytest.raises(ModelError, match=message):
        load(folder, backend)


@pytest.mark.parametrize(("members", "message"), [
    ({"num_experts_per_tok": 11}, r"num_experts_per_tok \(11\) is more than there are experts \(10\)"),
    ({"num_local_experts": 4, "num_experts": 10}, "num_local_experts and num_experts differ"),
    ({"mlp_only_layers": ["1"]}, "mlp_only_layers must be a list of layer numbers"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer"),
    ({"num_local_experts": 2**40}, "num_local_experts must be an integer in"),
], ids=str)
def test_what_cannot_be(make_checkpoint: Make, members: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_model_config(change_config(make_checkpoint(APART), **members))


def test_the_older_name_of_the_number_of_experts(make_checkpoint: Make) -> None:
    folder = make_checkpoint(APART)
    config = read_model_config(folder)
    values = json.loads((folder / "config.json").read_text())
    for name in ("num_local_experts", "num_experts"):
        values.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**values, "num_experts": 10}))
    assert read_model_config(folder) == config
    assert config.experts_a_token == 3 and config.special_ops == EXPERT_OPS
    plain = read_model_config(change_config(folder, mlp_only_layers=[0, 1, 2]))
    assert plain.experts_a_token == 0 and not plain.special_ops


@pytest.mark.parametrize("size", [2, 4, 5])
def test_ranks_share_the_width_of_each_expert(make_checkpoint: Make, size: int) -> None:
    """Heads and the plain mlp divide by two and four, and the experts by two alone."""
    config = read_model_config(change_config(make_checkpoint("qwen2-moe"), moe_intermediate_size=42))
    if size == 2:
        return config.check_shared(size)
    with pytest.raises(ConfigError, match="width of an expert" if size == 4 else "heads"):
        config.check_shared(size)


def as_stored(weights: dict[str, Tensor], quantization: str) -> None:
    """What the codes of all products stand for; routers, gates and the table are not rounded."""
    for name, weight in weights.items():
        if weight.ndim == 2 and not name.endswith(("mlp.gate.weight", "expert_gate.weight", "embed_tokens.weight")):
            weights[name] = stored_weight(weight, quantization).float()


@pytest.mark.parametrize(("quantization", "most"), [("int8", 1e-4), ("fp8", 1e-4), ("w8a8", 0.15)])
def test_quantised_experts(make_checkpoint: Make, backend: Backend, quantization: str, most: float) -> None:
    """As if the checkpoint had the rounded weights; and the same bits whole and in chunks. Where inputs are rounded as
    well a token may get another expert, so that it is only near."""
    folder = make_checkpoint("qwen2-moe")
    model = load(folder, backend, quantization=quantization)
    change_weights(folder, lambda weights: as_stored(weights, "fp8" if quantization == "fp8" else "int8"))
    rounded_TV = PagedRunner(load(folder, backend), backend).step({"a": PROMPT})["a"]
    whole_TV = PagedRunner(model, backend).step({"a": PROMPT})["a"]
    assert float((whole_TV - rounded_TV).norm() / rounded_TV.norm()) < most
    _, chunked_TV = greedy(PagedRunner(model, backend), "a", PROMPT, (5, 11), 1)
    assert torch.equal(chunked_TV, whole_TV)


def test_long_steps_are_computed_a_part_at_a_time(make_checkpoint: Make, backend: Backend,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is the same, and the rows between the products are bounded."""
    folder = make_checkpoint("qwen2-moe")
    whole_TV = PagedRunner(load(folder, backend), backend).step({"a": PROMPT})["a"]
    monkeypatch.setattr(experts, "MAX_ROWS", 17)
    model, rows = load(folder, backend), []
    for layer in model._layers:
        def gated_linear(*given: Any, inner: Any = layer._mlp._gated_linear, **rooms: Tensor | None) -> Tensor:
            rows.append(len(result := inner(*given, **rooms)))
            return result

        layer._mlp._gated_linear = gated_linear
    parts_TV = PagedRunner(model, backend).step({"a": PROMPT})["a"]
    assert torch.equal(parts_TV, whole_TV)
    assert max(rows) == 15 and sum(rows) == 3 * 3 * len(PROMPT)


def test_layers_that_share_memory_compute_the_same(make_checkpoint: Make, backend: Backend,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads at once, each with steps of one part and of several."""
    folder, lengths = make_checkpoint("qwen2-moe"), (9, 2, 17, 5)
    plain, model = load(folder, backend), load(folder, backend, workspace=Workspace())
    expected = [PagedRunner(plain, backend).step({"a": PROMPT[:length]})["a"] for length in lengths]
    monkeypatch.setattr(experts, "MAX_ROWS", 17)
    monkeypatch.setattr(workspace, "LARGE_BYTES", 0)
    parts = load(folder, backend, workspace=Workspace())

    def steps(_: int) -> list[Tensor]:
        torch.set_grad_enabled(False)
        return [PagedRunner(each, backend).step({"a": PROMPT[:length]})["a"]
                for length in lengths for each in (model, parts)]

    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(steps, range(4)):
            assert all(torch.equal(*pair) for pair in zip(found[::2], expected, strict=True))
            assert all(torch.equal(*pair) for pair in zip(found[1::2], expected, strict=True))


def test_a_workspace_is_taken_again() -> None:
    memory = Workspace()
    many, few = (memory.take("a", rows, 300, torch.float32) for rows in (200, 150))
    assert many.shape == (200, 300) and few.shape == (150, 300) and many.data_ptr() == few.data_ptr()
    assert memory.take("b", 200, 300, torch.float32).data_ptr() != few.data_ptr()
    assert memory.take("a", 300, 300, torch.bfloat16).data_ptr() == few.data_ptr()
    assert memory.take("a", 2, 300, torch.float32).data_ptr() != few.data_ptr()  # a small one is new
    assert memory.take("a", 400, 300, torch.float32).shape == (400, 300)


@pytest.mark.parametrize(("variant", "shared", "shared_width"), [
    ("qwen2-moe", "shared_expert", 56), ("deepseek-v2-moe-stacked-all-layers", "shared_experts", 80)])
def test_adapters_of_experts_are_refused_by_name(make_checkpoint: Make, tmp_path: Path, variant: str, shared: str,
                                                 shared_width: int) -> None:
    """What else there is can be adapted, the shared expert too."""
    folder, adapter = make_checkpoint(variant), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    layers = ((f"mlp.{shared}.gate_proj", shared_width, True), ("mlp.experts.3.gate_proj", 40, False))
    for layer, width, is_built in layers:
        stem = f"base_model.model.model.layers.0.{layer}"
        save_file({f"{stem}.lora_A.weight": torch.ones(2, 64), f"{stem}.lora_B.weight": torch.ones(width, 2)},
                  adapter / "adapter_model.safetensors")
        settings = {"lora_modules": (f"a={adapter}",), "num_kv_blocks": 32, "max_model_len": 64, "num_threads": 1}
        if is_built:
            with LLM(str(folder), skip_tokenizer_init=True, **settings):
                continue
        with pytest.raises(ConfigError, match=rf"'model.layers.0.{layer}' is of an expert, and adapters of experts"):
            LLM(str(folder), skip_tokenizer_init=True, **settings)


@pytest.mark.parametrize("settings", [
    {"max_num_batched_tokens": 19, "enable_chunked_prefill": True}, {"kv_layout": "xtensor", "graph_mode": "checked"},
    {"speculative_method": "ngram", "num_speculative_tokens": 3, "num_kv_blocks": 24, "watermark": 0.0},
], ids=["chunked", "graphs", "preempted-drafts"])
def test_the_engine_runs_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Greedy tokens are those of transformers; twice, the second time from the prefix cache."""
    folder = save_checkpoint(BY_ID["qwen2-moe"], tmp_path)
    truth = transformers_greedy(folder).tokens[:24]
    greedily = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    prompts = [{"prompt_token_ids": PROMPT[:length]} for length in (37, 9, 23)]
    with LLM(str(folder), skip_tokenizer_init=True, **{
            "max_model_len": 96, "block_size": 4, "num_kv_blocks": 128, "num_threads": 1, **settings}) as llm:
        first, second = ([list(each.outputs[0].token_ids) for each in llm.generate(prompts, greedily, use_tqdm=False)]
                         for _ in range(2))
    assert first[0] == truth and second == first


def test_a_device_without_its_operators_refuses_it() -> None:
    """And starts models without experts."""
    backend = CpuBackend(cache_dir=env.cache_dir())
    backend.ops = replace(backend.ops, **{name: getattr(REFERENCE, name) for name in EXPERT_OPS})
    if backend.kernels == "plain torch":
        pytest.skip("no C compiler here")
    assert _check_ops(backend, True, frozenset()) == []
    with pytest.raises(ConfigError, match="slow reference: route, grouped_linear, gated_grouped_linear, combine"):
        _check_ops(backend, True, EXPERT_OPS)


def test_graphs_of_experts_that_torch_multiplies_are_refused(make_checkpoint: Make) -> None:
    with pytest.raises(ConfigError, match="graph_mode checked: graphs of experts in bfloat16 are not built for cpu"):
        LLM(str(make_checkpoint(APART)), skip_tokenizer_init=True, graph_mode="checked", dtype="bfloat16",
            num_kv_blocks=64, max_model_len=64)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read as Linux tells it")
def test_a_long_prompt_takes_no_more_memory_than_a_chunk() -> None:
    """Beside the prompt itself; and what is planned for steps covers it."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.expert_memory"], cwd=Path(__file__).parents[2], text=True,
                          capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert found["prompt_tokens"] == 32 * found["chunk_tokens"] == 32_768
    assert 8 * 2**20 < found["chunk_bytes"] <= found["prompt_bytes"] <= 1.1 * found["chunk_bytes"]
    shapes = {"model.embed_tokens.weight": (1, 256), f"{EXPERTS}.0.up_proj.weight": (128, 256),
              f"{EXPERTS}.0.down_proj.weight": (256, 128)}
    stored = {name: StoredShape(shape) for name, shape in shapes.items()}
    planned = footprint(stored, torch.float32, None, num_tokens=0, num_rows=0, expert_rows=experts.MAX_ROWS)
    assert found["prompt_bytes"] <= planned.steps <= 2.5 * found["prompt_bytes"]
