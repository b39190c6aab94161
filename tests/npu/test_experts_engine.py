"""Whole engines with mixtures of experts: quantised, in the other dtype, in chunks, in the worst order of streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from npu_ops import moe
from tests.npu.engines import IS_REAL, assert_same, plain, prompt_logprobs, start, tokens


@pytest.mark.parametrize(("model", "quantization", "dtype", "distance"), [
    ("qwen3-moe", "w8a8", "float16", 0.1), ("mixtral", "w8a8", "bfloat16", 0.1), ("qwen3-moe", "int8", "float16", 0.03),
    ("qwen3-moe", None, "bfloat16", 0.1),
], ids=str)
def test_forms_of_weights(model: str, quantization: str | None, dtype: str, distance: float,
                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Through graphs the tokens without. Those of the CPU may be others: where a number is rounded otherwise, a token
    may get another expert. With w8a8 float16 and float32 on the CPU are twice as far apart."""
    product, taken, join, num_joined = moe.grouped_matmul, set(), moe.swiglu_quant, []

    def noted(**given: Any) -> torch.Tensor:
        taken.add((given["x_RX"].dtype, given["weight_EXY"].dtype))
        return product(**given)

    monkeypatch.setattr(moe, "grouped_matmul", noted)
    monkeypatch.setattr(moe, "swiglu_quant", lambda **given: num_joined.append(1) or join(**given))
    settings: dict[str, Any] = {"quantization": quantization, "dtype": dtype}
    with start(model, "npu", **settings) as llm:
        found, ours = tokens(llm), prompt_logprobs(llm)
        assert sum(llm._core.link.worker.runner.graphs.stats().replays_total.values()) > 0
    assert_same(found, plain(model, quantization, "npu", dtype))
    with start(model, "cpu", **settings) as llm:
        assert (prompt_logprobs(llm) - ours).abs().mean() < distance
    numbers = getattr(torch, dtype)
    assert bool(num_joined) == ((model, quantization) == ("mixtral", "w8a8"))  # 40 of the other are no whole tiles
    assert taken == {(torch.int8 if quantization == "w8a8" else numbers, torch.int8 if quantization else numbers)}


def test_chunks_in_graphs() -> None:
    with start("qwen3-moe", "npu", max_num_batched_tokens=23, graph_max_prefill_tokens=64) as llm:
        assert_same(tokens(llm), plain("qwen3-moe"))
        assert any(key.startswith("mixed") for key in llm._core.link.worker.runner.graphs.stats().replays_total)


@pytest.mark.skipif(IS_REAL, reason="orders of the emulator")
@pytest.mark.parametrize("order", ["1", "2"])
def test_the_worst_order_of_streams(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checks, which wait for the device all the time."""
    from tests.emulated_npu.install import machine

    expected = plain("qwen3-moe")
    monkeypatch.setenv("XLLM_NPU_CHECK", "0")
    with start("qwen3-moe", "npu") as llm:
        machine().set_order(order)
        assert_same(tokens(llm), expected)
