"""Graph mode in whole engines: crowds that come and go, budgets that are too small, captures that fail."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import backends.npu_graphs
from backends.npu_graphs import NpuCapturer
from npu_ops.recording import TaskRecorder
from tests.npu.device import npu
from tests.npu.engines import IS_REAL, PROMPTS, VOCAB_SIZE, assert_same, plain, start, tokens
from xllm.request import Request, SamplingParams

MODEL = "qwen3"


def crowd(llm: Any, seed: int, num_requests: int = 18) -> dict[str, list[int]]:
    """Requests that come at random steps and stay for random times: rows join and leave, buckets are crossed."""
    rng, core, found, left = np.random.default_rng(seed), llm._core, {}, num_requests
    while left or core.has_work():
        while left and rng.random() < 0.3:
            left -= 1
            prompt = rng.integers(3, VOCAB_SIZE, size=int(rng.integers(1, 140))).tolist()
            wanted = SamplingParams(temperature=float(rng.choice([0.0, 0.8])), seed=left, ignore_eos=True,
                                    max_tokens=int(rng.integers(1, 25)))
            core.add(Request(request_id=str(left), prompt_token_ids=prompt, sampling=wanted, eos_token_ids=()))
            found[str(left)] = []
        for delta in core.step():
            found[delta.request_id] += delta.token_ids
    return found


def stats_of(llm: Any) -> Any:
    return llm._core.link.worker.runner.graphs.stats()


@pytest.fixture(scope="module")
def eager_crowds() -> dict[int, dict[str, list[int]]]:
    with start(MODEL, "npu", graph_mode="off") as llm:
        return {seed: crowd(llm, seed) for seed in range(3)}


@pytest.mark.parametrize("settings", [
    {}, {"kv_layout": "xtensor"}, {"graph_max_seqs": 3}, {"graph_max_graphs": 3}, {"async_scheduling": False},
], ids=str)
def test_eager_equals_graph(settings: dict[str, Any], eager_crowds: dict[int, dict[str, list[int]]]) -> None:
    with start(MODEL, "npu", **settings) as llm:
        for seed, expected in eager_crowds.items():
            found = crowd(llm, seed)
            same = sum(found[name] == expected[name] for name in expected)
            assert same == len(expected) or (IS_REAL and same >= 0.6 * len(expected))
        stats = stats_of(llm)
        assert len(stats.replays_total) > 0 and sum(stats.replays_total.values()) > 30
        if "graph_max_graphs" in settings:
            assert stats.evictions_total > 0 and stats.num_graphs <= 3
        if "graph_max_seqs" in settings:
            assert stats.fallbacks_total["no_bucket"] > 0


@pytest.fixture
def adversary() -> Iterator[Any]:
    """The emulated device in another legal order: each stream as late as it may."""
    from tests.emulated_npu.install import machine

    yield machine()
    machine().set_order(None)


@pytest.mark.skipif(IS_REAL, reason="orders of the emulator")
@pytest.mark.parametrize("settings", [
    {"host_cache_size": "8MiB", "num_kv_blocks": 7}, {"kv_layout": "xtensor"}, {"speculative_method": "ngram"},
    {"graph_mode": "off", "host_cache_size": "8MiB", "num_kv_blocks": 7},
], ids=str)
@pytest.mark.parametrize("order", ["1", "2"])
def test_whatever_the_order_of_the_streams(order: str, settings: dict[str, Any], adversary: Any,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checks, which wait for the device all the time."""
    expected = plain(MODEL)
    monkeypatch.setenv("XLLM_NPU_CHECK", "0")
    with start(MODEL, "npu", **settings) as llm:
        adversary.set_order(order)
        for _ in range(2):
            assert_same(tokens(llm), expected)


def test_captures_that_fail_are_counted_and_steps_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    add, calls = TaskRecorder.add, []

    def fails(self: TaskRecorder, issue: Any) -> None:
        calls.append(1)
        if len(calls) % 2:
            raise RuntimeError("error code is 107030 (made up)")
        add(self, issue)

    monkeypatch.setattr(TaskRecorder, "add", fails)
    with start(MODEL, "npu") as llm:
        assert_same(tokens(llm), plain(MODEL))
        stats = stats_of(llm)
        assert stats.num_graphs == 0 and stats.fallbacks_total["capture_failed"] > 1
    monkeypatch.undo()
    with start(MODEL, "npu") as llm:  # nothing is left behind
        assert_same(tokens(llm), plain(MODEL))
        assert "capture_failed" not in stats_of(llm).fallbacks_total


def test_memory_that_graphs_may_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    with start(MODEL, "npu", graph_memory="1KiB") as llm:
        assert_same(tokens(llm), plain(MODEL))
        assert stats_of(llm).num_bytes <= 1024


def test_streams_that_graphs_may_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runtime says is left beyond the reserve is enough for two graphs."""
    gc.collect()
    npu()
    available = NpuCapturer(npu().device)._count_streams()
    assert available is not None
    monkeypatch.setattr(backends.npu_graphs, "RESERVED_STREAMS", available - 2)
    with start(MODEL, "npu") as llm:
        capturer = llm._core.link.worker.runner.graphs.capturer
        assert capturer.max_streams == 2
        for seed in range(2):
            crowd(llm, seed)
        assert capturer.num_streams <= 2
        stats = stats_of(llm)
        assert stats.evictions_total > 0 or stats.fallbacks_total["cache_full"] > 0


SMALL = """
import json, sys
from tests.npu.engines import *
with start("qwen3", "npu") as llm:
    found = tokens(llm)
    stats = llm._core.link.worker.runner.graphs.stats()
    json.dump([found, stats.num_graphs, dict(stats.fallbacks_total)], sys.stdout)
"""


@pytest.mark.skipif(IS_REAL, reason="a device with few streams")
def test_a_device_with_few_streams() -> None:
    """Fewer than the reserve: no graph, every step eager, the same tokens."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SMALL], capture_output=True, text=True, timeout=200,
                          env={**os.environ, "EMULATED_NPU_STREAMS": "150"})
    assert done.returncode == 0, done.stderr
    found, num_graphs, fallbacks = json.loads(done.stdout)
    assert_same(found, plain(MODEL))
    assert num_graphs == 0 and fallbacks["over_budget"] > 0


def test_logits_and_hidden_states_too() -> None:
    """Graphs that end before the sampler: penalties, prompt logprobs."""
    wanted = [SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, presence_penalty=0.3),
              SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=1)]
    found = []
    for mode in ("off", "auto"):
        with start(MODEL, "npu", graph_mode=mode) as llm:
            outputs = llm.generate([{"prompt_token_ids": PROMPTS[1]}] * 2, wanted, use_tqdm=False)
            found.append([list(output.outputs[0].token_ids) for output in outputs])
            if mode == "auto":
                assert any("logits" in key for key in stats_of(llm).replays_total)
    assert found[0] == found[1]
