"""The model on the xtensor layout: the tokens and the very bits of block tables, whatever the pages went through."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from backends.backend import Backend
from backends.vmm import VmmDriver
from tests.runner.harness import Driver, make_config
from xllm.errors import ConfigError
from xllm.models.causal_lm import CausalLM
from xllm.runner.arena import Region
from xllm.runner.graphs import Forwarded
from xllm.runner.kv_cache import block_bytes, page_bytes, plan_num_blocks
from xllm.runner.model_runner import ModelRunner
from xllm.runner.virtual_rows import VirtualRows, make_virtual_rows

PROMPTS = {"a": list(range(5, 40)), "b": [9, 8, 7], "c": [*range(5, 25), 60, 61, 62]}


@pytest.fixture(autouse=True)
def _needs_vmm(backend: Backend) -> None:
    if backend.vmm is None:
        pytest.skip("no virtual memory management here")


def run(driver: Driver, *, drafts: int = 0) -> dict[str, list[int]]:
    """Prefill in chunks beside decoding rows; one leaves and its successor shares a prefix."""
    for name, prompt in PROMPTS.items():
        driver.add(name, prompt)
        driver.step({name: min(13, len(prompt))})
    for _ in range(20):
        driver.step(max_drafts=drafts)
    outputs = {name: seq.output[:20] for name, seq in driver.seqs.items()}
    gone = driver.remove("a")
    driver.free_blocks = [block for block in driver.free_blocks if block not in gone.blocks[:4]]
    driver.add("d", [*PROMPTS["a"][:32], 1, 2], num_computed=32, blocks=gone.blocks[:4])
    outputs["d"] = driver.generate("d", 12, max_drafts=drafts)
    return outputs


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("limit", [None, 0, 4, 9])
def test_tokens_are_those_of_block_tables(make_driver: Callable[..., Driver], drafts: int, limit: int | None) -> None:
    settings = {"speculative_method": "ngram", "num_speculative_tokens": drafts} if drafts else {}
    paged = run(make_driver(**settings), drafts=drafts)
    driver = make_driver(**settings, kv_layout="xtensor", xtensor_max_mappings=limit)
    assert run(driver, drafts=drafts) == paged
    virtual = driver.runner.virtual_rows
    assert virtual is not None
    virtual.xtensor.check_integrity()
    assert (virtual.xtensor.counters.fallbacks > 0) == (limit is not None)
    assert (virtual.xtensor.counters.pages_mapped > 0) == (limit != 0)


def keep(seen: list[torch.Tensor | None], done: Forwarded) -> Forwarded:
    seen.append(done.hidden_TD)
    return done


def test_logits_are_the_same_bits(make_driver: Callable[..., Driver]) -> None:
    hidden: dict[str, list[torch.Tensor | None]] = {"paged": [], "xtensor": []}
    for layout, seen in hidden.items():
        driver = make_driver(kv_layout=layout)
        forward = driver.runner._forward
        driver.runner._forward = lambda *args, f=forward, s=seen: keep(s, f(*args))  # type: ignore[method-assign]
        run(driver)
    assert len(hidden["paged"]) == len(hidden["xtensor"]) > 20
    assert all(torch.equal(a, b) for a, b in zip(hidden["paged"], hidden["xtensor"]))


def test_copies_name_physical_blocks(make_driver: Callable[..., Driver]) -> None:
    """A prompt that is cached to its last token: that token is computed again, in a private copy of the last block."""
    outputs = []
    for layout in ("paged", "xtensor"):
        driver = make_driver(kv_layout=layout)
        first = driver.add("a", PROMPTS["a"][:32])
        wanted = driver.generate("a", 6)
        private = driver.free_blocks.pop()
        driver.copies.append((first.blocks[3], private))
        driver.add("b", PROMPTS["a"][:32], num_computed=31, blocks=[*first.blocks[:3], private])
        assert driver.generate("b", 6) == wanted
        outputs.append(wanted)
    assert outputs[0] == outputs[1]


def test_prepared_ahead_nothing_is_mapped_in_the_run(make_driver: Callable[..., Driver],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make_driver(kv_layout="xtensor")
    runner, calls = driver.runner, []
    virtual = runner.virtual_rows
    assert virtual is not None
    original, running = runner.run, [False]

    def run_prepared(plan):  # as the executor does it
        runner.prepare(plan)
        running[0] = True
        output = original(plan)
        running[0] = False
        return output

    def counted(pages_B: np.ndarray, blocks_B: np.ndarray, real=virtual.arena.map) -> np.ndarray:
        calls.append(running[0])
        return real(pages_B, blocks_B)

    monkeypatch.setattr(runner, "run", run_prepared)
    monkeypatch.setattr(virtual.arena, "map", counted)
    run(driver)
    assert len(calls) > 5 and not any(calls)


def test_a_refused_mapping_costs_no_token(make_driver: Callable[..., Driver], backend: Backend,
                                          caplog: pytest.LogCaptureFixture) -> None:
    paged = run(make_driver())
    driver = make_driver(kv_layout="xtensor")
    virtual, real = driver.runner.virtual_rows, backend.vmm
    assert virtual is not None and real is not None
    virtual.arena.driver = Flaky(real)  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        assert run(driver) == paged
    assert "refused" in caplog.text
    assert virtual.xtensor.counters.fallbacks


class Flaky:
    """Fails every third mapping, as Linux does at vm.max_map_count: what was mapped there is gone."""

    def __init__(self, real: VmmDriver):
        self.real, self.num_calls = real, 0

    def map(self, address: int, pool: object, first_page: int, num_pages: int, *, touch: bool) -> None:
        self.num_calls += 1
        if self.num_calls % 3 == 0:
            self.real.unmap(address, num_pages * pool.page_bytes)  # type: ignore[attr-defined]
            raise MemoryError("Cannot allocate memory")
        self.real.map(address, pool, first_page, num_pages, touch=touch)


def test_the_cap_is_said_once(make_driver: Callable[..., Driver], caplog: pytest.LogCaptureFixture) -> None:
    driver = make_driver(kv_layout="xtensor", xtensor_max_mappings=2)
    with caplog.at_level(logging.WARNING):
        run(driver)
    assert [r.message for r in caplog.records] == ["more than 2 mappings: sequences fall back to block tables"]


def test_a_device_without_virtual_memory_runs_on_block_tables(model: CausalLM, backend: Backend,
                                                              caplog: pytest.LogCaptureFixture) -> None:
    plain = type(backend)(compiled=False)
    plain.vmm = None  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        runner = ModelRunner(make_config(kv_layout="xtensor"), plain, model, num_blocks=64)
    assert runner.virtual_rows is None
    assert "runs on block tables" in caplog.text
    config = make_config(kv_layout="xtensor", block_size=5)
    content = block_bytes(plain, model.kv_specs, 5, torch.float32)
    assert page_bytes(config, plain, model.kv_specs, torch.float32) == content


def test_blocks_are_padded_to_whole_pages(model: CausalLM, backend: Backend) -> None:
    assert backend.vmm is not None
    granule = backend.vmm.granularity_bytes
    config = make_config(kv_layout="xtensor", block_size=5, num_kv_blocks=None, kv_cache_memory_bytes=50 * granule)
    content = block_bytes(backend, model.kv_specs, 5, torch.float32)
    padded = page_bytes(config, backend, model.kv_specs, torch.float32)
    assert content < padded == -(-content // granule) * granule
    assert plan_num_blocks(config, backend, model.kv_specs, torch.float32) == 50 * granule // padded


@pytest.mark.parametrize(("pages_per_row", "bytes_per_page", "words"), [
    (2**26, 4096, "more tokens than slots"), (2**20, 2**34, "lower max_num_seqs"),
], ids=["slots", "addresses"])
def test_too_large(backend: Backend, pages_per_row: int, bytes_per_page: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_virtual_rows(make_config(kv_layout="xtensor"), backend, num_blocks=64,
                          regions=[Region.dense(bytes_per_page)], pages_per_row=pages_per_row, number_bytes=4)


def test_more_numbers_than_operators_count_are_refused(make_driver: Callable[..., Driver], backend: Backend,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """At start-up, with the number and what to do; what just fits runs, with fewer spare ranges, and is right."""
    free = make_driver(kv_layout="xtensor")
    arena, xtensor = rows_of(free).arena, rows_of(free).xtensor
    numbers, num_rows = arena.page_bytes // 4, len(free.runner.rows.num_tokens)
    least = xtensor.num_blocks + num_rows * xtensor.pages_per_row
    assert least < arena.num_pages, "there are spare ranges"
    monkeypatch.setattr(type(backend), "max_cache_numbers", least * numbers - 1, raising=True)
    with pytest.raises(ConfigError, match=rf"{least * numbers} numbers.*count to {least * numbers - 1}.*paged"):
        make_driver(kv_layout="xtensor")
    monkeypatch.setattr(type(backend), "max_cache_numbers", least * numbers, raising=True)
    tight = rows_of(make_driver(kv_layout="xtensor"))
    assert tight.arena.num_pages == least and tight.xtensor.num_ranges == num_rows
    make_driver()  # block tables have a tensor a layer


def rows_of(driver: Driver) -> VirtualRows:
    rows = driver.runner.virtual_rows
    assert rows is not None
    return rows


def test_a_runner_gives_its_mappings_back(make_driver: Callable[..., Driver]) -> None:
    def num_mappings() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("memfd:xllm-kv")

    before = num_mappings()
    driver = make_driver(kv_layout="xtensor")
    run(driver)
    assert num_mappings() > before
    del driver
    assert num_mappings() == before
