"""The checks of `ops` find operators that are wrong, in each of the ways that they are made for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.metadata import AttentionMetadata
from backends.reference.kv_codes import split_tiles
from benchmarks.gpu.device import Device
from benchmarks.gpu.op_cases import World
from benchmarks.gpu.ops import OPERATORS, examine, operators
from benchmarks.gpu.paged import PagedStep
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.spot import SPOTS, on_host
from tests.gpu_bundle.conftest import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

calls = count()


@pytest.fixture(scope="module")
def device() -> Device:
    return Device("cpu")


def complaints(device: Device, name: str, **broken: Any) -> list[str]:
    world = World(device, seed=1, cases=5, longest=60)
    world.ops = replace(world.ops, **broken)
    with torch.inference_mode():
        return [why for check in OPERATORS[name](world) if not check.absent and (why := examine(check)[1])]


def test_every_operator_has_cases() -> None:
    assert set(operators()) == set(OPERATORS), "add cases to benchmarks/gpu/op_cases*.py"


def good(device: Device, name: str) -> Any:
    return getattr(device.backend.ops, name)


def slightly_off(op: Any) -> Any:
    return lambda *args, **kwargs: op(*args, **kwargs) * 1.0001


def last_row_unwritten(op: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        result = op(*args, **kwargs)
        out = torch.empty(result.shape)
        out[:-1] = result[:-1]
        return out

    return run


def different_each_time(op: Any) -> Any:
    return lambda *args, **kwargs: op(*args, **kwargs) * (1 + 1e-6 * (next(calls) % 2))


@pytest.mark.parametrize("name", ["rms_norm", "silu_mul", "linear", "attention", "embedding"])
@pytest.mark.parametrize(("spoil", "said"), [
    (slightly_off, "relative error"), (last_row_unwritten, "NaN"), (different_each_time, "two runs differ"),
])  # fmt: skip
def test_what_is_wrong_is_found(device: Device, name: str, spoil: Any, said: str) -> None:
    assert complaints(device, name) == []
    assert any(said in why for why in complaints(device, name, **{name: spoil(good(device, name))}))


def test_reading_a_slot_that_nobody_owns(device: Device) -> None:
    """One more of the same block, where there is one."""
    def one_more(meta: AttentionMetadata) -> AttentionMetadata:
        return replace(meta, seq_lens_S=meta.seq_lens_S + (meta.seq_lens_S % meta.block_size > 0).int())

    def longer(name: str) -> Any:
        return lambda *args, **options: good(device, name)(
            *(one_more(a) if isinstance(a, AttentionMetadata) else a for a in args), **options)

    assert complaints(device, "attention", attention=longer("attention"), plan=longer("plan"))


def test_what_nobody_owns_is_nan(device: Device) -> None:
    step = PagedStep(device.backend, [1, 3], [17, 40], num_kv_heads=2, head_dim=8, dtype=torch.float32,
                     generator=device.generator(0))  # fmt: skip
    for cache in step.filled_caches():
        assert int((~cache.isnan()).sum()) == (17 + 40) * 2 * 8


def test_writing_where_nothing_is_to_be_written(device: Device) -> None:
    def everywhere(qkv: Tensor, positions: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor, meta: Any,
                   **options: Any) -> Tensor:
        meta = replace(meta, slot_mapping_T=meta.slot_mapping_T.clamp(min=0))
        return good(device, "qkv_rope_write")(qkv, positions, table, k_cache, v_cache, meta, **options)

    assert any("NaN" in why for why in complaints(device, "qkv_rope_write", qkv_rope_write=everywhere))


def test_a_token_of_no_right(device: Device) -> None:
    def argmax_always(logits: Tensor, *_: Any) -> Tensor:
        return logits.argmax(1)

    assert complaints(device, "sample", sample=argmax_always)
    assert complaints(device, "argmax", argmax=lambda logits: logits.shape[1] - 1 - logits.flip(1).argmax(1))


def test_blocks_that_come_back_changed(device: Device) -> None:
    def rounded(caches: Sequence[Tensor], *rest: Any, **options: Any) -> None:
        good(device, "import_blocks")(caches, *rest, **options)
        caches[1].copy_(caches[1].bfloat16().float())

    assert complaints(device, "import_blocks", import_blocks=rounded)


def test_codes_that_stand_for_other_numbers(device: Device) -> None:
    """Of caches of one byte a number alone: a hundredth more is in no other check."""
    def larger(qkv: Tensor, positions: Tensor, table: Tensor, k_cache: Tensor, *rest: Any, **options: Any) -> Tensor:
        q = good(device, "qkv_rope_write")(qkv, positions, table, k_cache, *rest, **options)
        if k_cache.dtype is torch.int8:
            split_tiles(k_cache)[1].mul_(1.01)
        return q

    wrong = complaints(device, "qkv_rope_write", qkv_rope_write=larger)
    assert wrong and all("relative error 0.00" in why or "relative error 0.01" in why for why in wrong)


@pytest.mark.parametrize("name", ["rms_norm", "silu_mul", "linear", "attention", "embedding"])
def test_what_is_wrong_is_found_at_real_sizes_too(device: Device, name: str) -> None:
    def faults(op: Any) -> list[str]:
        world = World(device, seed=1, cases=1, longest=60)
        world.ops = replace(world.ops, **{name: op})
        with torch.inference_mode():
            return [why for check in SPOTS[name](world, SHAPES["tiny"]) if (why := examine(on_host(check))[1])]

    assert faults(good(device, name)) == []
    assert faults(slightly_off(good(device, name)))


INTERPRETED = """
import sys, torch
from backends.cpu.cpu import CpuBackend
from backends.cuda import OPS
from benchmarks.gpu.device import Device
from benchmarks.gpu.op_cases import World
from benchmarks.gpu.ops import OPERATORS, examine
from cuda_ops.kv import cache_shape

class Interpreted(CpuBackend):
    name = "cuda"
    def __init__(self):
        super().__init__(compiled=False)
        self.ops = OPS
    def kv_cache_shape(self, *sizes):
        return cache_shape(*sizes)

for name in sys.argv[1:]:
    world = World(Device("cpu", Interpreted()), seed=3, cases=2, longest=40, dtypes=(torch.float16, torch.float32))
    print(name, [why for check in OPERATORS[name](world) if (why := examine(check)[1])])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_the_cuda_operators_pass_interpreted(tmp_path: Path) -> None:
    """With the cache's layout on CUDA and in half precision: what a GPU will be asked."""
    names = ["attention", "qkv_rope_write", "copy_blocks", "export_blocks", "argmax", "feed_tokens", "penalise",
             "apply_token_bitmask"]
    script = tmp_path / "interpreted.py"
    script.write_text(INTERPRETED)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", str(script), *names], capture_output=True, text=True,
                          env=environment, cwd=ROOT, timeout=100)  # fmt: skip
    assert done.stdout.splitlines() == [f"{name} []" for name in names], done.stderr[-2000:]
