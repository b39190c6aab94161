"""Several engines as one `EngineClient`, without a server: commands that one of them refuses, and their ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import replace

import pytest

from tests.llm.conftest import SETTINGS
from tests.llm.test_clients import idle, read
from xllm.client.replicas import Replicas, open_engine
from xllm.config import EngineConfig
from xllm.engine.commands import Expected
from xllm.errors import EngineDeadError, RequestError
from xllm.request import FinishReason, Request, SamplingParams


def make_request(name: str, prompt: tuple[int, ...], max_tokens: int = 8) -> Request:
    return Request(request_id=name, prompt_token_ids=prompt,
                   sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))


def tokens(seed: int, number: int = 40) -> tuple[int, ...]:
    return tuple(20 + (seed * 101 + place) % 800 for place in range(number))


async def test_two_engines(caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig.from_flat(**SETTINGS, max_num_seqs=2, max_waiting_requests=4, data_parallel_size=2)
    both = open_engine(config, lambda name, share, seconds: None)
    assert isinstance(both, Replicas)
    try:
        facts = await both.start()
        assert facts.num_blocks == 256 and both.is_up and both.phase == "ready"
        await _calls_go_to_one_engine_each(both)
        await _what_one_refuses_none_has_done(both)
        await _full_and_silent_engines_are_passed_by(both)
        with caplog.at_level(logging.ERROR):
            await _it_comes_back_as_the_others_are(both)
        assert not caplog.records
        await _none_is_left(both)
    finally:
        await both.shutdown()


async def _calls_go_to_one_engine_each(both: Replicas) -> None:
    shared = tokens(1)
    stream = both.submit([make_request("a", shared), make_request("b", shared), make_request("c", tokens(2))])
    with pytest.raises(RequestError, match="'b' is in use"):
        both.submit([make_request("b", tokens(3))])
    other = both.submit([make_request("d", tokens(4), 400)])
    assert (stream.engine, other.engine) == (0, 1) and set(both.request_ids) == {"a", "b", "c", "d"}
    await other.next()
    both.abort(["d", "nobody"])
    deltas = await read(stream)
    assert {delta.request_id for delta in deltas if delta.finish_reason is FinishReason.LENGTH} == {"a", "b", "c"}
    assert (await read(other))[-1].finish_reason is FinishReason.ABORT
    await idle(both)
    sent = [instance.sent for instance in both._fleet._instances.values()]
    assert [(one.num_open, one.waiting_tokens, one._promised) for one in sent] == [(0, 0, {})] * 2
    again = both.submit([make_request("e", shared)])
    assert again.engine == 0 and max(delta.num_cached_tokens for delta in await read(again)) == 32


async def _what_one_refuses_none_has_done(both: Replicas) -> None:
    """One has an open request, and cannot sleep; the other wakes up again, and has its cache no more."""
    stream = both.submit([make_request("f", tokens(5), 400)])
    busy = stream.engine
    refused = await both.control("sleep", level=1)  # which comes right behind it
    assert refused.is_state and refused.error is not None
    assert refused.error.startswith(f"engine {busy}: requests are open") and "cannot go back" not in refused.error
    assert [engine.sleep_level for engine in both.engines] == [0, 0]
    assert not len(both._fleet.index.keys_of(str(1 - busy), 0)), "it has told that"
    stream.close()
    await idle(both)
    while (done := await both.control("sleep", level=1)).error is not None:  # the step that was on its way
        assert "requests are open" in done.error
    assert [engine.sleep_level for engine in both.engines] == [1, 1] and both.sleep_level == 1
    assert (await both.control("wakeup")).state.sleep_level == 0


async def _full_and_silent_engines_are_passed_by(both: Replicas) -> None:
    prefix = tokens(6, 400)
    first = both.submit([make_request("g0", prefix)])
    there = first.engine
    await read(first)
    more = [both.submit([make_request(f"g{n}", (*prefix, n), 100)]) for n in range(1, 6)]
    assert [stream.engine for stream in more] == [there] * 4 + [1 - there], "four may wait"
    for stream in more:
        stream.close()
    await idle(both)
    both.engines[0]._heard_s -= 20.0
    silent = [both.submit([make_request(f"h{n}", tokens(n + 10), 4)]) for n in range(3)]
    assert [stream.engine for stream in silent] == [1] * 3
    for stream in silent:
        await read(stream)


async def test_two_engines_that_expect_kv() -> None:
    config = EngineConfig.from_flat(**SETTINGS, max_num_seqs=4, data_parallel_size=2, enable_disagg_pd=True,
                                    host_blocks_factor=1.0)
    both = open_engine(config, lambda name, share, seconds: None)
    assert isinstance(both, Replicas)
    try:
        await both.start()
        await _kv_is_expected_where_the_prefix_is(both)
        await _what_is_expected_is_used_or_taken_back(both)
    finally:
        await both.shutdown()


def counted(both: Replicas) -> list[tuple[int, int]]:
    """Of each engine: how many requests are open, and how many expected."""
    sent = [instance.sent for instance in both._fleet._instances.values()]
    return [(one.num_open, one.num_expected) for one in sent]


async def _kv_is_expected_where_the_prefix_is(both: Replicas) -> None:
    prefix = tokens(30, 100)
    first = both.submit([make_request("l0", prefix)])
    there = first.engine
    await read(first)
    more = both.submit([make_request("l1", prefix, 400)])  # though the other one has fewer requests
    assert more.engine == there
    found = await both.expect(make_request("l2", (*prefix, *tokens(31, 60))), 60.0)
    assert found.offer is not None and both._landings.engine_of(found.landing) == there
    assert counted(both)[there] == (1, 1) and counted(both)[1 - there] == (0, 0)
    both.unexpect(found.landing)
    both.unexpect(found.landing)
    both.unexpect(12345)
    assert counted(both)[there] == (1, 0) and not len(both._landings)
    more.close()
    await idle(both)


async def _what_is_expected_is_used_or_taken_back(both: Replicas) -> None:
    large = [await both.expect(make_request(f"m{n}", tokens(40 + n, 16 * 200)), 60.0) for n in range(3)]
    assert [found.offer is not None for found in large] == [True, True, False], "of 256 blocks of each engine"
    assert sorted(both._landings.engine_of(found.landing) for found in large[:2]) == [0, 1]
    assert counted(both) == [(0, 1)] * 2
    for found in large[:2]:
        both.unexpect(found.landing)
    assert counted(both) == [(0, 0)] * 2
    again = Expected(0)
    while again.offer is None:  # it takes the turn of a thread
        again = await both.expect(make_request("n", tokens(50, 16 * 200)), 60.0)
    both.unexpect(again.landing)
    prompt = tokens(51, 60)
    found = await both.expect(make_request("o", prompt), 0.3)
    there = both._landings.engine_of(found.landing)
    assert there is not None
    stream = both.submit([
        replace(make_request("o", prompt), landing=found.landing),
        replace(make_request("q", prompt), landing=found.landing),
        replace(make_request("r", tokens(54, 60)), landing=12345)])
    assert stream.engine == there and counted(both)[there] == (3, 0) and not len(both._landings)
    assert both._fleet._instances[str(there)].sent.waiting_tokens == 60, "of the one whose KV does not come"
    deltas = await read(stream)
    assert {delta.request_id for delta in deltas if delta.finish_reason is FinishReason.LENGTH} == set("oqr")
    await idle(both)
    assert counted(both) == [(0, 0)] * 2
    found = await both.expect(make_request("p", tokens(52, 60)), 0.001)
    await asyncio.sleep(0.002)
    await read(both.submit([make_request("s", tokens(53, 60))]))
    assert counted(both) == [(0, 0)] * 2 and not len(both._landings), "the lease is over"
    assert len(await read(both.submit([replace(make_request("p", tokens(52, 60)), landing=found.landing)])))


async def _it_comes_back_as_the_others_are(both: Replicas) -> None:
    stream = both.submit([make_request("i", tokens(7), 400)])
    await stream.admitted()
    died, pid = stream.engine, both.engines[stream.engine].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="signal 9"):
        await read(stream)
    assert both.is_up and both.dead_reason is None and both.restarting_after is None
    assert both.engines[died].stats.num_running == 0  # of the other one it is what that said some time ago
    assert (await both.control("pause", mode="wait")).state.paused == "wait"
    assert (await both.control("sleep", level=2)).state.sleep_level == 2
    await both.engines[died].restart("a test")
    assert [engine.sleep_level for engine in both.engines] == [2, 2]
    answer = await both.engines[died].control("state")
    assert (answer.state.paused, answer.state.sleep_level) == ("wait", 2)
    for action in ("wakeup", "resume"):
        assert (await both.control(action)).error is None
    assert [len(await read(both.submit([make_request(f"j{n}", tokens(n), 4)]))) > 0 for n in range(4)] == [True] * 4


async def _none_is_left(both: Replicas) -> None:
    for engine in both.engines:
        engine.end_process("a test ends it")
    assert not both.is_up and both.dead_reason == "engine 0: a test ends it"
    with pytest.raises(EngineDeadError, match="a test ends it"):
        both.submit([make_request("k", tokens(8))])
    with pytest.raises(EngineDeadError):
        await both.control("state")
    await asyncio.sleep(0)
