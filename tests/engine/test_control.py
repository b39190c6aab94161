"""An engine that is paused, put to sleep and woken loses nothing but what was asked for."""

from __future__ import annotations

import gc
import weakref

import pytest

from tests.engine.test_core import drain, make_core
from xllm.engine.core import EngineCore
from xllm.engine.gates import PauseMode
from xllm.errors import EngineStateError, RequestError
from xllm.request import FinishReason, OutputDelta, Request, SamplingParams
from xllm.worker.messages import Done, Sleep, Wake


def request(name: str, num_tokens: int = 12) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=[5, 6, 7, 8, *name.encode()], sampling=sampling)


def tokens(outputs: dict[str, list[OutputDelta]], name: str) -> list[int]:
    return [token for delta in outputs[name] for token in delta.token_ids]


@pytest.fixture(scope="module", params=[True, False], ids=["overlap", "inline"])
def core(request):
    core = make_core(async_scheduling=request.param, enable_prefix_caching=True)
    yield core
    core.shutdown()


@pytest.fixture(scope="module")
def plain(core: EngineCore) -> list[int]:
    core.add(request("a"))
    return tokens(drain(core), "a")


def steps(core: EngineCore, count: int, outputs: dict[str, list[OutputDelta]]) -> None:
    for _ in range(count):
        for delta in core.step():
            outputs.setdefault(delta.request_id, []).append(delta)


def test_kept_requests_go_on_where_they_were(core: EngineCore, plain: list[int]) -> None:
    outputs: dict[str, list[OutputDelta]] = {}
    core.add(request("a"))
    steps(core, 5, outputs)
    core.control.pause(PauseMode.KEEP)
    core.add(request("b"))
    while core.has_work():
        steps(core, 1, outputs)
    num_steps, num_tokens = core.loop.num_steps, len(tokens(outputs, "a"))
    assert 0 < num_tokens < 12 and core.num_open == 2 and "b" not in outputs
    core.control.resume()
    for name, deltas in drain(core).items():
        outputs.setdefault(name, []).extend(deltas)
    assert core.loop.num_steps > num_steps
    assert tokens(outputs, "a") == plain
    assert len(tokens(outputs, "b")) == 12


def test_aborted_requests_end_and_new_ones_wait(core: EngineCore) -> None:
    core.add(request("a"))
    core.step()
    core.control.pause(PauseMode.ABORT)
    core.add(request("b"))
    outputs = drain(core)
    assert outputs["a"][-1].finish_reason is FinishReason.ABORT and "b" not in outputs
    core.abort("b")
    assert drain(core)["b"][-1].finish_reason is FinishReason.ABORT
    core.control.resume()
    assert core.num_open == 0


def test_waiting_lets_open_requests_end(core: EngineCore, plain: list[int]) -> None:
    core.add(request("a"))
    core.control.pause(PauseMode.WAIT)
    core.add(request("b"))
    outputs = drain(core)
    assert tokens(outputs, "a") == plain and "b" not in outputs
    with pytest.raises(RequestError, match="in use"):
        core.add(request("b"))
    core.control.resume()
    assert len(tokens(drain(core), "b")) == 12


@pytest.mark.parametrize("level", [1, 2])
def test_a_woken_engine_answers_as_before(core: EngineCore, plain: list[int], level: int) -> None:
    caches = [weakref.ref(cache) for layer in core.link.worker.runner.kv_cache.layers for cache in layer]
    core.control.sleep(level)
    gc.collect()
    assert not any(cache() is not None for cache in caches), "the KV cache is still there"
    with pytest.raises(RequestError, match="sleeps"):
        core.add(request("a"))
    assert core.stats().num_free_blocks == core.num_blocks
    core.control.wake_up()
    core.add(request("a"))
    outputs = drain(core)
    assert tokens(outputs, "a") == plain
    assert outputs["a"][0].num_cached_tokens == 0


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("last", ["wake_up", "resume"])
def test_what_was_held_when_it_fell_asleep_waits_for_both(core: EngineCore, level: int, last: str) -> None:
    core.control.pause(PauseMode.KEEP)
    core.add(request("held"))
    core.control.sleep(level)
    steps = [core.control.wake_up, core.control.resume]
    for step in steps if last == "resume" else reversed(steps):
        assert not drain(core)
        step()
    assert len(tokens(drain(core), "held")) == 12


def test_stats_are_told_while_it_falls_asleep(core: EngineCore) -> None:
    """Another thread asks for them, at any moment."""
    core.scheduler.forget_runner()
    core.link.call(Sleep(keep_weights=True), Done)
    assert core.stats().num_running == 0
    core.link.call(Wake(), Done)


def test_what_was_cached_is_forgotten(core: EngineCore) -> None:
    long = Request(request_id="c", prompt_token_ids=list(range(64)), sampling=SamplingParams(max_tokens=1))
    core.add(long)
    drain(core)
    assert core.control.reset_prefix_cache() >= 4
    core.add(long)
    assert drain(core)["c"][0].num_cached_tokens == 0


def test_sleep_is_refused_where_it_would_lose_something(core: EngineCore) -> None:
    with pytest.raises(RequestError, match="level"):
        core.control.sleep(3)
    core.add(request("a"))
    with pytest.raises(EngineStateError, match="open"):
        core.control.sleep(1)
    drain(core)
    tiered = make_core(host_cache_size="1MiB", enable_prefix_caching=True)
    with pytest.raises(EngineStateError, match="tiers"):
        tiered.control.sleep(1)
    tiered.shutdown()
