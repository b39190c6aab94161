"""What `e2e` compares engines of other numbers with is not what it compares the others with: each difference shows."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import e2e
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Device
from benchmarks.gpu.e2e_ways import PLAIN, more_ways
from benchmarks.gpu.profile import TINY
from benchmarks.gpu.results import FAILED, OK, ResultFile
from benchmarks.gpu.small_models import save

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("Qwen3", tmp_path_factory.mktemp("small") / "model", large=False)


def check(folder: Path, checkpoint: Path, name: str, **changed: Any) -> dict[str, Any]:
    """The row of a way of which transformers is told something else than the engine."""
    bench = Bench(Device("cpu"), TINY, ResultFile(folder), until_s=time.time() + 100, scratch=folder, out=folder)
    bench.section = "e2e"
    way = replace(more_ways(bench.device)[name], **changed)
    e2e._check_way(bench, name, checkpoint, e2e.Truths(checkpoint, bench.device.torch), way)
    [row] = bench.results.rows
    return row


@pytest.mark.parametrize(("name", "changed"), [
    ("kv int8", {"kv_format": "fp8"}), ("kv fp8", {"kv_format": "int8"}), ("weights int8", {"quantization": "fp8"}),
    ("weights w8a8", {"quantization": "fp8", "settings": {**PLAIN, "quantization": "w8a8"}}),
])  # fmt: skip
def test_what_transformers_does_otherwise_shows(tmp_path: Path, checkpoint: Path, name: str,
                                                changed: dict[str, Any]) -> None:
    row = check(tmp_path, checkpoint, name, **changed)
    assert row["status"] == FAILED and "logprobs differ" in row["why"]


def test_another_adapter_shows(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2e.Truths, "of", lambda self, way, adapter, of=e2e.Truths.of: of(
        self, way, {"adapter-0": "adapter-1"}.get(adapter, adapter)))
    row = check(tmp_path, checkpoint, "adapters")
    assert row["status"] == FAILED and "logprobs differ" in row["why"]


def test_grammars_are_followed_as_the_likeliest_letters(tmp_path: Path, checkpoint: Path) -> None:
    """With llguidance, which a machine with a GPU may lack."""
    row = check(tmp_path, checkpoint, "structured")
    assert row["status"] == OK, row["why"]
    assert row["places_ahead"] > row["places"] / 2


def test_a_refusal_is_no_fault(tmp_path: Path, checkpoint: Path) -> None:
    row = check(tmp_path, checkpoint, "kv fp8", settings={"kv_cache_dtype": "fp8", "dtype": "float32",
                                                          "kv_store_dtype": "int8"})  # fmt: skip
    assert row["status"] == "absent" and row["why"].startswith("refused: kv_store_dtype")
