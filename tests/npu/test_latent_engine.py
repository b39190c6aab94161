"""DeepSeek's latent attention in whole engines on `npu:0`: the CPU's tokens, with every feature that it goes with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.npu.engines import EXPANDED, IS_REAL, LATENT, SHARED, VOCAB_SIZE, assert_same, folder, plain, start, tokens
from tests.npu.test_latent import Taken
from xllm import LLM
from xllm.errors import ConfigError

EAGER, GRAPHS = {"graph_mode": "off"}, {"graph_mode": "auto"}
SETTINGS: dict[str, dict[str, Any]] = {
    "graphs": GRAPHS,
    "blocks of 16": {**GRAPHS, "block_size": 16, "num_kv_blocks": 60},
    "chunks": {**EAGER, "max_num_batched_tokens": 23},
    "preemption": {**GRAPHS, "num_kv_blocks": 5, "enable_prefix_caching": False},
    "tiers": {**GRAPHS, "host_cache_size": "8MiB", "block_size": 16, "num_kv_blocks": 16, "max_num_batched_tokens": 43},
    "eager, tiers": {**EAGER, "host_cache_size": "8MiB", "block_size": 16, "num_kv_blocks": 16},
    "xtensor": {**GRAPHS, "kv_layout": "xtensor"},
    "xtensor, chunks": {**EAGER, "kv_layout": "xtensor", "block_size": 16, "num_kv_blocks": 60,
                        "max_num_batched_tokens": 29, "host_cache_size": "8MiB"},
    "drafts": {**GRAPHS, "speculative_method": "ngram"},
    "many drafts": {**GRAPHS, "speculative_method": "ngram", "num_speculative_tokens": 17},
}
OTHERS = [[(token + 7 * i) % VOCAB_SIZE for token in SHARED] for i in range(1, 5)]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_cpu_s_tokens(name: str) -> None:
    """The second time prompts are cached, below the device where there are tiers."""
    settings = SETTINGS[name]
    with start(LATENT.id, "npu", **settings) as llm:
        for turn in range(2):
            if turn and "tiers" in name:
                tokens(llm, OTHERS)
            assert_same(tokens(llm), plain(LATENT.id))
        stats, graphs = llm._core.stats(), llm._core.link.stats().graphs
        assert (graphs is None) == (settings["graph_mode"] == "off")
        assert graphs is None or sum(graphs.replays_total.values()) > 10
        assert graphs is None or ("capture_failed" in graphs.fallbacks_total) == (name == "many drafts")
        assert stats.preemptions_total > 0 if name == "preemption" else stats.prefix_hits_total > 0
        if "xtensor" in name:
            assert mapped_pages(llm) > 0
        if "tiers" in name:
            assert stats.cached_tokens_by_tier_total["l3"] > 0
        if "drafts" in name:
            assert stats.spec_accepted_tokens_total > 0


def mapped_pages(llm: LLM) -> int:
    rows = llm._core.link.worker.runner.virtual_rows
    return 0 if rows is None else rows.xtensor.counters.pages_mapped


@pytest.mark.parametrize("name", ["graphs", "chunks", "xtensor", "tiers", "drafts"])
def test_chunks_that_are_expanded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms are taken in the same engine."""
    taken = Taken(monkeypatch)
    with start(EXPANDED.id, "npu", **SETTINGS[name]) as llm:
        for turn in range(2):
            if turn and "tiers" in name:
                tokens(llm, OTHERS)
            assert_same(tokens(llm), plain(EXPANDED.id))
    assert taken.num_pieces > 20 and sum(map(len, taken.expanded)) > (6 if name == "chunks" else 12)
    assert all(num_queries > 16 for batch in taken.expanded for num_queries, _ in batch)


def test_a_token_is_576_numbers_a_layer() -> None:
    with start(LATENT.id, "npu", **EAGER) as llm:
        assert [[part.shape[2:] for part in parts] for parts in llm._core.link.worker.runner.kv_cache.layers] == [
            [(1, 512), (1, 64)]] * 3
        assert llm._core.facts.placement.kv_token_bytes == 3 * 576 * 2


@pytest.fixture
def adversary() -> Iterator[Any]:
    from tests.emulated_npu.install import machine

    yield machine()
    machine().set_order(None)


@pytest.mark.skipif(IS_REAL, reason="orders of the emulator")
@pytest.mark.parametrize("order", ["1", "2"])
def test_whatever_the_order_of_the_streams(order: str, adversary: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain(LATENT.id)
    monkeypatch.setenv("XLLM_NPU_CHECK", "0")
    with start(LATENT.id, "npu", host_cache_size="8MiB", num_kv_blocks=7, speculative_method="ngram") as llm:
        adversary.set_order(order)
        for _ in range(2):
            assert_same(tokens(llm), expected)


@pytest.mark.parametrize(("model", "settings", "words"), [
    (LATENT.id, {"kv_layout": "xtensor", "max_num_seqs": 140}, "kv_layout xtensor: .* are one tensor of 2"),
    (LATENT.id, {"graph_max_prefill_tokens": 64}, "graph_max_prefill_tokens 64: graphs of chunks of DeepseekV3"),
    (LATENT.id, {"block_size": 256}, "block_size 256: .* blocks of 16 or 128 tokens, not of 256"),
    (LATENT.id, {"kv_cache_dtype": "int8"}, "kv_cache_dtype int8: on npu KV has the compute type"),
    ("deepseek-v3", {}, "takes latents of 512 numbers and 64 rotated ones, not of 24 and 8"),
], ids=str)
def test_what_it_lacks_is_said_at_the_start(model: str, settings: dict[str, Any], words: str) -> None:
    assert folder(model)
    with pytest.raises(ConfigError, match=words):
        start(model, "npu", **settings)
