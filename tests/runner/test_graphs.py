"""Steps through captured graphs give what eager steps give, token for token, whoever joins or leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from backends import get_backend
from backends.backend import Backend
from graph.checking import GraphCheckError
from tests.runner.harness import Driver, make_config
from tests.runner.test_speculation import Oracle
from tests.runner.tiny_model import PROMPT, Truth
from xllm import env
from xllm.config import EngineConfig
from xllm.errors import ConfigError
from xllm.models.causal_lm import CausalLM
from xllm.models.loader import load_model
from xllm.request import SamplingParams
from xllm.runner import graphs
from xllm.runner.batch import HostBatch
from xllm.runner.model_runner import ModelRunner

MakeDriver = Callable[..., Driver]
CHECKED = {"graph_mode": "checked"}
NAMES = [f"s{i}" for i in range(24)]


def sampling_of(i: int) -> SamplingParams:
    """Greedy, truncated, with logprobs, with history: every kind of sampling in one batch."""
    extra = [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 20}, {"temperature": 0.7, "top_p": 0.8, "logprobs": 2},
             {"temperature": 1.1, "min_p": 0.05}, {"temperature": 0.0, "repetition_penalty": 1.3},
             {"temperature": 0.8, "min_tokens": 6, "prompt_logprobs": 1}][i % 6]
    return SamplingParams(max_tokens=None, **extra)


def plain(i: int) -> SamplingParams:
    return SamplingParams(temperature=0.0 if i % 2 else 0.8, max_tokens=None)


def prompt_of(i: int) -> list[int]:
    return [(7 * i + 3 * j * j) % 199 for j in range(1 + i * 5 % 19)]


def wander(driver: Driver, seed: int, sampling: Callable[[int], SamplingParams], *, num_steps: int = 60,
           max_drafts: int = 0) -> dict[str, list[int]]:
    """Sequences join, leave and are run in random groups; the outputs of all, by name."""
    rng, waiting, outputs = np.random.default_rng(seed), list(range(len(NAMES))), {}
    for _ in range(num_steps):
        while waiting and driver.free_rows and (not driver.seqs or rng.random() < 0.3):
            i = waiting.pop()
            driver.add(NAMES[i], prompt_of(i), sampling(i), seed=i)
        names = [name for name in driver.seqs if rng.random() < 0.8] or list(driver.seqs)[:1]
        chunks = {}
        for name in names:
            left = len(driver.seqs[name].tokens) - driver.seqs[name].num_computed
            chunks[name] = int(rng.integers(1, left + 1))
        driver.step(chunks, max_drafts=max_drafts)
        for name in [name for name in driver.seqs if rng.random() < 0.04 or len(driver.seqs[name].tokens) > 100]:
            outputs[name] = driver.remove(name).output
    return outputs | {name: seq.output for name, seq in driver.seqs.items()}


def assert_equal(a: dict[str, list[int]], b: dict[str, list[int]]) -> None:
    """The same decisions were taken in both runs, so the outputs are equal whole."""
    assert a == b
    assert sum(map(len, a.values())) > 40


@pytest.mark.parametrize("sampling", [sampling_of, plain], ids=["all-kinds", "plain"])
@pytest.mark.parametrize("prefill", [0, 64])
@pytest.mark.parametrize("seed", [1, 2])
def test_joining_and_leaving(make_driver: MakeDriver, seed: int, prefill: int,
                             sampling: Callable[[int], SamplingParams]) -> None:
    eager, graphed = make_driver(), make_driver(**CHECKED, graph_max_prefill_tokens=prefill)
    assert_equal(wander(graphed, seed, sampling), wander(eager, seed, sampling))
    counters = graphed.runner.graphs.cache.counters
    kinds = {name.split("-")[0] for name in counters.replays}
    assert kinds == ({"decode", "mixed"} if prefill else {"decode"})
    assert {name.split("-")[2] for name in counters.replays} >= ({"tokens"} if sampling is plain else {"logits"})
    assert (counters.fallbacks["no_bucket"] > 0) == (not prefill)
    assert len({k.num_seqs for k, _ in graphed.runner.graphs.cache._entries}) >= 3


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_hidden_states_have_their_own_type(make_driver: MakeDriver, kv_cache_dtype: str) -> None:
    """Not that of the KV cache: a chunk that goes through a graph ends with hidden states."""
    outputs = []
    for settings in ({}, {**CHECKED, "graph_max_prefill_tokens": 64}):
        driver = make_driver(**settings, kv_cache_dtype=kv_cache_dtype)
        driver.add("a", PROMPT)
        driver.step({"a": 20})
        outputs.append(driver.generate("a", 8))
    assert outputs[0] == outputs[1]
    assert driver.runner.graphs.cache.counters.replays["mixed-table-hidden"] == 2


@pytest.mark.parametrize("layout", ["paged", "xtensor"])
def test_drafts_are_verified_in_graphs(make_driver: MakeDriver, layout: str) -> None:
    """Rows with different numbers of drafts, so that padding tokens need padding rows."""
    plain_driver = make_driver()
    for i in range(5):
        plain_driver.add(NAMES[i], prompt_of(i), sampling_of(i), seed=i)
    for _ in range(45):
        plain_driver.step()
    answers = {seq.row: seq.tokens for seq in plain_driver.seqs.values()}
    driver = make_driver(**CHECKED, num_speculative_tokens=3, kv_layout=layout)
    driver.runner.proposer = Oracle(answers)
    for i in range(5):
        driver.add(NAMES[i], prompt_of(i), sampling_of(i), seed=i)
    for turn in range(14):
        names = [name for j, name in enumerate(driver.seqs) if (turn + j) % 4]
        driver.step(dict.fromkeys(names, 0), max_drafts=turn % 4)
    for name, seq in driver.seqs.items():
        assert seq.output == plain_driver.seqs[name].output[: len(seq.output)]
    assert driver.num_accepted > 20
    counters = driver.runner.graphs.cache.counters
    table = "table" if layout == "paged" else "base"
    assert counters.replays[f"verify-{table}-logits"] > 5


def test_logprobs_are_those_of_eager_steps(make_driver: MakeDriver) -> None:
    eager, graphed = make_driver(), make_driver(**CHECKED, graph_max_prefill_tokens=64)
    for driver in (eager, graphed):
        driver.add("a", PROMPT, SamplingParams(max_tokens=None, logprobs=3, prompt_logprobs=2), seed=5)
        driver.add("b", PROMPT[:9], SamplingParams(max_tokens=None, temperature=0.0, logprobs=0), seed=6)
        for chunk in (11, 1, 20, 0, 0, 0, 0):
            driver.step({"a": chunk, "b": 0})
    for name in ("a", "b"):
        for kind in ("logprobs", "prompt_logprobs"):
            theirs, ours = getattr(eager.seqs[name], kind), getattr(graphed.seqs[name], kind)
            assert len(theirs) == len(ours) and (theirs or name == "b")
            for a, b in zip(theirs, ours, strict=True):
                assert (a.token_id, a.rank, a.top_ids) == (b.token_id, b.rank, b.top_ids)
                assert (a.logprob, *a.top_logprobs) == pytest.approx((b.logprob, *b.top_logprobs), abs=1e-5)
    assert not graphed.runner.graphs.cache.counters.fallbacks


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_other_operators(checkpoint: Path, compiled: bool, dtype: str) -> None:
    backend = get_backend("cpu", cache_dir=env.cache_dir(), compiled=compiled)
    model = load_model(checkpoint, backend=backend, dtype=getattr(torch, dtype), max_model_len=128,
                       quantization="int8" if dtype == "float32" else None)
    outputs = []
    for settings in ({}, CHECKED):
        runner = ModelRunner(make_config(dtype=dtype, **settings), backend, model, num_blocks=64)
        outputs.append(wander(Driver(runner, num_blocks=64), 3, plain, num_steps=25))
    assert_equal(*outputs)


def test_a_row_that_fails_fails_alone(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make_driver(**CHECKED)
    for i in range(3):
        driver.add(NAMES[i], prompt_of(i), plain(i), seed=i)
    driver.step()
    honest = driver.runner._model.compute_logits

    def second_is_broken(hidden_SD: torch.Tensor) -> torch.Tensor:
        logits_SV = honest(hidden_SD)
        logits_SV[1, 3] = float("nan")
        return logits_SV

    monkeypatch.setattr(driver.runner._model, "compute_logits", second_is_broken, raising=False)
    output = driver.step()
    assert output.failed.keys() == {1} and "not finite" in output.failed[1]
    assert output.num_sampled_S.tolist() == [1, 0, 1]
    assert driver.runner.graphs.cache.counters.replays["decode-table-tokens"] == 1


def test_a_step_that_layer_by_layer_runs_eagerly(make_driver: MakeDriver, truth: Truth) -> None:
    driver = make_driver(**CHECKED)
    driver.add("a", PROMPT)
    driver.generate("a", 4)
    graphed = driver.runner.graphs
    batches: list[bool] = []
    run = graphed.run

    def with_loads(batch: HostBatch, rows_S: np.ndarray, *, layer_by_layer: bool) -> graphs.Forwarded | None:
        batches.append(layer_by_layer)
        return run(batch, rows_S, layer_by_layer=True)

    graphed.run = with_loads
    driver.generate("a", 8)
    graphed.run = run
    assert driver.generate("a", 12) == truth.tokens[:12]
    assert batches == [False] * 4
    assert graphed.cache.counters.fallbacks["kv_loads"] == 4


def test_parameters_that_are_not_issued_again_are_noticed(make_driver: MakeDriver,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned for 11 and 5 queries, replayed with 5 and 11: the last six have no unit of work."""
    honest = graphs.StepProgram.prepare
    monkeypatch.setattr(graphs.StepProgram, "prepare",
                        lambda self: honest(self) if self.meta.plan is None else None)
    driver = make_driver(**CHECKED, graph_max_prefill_tokens=16)
    driver.add("a", PROMPT)
    driver.add("b", PROMPT)
    driver.step({"b": 16})  # so that what a stale plan reads of `a` lies inside the table
    driver.step({"a": 11, "b": 5})
    driver.step({"b": 1})  # through the other buffer set
    with pytest.raises(GraphCheckError, match="holds memory that never was"):
        driver.step({"a": 5, "b": 11})


@pytest.mark.parametrize(("name", "value"), [("pad_slot", 0), ("pad_slot", 40)])
def test_padding_that_stores_its_keys_is_noticed(make_driver: MakeDriver, name: str, value: int,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make_driver(**CHECKED)
    monkeypatch.setattr(driver.runner.graphs.capturer, name, value, raising=False)
    with pytest.raises(GraphCheckError, match="leaked"):
        wander(driver, 1, plain)


def test_nothing_is_captured_beyond_the_limits(make_driver: MakeDriver) -> None:
    driver = make_driver(**CHECKED, graph_max_seqs=2, graph_max_graphs=2)
    for i in range(4):
        driver.add(NAMES[i], prompt_of(i), plain(i), seed=i)
    driver.step()
    for num in (4, 3, 2, 2, 1, 1, 2):
        driver.step(dict.fromkeys(NAMES[:num], 0))
    counters = driver.runner.graphs.cache.counters
    assert counters.replays == {"decode-table-tokens": 3}
    assert counters.fallbacks == {"no_bucket": 3, "cache_full": 2}
    stats = driver.runner.graphs.stats()
    assert (stats.num_graphs, stats.captures_total, stats.fallbacks_total["no_bucket"]) == (2, 2, 3)
    assert stats.num_bytes > 0


def test_long_logits_stay_out_of_the_graph(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LOGITS_BYTES", 4 * 211 * 2)
    eager, graphed = make_driver(), make_driver(**CHECKED)
    assert_equal(wander(graphed, 4, plain), wander(eager, 4, plain))
    assert graphed.runner.graphs.cache.counters.replays.keys() >= {"decode-table-hidden", "decode-table-tokens"}


def test_a_padding_row_that_is_longer_than_all_others(make_driver: MakeDriver) -> None:
    """17 tokens of 7 rows in a bucket of 32 and 8: one row of 15 tokens, two blocks, where the others have one."""
    outputs = []
    for settings in ({}, {**CHECKED, "graph_max_prefill_tokens": 64}):
        driver = make_driver(**settings)
        outputs.append([])
        for _ in range(4):  # twice in each buffer set
            for i, length in enumerate((3, 3, 3, 2, 2, 2, 2)):
                driver.add(NAMES[i], PROMPT[i : i + length])
            driver.step()
            outputs[-1] += [driver.remove(name).output for name in list(driver.seqs)]
    assert outputs[0] == outputs[1]
    assert [(k.num_tokens, k.num_seqs) for k, _ in driver.runner.graphs.cache._entries] == [(32, 8)] * 2


def test_without_graph_mode(backend: Backend, model: CausalLM) -> None:
    for mode in ("auto", "off"):  # a CPU has no capturer
        assert ModelRunner(make_config(graph_mode=mode), backend, model, num_blocks=64).graphs is None


@pytest.mark.parametrize(("setting", "value"), [
    ("graph_mode", "always"), ("graph_max_seqs", 0), ("graph_max_graphs", 0), ("graph_max_prefill_tokens", -1),
    ("graph_memory", "lots"),
])
def test_settings_that_cannot_work(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=setting):
        EngineConfig.from_flat(**{setting: value}).resolve(model_max_len=64, default_block_size=16)


@pytest.mark.parametrize("settings", [{}, {"kv_layout": "xtensor"}], ids=["paged", "xtensor"])
def test_warming_up_captures_ahead_and_changes_nothing(make_driver: MakeDriver, settings: dict) -> None:
    cold = make_driver(**CHECKED, **settings)
    warm = make_driver(**CHECKED, **settings, graph_warmup_seqs=3)
    blocks = [tensor[:64] for layer in warm.runner.kv_cache.layers for tensor in layer]  # behind them lie mapped pages
    before = [tensor.clone() for tensor in blocks]
    warm.runner.warm_up()
    cache = warm.runner.graphs.cache
    assert sorted(k.num_seqs for k, _ in cache._entries) == [1, 1, 2, 2, 4, 4]
    assert all(map(torch.equal, before, blocks))
    for driver in (cold, warm):
        for i in range(3):
            driver.add(NAMES[i], prompt_of(i), plain(i), seed=i)
        for _ in range(6):
            driver.step()
    assert cache.counters.captures == 6, "what was captured ahead is what steps ask for"
    assert [seq.output for seq in warm.seqs.values()] == [seq.output for seq in cold.seqs.values()]


def test_nothing_is_warmed_up_on_a_cpu_unless_asked(make_driver: MakeDriver) -> None:
    driver = make_driver(**CHECKED)
    driver.runner.warm_up()
    assert not len(driver.runner.graphs.cache)
    make_driver().runner.warm_up()
