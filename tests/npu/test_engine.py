"""Whole engines on `npu:0`: they generate the CPU's tokens, with every feature, eagerly and through graphs."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from tests.npu.engines import BUNDLED, MIXTURES, PROMPTS, TINY, assert_same, plain, start, tokens
from xllm import LLM, SamplingParams
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.errors import ConfigError

EAGER, GRAPHS = {"graph_mode": "off"}, {"graph_mode": "auto"}


def graph_stats(llm: LLM) -> Any:
    return llm._core.link.worker.runner.graphs.stats()


@pytest.mark.parametrize("mode", [EAGER, GRAPHS], ids=["eager", "graphs"])
@pytest.mark.parametrize("model", [BUNDLED, *TINY, *MIXTURES])
def test_the_cpu_s_tokens(model: str, mode: dict[str, Any]) -> None:
    with start(model, "npu", **mode) as llm:
        assert_same(tokens(llm), plain(model))
        if mode is GRAPHS:
            assert sum(graph_stats(llm).replays_total.values()) > 10


def test_quantised_kv_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype int8: on npu KV has the compute type"):
        start(BUNDLED, "npu", kv_cache_dtype="int8")


def test_several_engines_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data_parallel_size 2: several engines share a CPU; .* is npu"):
        EngineCore(EngineConfig.from_flat(device="npu", data_parallel_size=2, max_model_len=256))


def test_sampled_tokens() -> None:
    """Temperature, top-k, top-p, min-p and penalties, each request with its own seed: as on the CPU, but where a draw
    falls next to the border of two tokens, and through graphs as without."""
    found = []
    for device, mode in (("cpu", EAGER), ("npu", EAGER), ("npu", GRAPHS)):
        with start(BUNDLED, device, **mode) as llm:
            found.append(tokens(llm, seeded=True))
    expected, eager, graphs = found
    assert eager == graphs
    assert sum(a == b for a, b in zip(eager, expected)) >= 4


FEATURES: dict[str, dict[str, Any]] = {
    "no overlap": {"async_scheduling": False},
    "chunked": {"max_num_batched_tokens": 23},
    "preemption": {"num_kv_blocks": 5, "enable_prefix_caching": False},
    "xtensor": {"kv_layout": "xtensor"},
    "xtensor, chunked": {"kv_layout": "xtensor", "max_num_batched_tokens": 29},
    "tiers": {"host_cache_size": "8MiB", "num_kv_blocks": 7},
    "larger blocks": {"block_size": 256, "max_model_len": 200},
    "graphs of chunks": {"graph_max_prefill_tokens": 64, "max_num_batched_tokens": 40},
}  # fmt: skip


def was_used(feature: str, llm: LLM) -> bool:
    stats = llm._core.stats()
    if feature == "preemption":
        return stats.preemptions_total > 0
    if feature.startswith("xtensor"):
        rows = llm._core.link.worker.runner.virtual_rows
        return rows is not None and rows.xtensor.counters.pages_mapped > 0
    if feature == "graphs of chunks":
        return any(key.startswith("mixed") for key in graph_stats(llm).replays_total)
    return True


@pytest.mark.parametrize("mode", [EAGER, GRAPHS], ids=["eager", "graphs"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, mode: dict[str, Any]) -> None:
    if feature == "graphs of chunks" and mode is EAGER:
        return
    with start("qwen3", "npu", **mode, **FEATURES[feature]) as llm:
        assert_same(tokens(llm), plain("qwen3"))
        assert was_used(feature, llm)


@pytest.mark.parametrize("mode", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_drafts(mode: dict[str, Any]) -> None:
    with start(BUNDLED, "npu", speculative_method="ngram", **mode) as llm:
        assert_same(tokens(llm), plain(BUNDLED))
        assert llm._core.stats().spec_accepted_tokens_total > 0
        assert mode is EAGER or any(key.startswith("verify") for key in graph_stats(llm).replays_total)


@pytest.mark.parametrize("mode", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_prefixes_are_found_again(mode: dict[str, Any]) -> None:
    """Also after they were evicted to host memory."""
    with start("llama-gqa", "npu", num_kv_blocks=7, host_cache_size="8MiB", **mode) as llm:
        for _ in range(3):
            assert_same(tokens(llm), plain("llama-gqa"))
        stats = llm._core.stats()
        assert stats.prefix_hits_total > 0 and sum(stats.cached_tokens_by_tier_total.values()) > 0


@pytest.mark.parametrize("mode", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_int8_weights(mode: dict[str, Any]) -> None:
    """Scales are rounded to the dtype of the activations here, to 11 bits."""
    with start(BUNDLED, "npu", quantization="int8", **mode) as llm:
        assert_same(tokens(llm), plain(BUNDLED, "int8"), tie=0.1)


def test_logprobs() -> None:
    wanted = SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    found = []
    for device in ("cpu", "npu"):
        with start("qwen3", device) as llm:
            found.append(llm.generate([{"prompt_token_ids": PROMPTS[1]}], wanted, use_tqdm=False)[0])
    mine, theirs = (output.outputs[0] for output in found)
    assert mine.token_ids == theirs.token_ids
    for ours, others in zip(mine.logprobs, theirs.logprobs):
        for token, entry in ours.items():
            assert token in others and entry.logprob == pytest.approx(others[token].logprob, abs=0.02)
    for ours, others in zip(found[0].prompt_logprobs[1:], found[1].prompt_logprobs[1:]):
        shared = set(ours) & set(others)
        assert shared and all(ours[t].logprob == pytest.approx(others[t].logprob, abs=0.03) for t in shared)


@pytest.mark.parametrize(("settings", "words"), [
    ({"block_size": 16}, "blocks of 128, 256, 384, 512 tokens, not of 16"),
    ({"dtype": "float32"}, "npu runs in bfloat16 or float16"),
    ({"quantization": "fp8"}, "not in fp8"),
], ids=str)
def test_what_it_lacks_is_said_at_the_start(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        start("qwen3", "npu", **settings)


def test_bfloat16_is_the_default() -> None:
    with start("qwen3", "npu", dtype="auto") as llm:
        assert str(llm._core.link.worker.runner.kv_cache.layers[0][0].dtype) == "torch.bfloat16"
        assert all(len(each) == 14 for each in tokens(llm))


def test_memory_goes_back() -> None:
    """An engine that is shut down leaves nothing on the device."""
    from tests.npu.device import npu

    before = None
    for _ in range(3):
        with start("qwen3", "npu", **GRAPHS) as llm:
            tokens(llm, PROMPTS[:2])
        del llm
        gc.collect()
        left = npu().available_memory_bytes()
        assert before is None or left >= before - 2**20
        before = left
