"""What a model is said to take before it is read is what it takes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backends.backend import Backend
from backends.cpu.kernels import PanelLinear
from backends.cpu.memory import available_bytes
from tests.models.checkpoints import BY_ID, save_checkpoint
from tests.models.fp8_checkpoints import to_fp8
from xllm import LLM
from xllm.errors import ConfigError
from xllm.hub import resolve_model_path
from xllm.models.footprint import StoredShape, footprint, weight_shapes
from xllm.models.fp8_format import Fp8Format
from xllm.models.loader import load_model

ROOT = Path(__file__).parents[2]


def kept_bytes() -> int:
    """Of all tensors that are alive, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        tensors = [thing] if type(thing) is torch.Tensor else []
        if type(thing) is PanelLinear:
            tensors = [getattr(thing, name, None) for name in PanelLinear.__slots__]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize("quantization", [None, "int8", "w8a8"])
@pytest.mark.parametrize("variant", ["llama-tied", "llama-bf16-on-disk", "mixtral", "mixtral-stacked-window-21",
                                     "demo"])
def test_the_weights_take_what_was_said(tmp_path: Path, backend: Backend, variant: str,
                                        quantization: str | None) -> None:
    folder = resolve_model_path(None) if variant == "demo" else save_checkpoint(BY_ID[variant], tmp_path / variant)
    said = footprint(weight_shapes(folder), torch.float32, quantization, num_tokens=8, num_rows=8)
    before = kept_bytes()
    model = load_model(folder, backend=backend, dtype=torch.float32, quantization=quantization, max_model_len=16)
    took = kept_bytes() - before
    assert model.generates
    assert said.weights == pytest.approx(took, rel=0.1), "rotary tables and filled-up panels are not counted"


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize(("variant", "changes"), [
    ("qwen3-moe", {"moe_intermediate_size": 48}), ("qwen3-moe-stacked-tied", {"moe_intermediate_size": 48}),
    ("deepseek-v3", {"q_lora_rank": 32})], ids=str)
def test_the_weights_of_a_checkpoint_of_fp8(tmp_path: Path, backend: Backend, variant: str,
                                            changes: dict[str, int], quantization: str | None) -> None:
    """As they are, and quantised otherwise. Widths fill the panels."""
    known, block = BY_ID[variant], (24, 20)
    folder = save_checkpoint(replace(known, changes={**known.changes, **changes}), tmp_path / variant)
    to_fp8(folder, block, tmp_path / "plain")
    said = footprint(weight_shapes(folder), torch.float32, quantization, num_tokens=8, num_rows=8,
                     kept=None if quantization else Fp8Format(*block))
    before = kept_bytes()
    model = load_model(folder, backend=backend, dtype=torch.float32, quantization=quantization, max_model_len=16)
    took = kept_bytes() - before
    assert model.generates
    assert said.weights == pytest.approx(took, rel=0.1)


def test_a_rank_reads_its_share_of_stacked_experts() -> None:
    """So that one of them, and not all, is the largest thing that is packed."""
    apart = {f"m.experts.{e}.{part}.weight": StoredShape((8, 8)) for e in range(6) for part in ("w1", "w2", "w3")}
    stacked = {"m.experts.gate_up_proj": StoredShape((6, 16, 8)), "m.experts.down_proj": StoredShape((6, 8, 8))}
    sizes = [footprint(each, torch.float32, None, num_tokens=1, num_rows=1, num_shares=2) for each in (apart, stacked)]
    assert sizes[0].weights == sizes[1].weights
    assert sizes[1].loading == 2 * sizes[0].loading == 4 * 16 * 8 // 2


def test_weights_that_cannot_fit_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """A file whose head promises more than this machine has; what it promises is a hole that takes no room on disk."""
    folder = save_checkpoint(BY_ID["llama-tied"], tmp_path / "model")
    num_rows = 3 * available_bytes() // 2 // 256
    head = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [num_rows, 64],
                                                     "data_offsets": [0, num_rows * 256]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + num_rows * 256)
    with pytest.raises(ConfigError, match=r"the weights take .* GiB as float32, and .* GiB of memory is available"):
        LLM(str(folder), skip_tokenizer_init=True, device="cpu")
    with pytest.raises(ConfigError, match="take a smaller model"):
        LLM(str(folder), skip_tokenizer_init=True, device="cpu", dtype="bfloat16", worker_ranks=2, worker="processes")


def test_steps_that_cannot_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs \d+ KV blocks .* for weights and steps, .*lower max_num_batched_to"):
        LLM(device="cpu", max_num_batched_tokens=available_bytes() // 1000)


def test_a_limit_of_address_space_counts() -> None:
    code = ("import resource; from backends.cpu.memory import available_bytes\n"
            "mapped = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**26,) * 2)\n"
            "print(available_bytes())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert 0 < int(done.stdout) <= 2**26


@pytest.mark.parametrize(("settings", "is_slow", "is_advised"), [
    ({"dtype": "bfloat16"}, True, False), ({"dtype": "float16"}, True, False), ({}, False, True),
    ({"dtype": "float32", "quantization": "w8a8"}, False, False)], ids=str)
def test_a_dtype_that_no_kernel_computes_in_is_warned_of(caplog: pytest.LogCaptureFixture, settings: dict[str, str],
                                                         is_slow: bool, is_advised: bool) -> None:
    with LLM(device="cpu", num_kv_blocks=256, **settings) as llm:
        at = llm.facts.placement
    slow = [record.getMessage() for record in caplog.records if "is slow on this device" in record.getMessage()]
    assert len(slow) == is_slow and all(f"dtype {settings['dtype']}" in text and "--dtype float32" in text
                                        for text in slow)
    assert (at.device, at.dtype) == ("cpu", settings.get("dtype", "float32"))
    assert ("--quantization w8a8" in at.advice) == is_advised
