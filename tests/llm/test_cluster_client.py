"""`ClusterClient`: what an instance's end costs the calls that it had (nothing but time), whenever it comes."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.adapters import write_adapter
from tests.llm.cluster_sites import (
    CONFIG,
    GREEDY,
    NUM_TOKENS,
    SHORT,
    Answer,
    Cluster,
    after,
    answers,
    make_request,
    same,
    three_sites,
)
from tests.llm.conftest import SETTINGS
from tests.llm.test_clients import idle, read
from tests.llm.test_remote import until
from xllm.client.engine_client import EngineAwayError, EngineBusyError
from xllm.client.gate_wire import ServedModel
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.errors import EngineDeadError, RequestError
from xllm.request import FinishReason, OutputDelta, SamplingParams
from xllm.routing import recovery
from xllm.structured.spec import StructuredOutput

LONG = tuple(range(5, 205))
ENDLESS = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)  # not over before something is done to it
GOES_ON = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=7, **GOES_ON),
    "penalties": SamplingParams(temperature=0.8, seed=3, repetition_penalty=1.3, frequency_penalty=0.4, **GOES_ON),
    "logprobs": SamplingParams(temperature=0.7, seed=1, logprobs=3, prompt_logprobs=1, **GOES_ON),
    "form": SamplingParams(temperature=1.0, seed=5, max_tokens=NUM_TOKENS,
                           structured=StructuredOutput(regex=r"(return [a-c]\n){60}")),
    "stops": SamplingParams(temperature=1.0, seed=2, max_tokens=NUM_TOKENS, min_tokens=8,
                            stop_token_ids=tuple(range(4, 260))),
}


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with three_sites() as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed() -> dict[tuple[str, int], Answer]:
    """What one engine answers, by sampling and prompt."""
    core, deltas = EngineCore(CONFIG), []
    for name, sampling in SAMPLINGS.items():
        for number, prompt in enumerate((SHORT, LONG)):
            core.add(make_request(f"{name}/{number}", sampling, prompt))
        while core.has_work():
            deltas += core.step()
    core.shutdown()
    return {(name.split("/")[0], int(name.split("/")[1])): answer for name, answer in answers(deltas).items()}


# --- nothing is lost, repeated or changed


async def test_every_kind_of_request_goes_on(cluster: Cluster, undisturbed: dict[tuple[str, int], Answer]) -> None:
    """Killed in decode, at several points: once under each call, twice under some."""
    cuts = iter((1, 5, 9, 2, 7, 11, 3, 13, 4, 8, 6, 10))
    streams, killed = {}, []

    async def run(kind: str, number: int, cut: int) -> None:
        stream = cluster.client.submit([make_request(f"{kind}/{number}", SAMPLINGS[kind], (SHORT, LONG)[number])])
        streams[kind, number] = stream
        found: list[OutputDelta] = []
        num_tokens = 0
        while deltas := await asyncio.wait_for(stream.next(), 20):
            found += deltas
            num_tokens += sum(len(delta.token_ids) for delta in deltas)
            if num_tokens >= cut and stream.open_ids and (kind, number) not in killed:
                killed.append((kind, number))
                site = cluster.having(stream)
                site.kill()
                await cluster.back(site)
        (answer,) = answers(found).values()
        same(answer, undisturbed[kind, number])
        assert answer.cached <= len((SHORT, LONG)[number])

    for (kind, number), cut in zip(undisturbed, cuts, strict=True):  # one at a time: each is hit where it says
        await run(kind, number, cut)
    assert len(killed) >= 10, "answers of a few tokens may have ended before"
    assert cluster.client.counts.recovered["lost"] == len(killed) and not cluster.client.request_ids
    assert cluster.client.counts.recomputed_tokens > 0


async def test_many_calls_of_several_sequences_at_once(cluster: Cluster, undisturbed: dict[tuple[str, int], Answer]
                                                       ) -> None:
    """Two instances fall one after the other while all three are busy, the second during the recoveries."""
    streams = [(kind, cluster.client.submit([make_request(f"{kind}-{n}", SAMPLINGS[kind], LONG) for n in range(2)]))
               for kind in ("greedy", "seeded", "penalties", "logprobs", "form")]
    first, second = cluster.sites["a"], cluster.sites["b"]

    def hit_both() -> None:
        first.kill()
        asyncio.get_running_loop().call_later(0.02, second.kill)

    after(streams[0][1], 3, hit_both)
    for kind, stream in streams:
        found = answers(await read(stream))
        assert set(found) == {f"{kind}-0", f"{kind}-1"}
        for answer in found.values():
            same(answer, undisturbed[kind, 1])
    assert second.client.dead_reason is not None and set(cluster.client.members.all) == {"c"}
    await idle(cluster.client)


@pytest.mark.parametrize("when", ["before it was taken", "in the queue", "in prefill", "after the last token"])
async def test_whenever_it_comes(cluster: Cluster, undisturbed: dict[tuple[str, int], Answer], when: str) -> None:
    client = cluster.client
    for name in ("b", "c"):
        client.leave(name, "to know where calls go")
    others = [client.submit([make_request(f"other{n}", SamplingParams(temperature=0, max_tokens=300, ignore_eos=True))])
              for n in range(4 if when == "in the queue" else 0)]
    for other in others:
        await until(lambda other=other: bool(other._deltas))
    stream = client.submit([make_request("x", SAMPLINGS["logprobs"], LONG)])
    site = cluster.having(stream)
    if when == "in the queue":
        await stream.admitted()
        await until(lambda: site.engine.stats.num_waiting == 1)
    elif when == "in prefill":
        await stream.admitted()
    elif when == "after the last token":
        await until(lambda: not stream.open_ids)
    for name in ("b", "c"):
        cluster.join(cluster.sites[name])
    site.kill()
    if when != "after the last token":
        assert not stream._deltas, "it has not begun"
    same(answers(await read(stream))["x"], undisturbed["logprobs", 1])
    for other in others:
        assert len(answers(await read(other)).popitem()[1].token_ids) == 300
    assert client.counts.recovered["lost"] == (0 if when == "after the last token" else 1 + len(others))
    assert stream.scheduled_s["x"] <= time.monotonic()


async def test_a_request_without_a_seed_gets_one(cluster: Cluster) -> None:
    """What it has drawn and what it draws elsewhere is one sample; two requests draw different ones."""
    free = SamplingParams(temperature=1.0, top_k=20, max_tokens=40, ignore_eos=True)
    one, other = cluster.client.submit([make_request("x", free)]), cluster.client.submit([make_request("y", free)])
    after(one, 10, lambda: cluster.having(one).kill())
    drawn = answers(await read(one))["x"].token_ids
    assert drawn != answers(await read(other))["y"].token_ids
    seeded = one._requests["x"].sampling  # type: ignore[attr-defined]
    again = cluster.client.submit([make_request("z", seeded)])
    assert answers(await read(again))["z"].token_ids == drawn


async def test_a_call_that_has_ended_is_gone(cluster: Cluster) -> None:
    """At once: calls that held themselves would wait by the hundred for the garbage collector, and stop everybody."""
    stream = cluster.client.submit([make_request("x", GREEDY)])
    call = weakref.ref(stream)
    gc.disable()
    try:
        await read(stream)
        stream.close()
        del stream
        assert call() is None
    finally:
        gc.enable()


# --- where it ends


async def test_refusals(cluster: Cluster) -> None:
    with pytest.raises(RequestError, match="no adapter") as caught:
        await cluster.client.submit([make_request("x", lora="nobody")]).admitted()
    assert caught.value.field == "lora" and cluster.client.counts.retried == 0, "it is wrong anywhere"
    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    with pytest.raises(EngineBusyError, match="queue is full"):
        await cluster.client.submit([make_request(f"x{n}", long) for n in range(20)]).admitted()
    assert cluster.client.counts.retried == 2, "after all had been asked"
    assert not cluster.client.request_ids
    for site in cluster.sites.values():
        await idle(site.engine)


async def test_all_are_gone_and_come_back(cluster: Cluster, undisturbed: dict[tuple[str, int], Answer],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    client = cluster.client
    stream = client.submit([make_request("x", ENDLESS)])
    await stream.next()
    last = cluster.having(stream)
    for site in cluster.sites.values():
        if site is not last:
            site.kill("the lights went out")
    await until(lambda: set(client.members.all) == {last.name})  # else it may be lost by each of them in turn
    last.kill("the lights went out")
    await until(lambda: not client.is_up)
    assert client.dead_reason is None and client.request_ids == ("x",)
    assert client.restarting_after is not None and "the lights went out" in client.restarting_after
    with pytest.raises(EngineAwayError, match="no instance takes requests"):
        client.submit([make_request("y")])
    with pytest.raises(EngineAwayError, match="the lights went out"):
        await client.control("state")
    await cluster.back(cluster.sites["b"])
    assert (await read(stream))[-1].finish_reason is FinishReason.LENGTH
    assert client.restarting_after is None and client.phase == "ready"
    monkeypatch.setattr(recovery, "MAX_WAIT_S", 0.1)
    stream = client.submit([make_request("x")])
    cluster.sites["b"].kill()
    with pytest.raises(EngineAwayError, match=r"the request was given up: b was lost .*; no instance takes requests"):
        await read(stream)


async def test_what_is_aborted_does_not_go_on(cluster: Cluster) -> None:
    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    client, streams = cluster.client, [cluster.client.submit([make_request(name, long)]) for name in "xyz"]
    for stream in streams:
        await stream.next()
    x, y, z = streams
    client.abort(["x", "nobody"])
    cluster.having(x).kill()  # before it has answered
    cluster.having(y).kill()
    client.abort(["y"])  # it is nowhere now
    client.abort(["z"])
    client.leave(cluster.having(z).name, "it is withdrawn")  # before it has answered
    for stream in (x, y, z):
        assert (await read(stream))[-1].finish_reason is FinishReason.ABORT
    assert not client.request_ids
    for site in cluster.sites.values():
        if site.engine.dead_reason is None:
            await idle(site.engine)


# --- an instance that ends in order


async def test_a_draining_instance_hands_over(cluster: Cluster, undisturbed: dict[tuple[str, int], Answer]) -> None:
    stream = cluster.client.submit([make_request(f"x{n}", SAMPLINGS["seeded"], LONG) for n in range(2)])
    site = cluster.having(stream)
    after(stream, 6, site.client.gate.drain)
    for answer in answers(await read(stream)).values():
        same(answer, undisturbed["seeded", 1])
    assert cluster.having(stream) is not site or cluster.client.counts.recovered["drained"] == 1
    assert cluster.client.counts.recovered == {"drained": 1} and cluster.client.counts.given_up == 0
    await idle(site.engine)
    for other in cluster.sites.values():
        if other is not site:
            cluster.client.leave(other.name, "it is withdrawn")
    with pytest.raises(EngineAwayError, match="it is shutting down"):
        cluster.client.submit([make_request("y")])


async def test_the_last_one_drains_itself(cluster: Cluster) -> None:
    for name in ("b", "c"):
        cluster.client.leave(name, "it is withdrawn")
    stream = cluster.client.submit([make_request("x")])
    after(stream, 3, cluster.sites["a"].client.gate.drain)
    assert len(answers(await read(stream))["x"].token_ids) == NUM_TOKENS
    assert not cluster.client.counts.recovered


async def test_a_call_stays_with_its_model(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model's instance that has taken the place does not go on with what the last one has begun."""
    monkeypatch.setattr(recovery, "MAX_WAIT_S", 0.1)
    for name in ("b", "c"):
        cluster.client.leave(name, "it is withdrawn")
    stream = cluster.client.submit([make_request("x", ENDLESS)])
    await stream.next()
    monkeypatch.setattr(cluster.sites["b"].client, "model", ServedModel(("demo",), "another fingerprint"))
    cluster.join(cluster.sites["b"])
    await until(lambda: "b" in cluster.client.members.up)
    cluster.sites["a"].kill()
    with pytest.raises(EngineDeadError, match="a was lost"):
        await read(stream)
    assert len(answers(await read(cluster.client.submit([make_request("y")])))["y"].token_ids) == NUM_TOKENS


# --- commands


async def test_who_joins_later_gets_the_state_of_the_others(cluster: Cluster) -> None:
    client = cluster.client
    client.leave("c", "its connection was cut")
    await client.control("pause", mode="keep")
    cluster.join(cluster.sites["c"])
    await until(lambda: "c" in client.members.up)
    assert (await cluster.sites["c"].engine.control("state")).state.paused == "keep"
    await client.control("resume")
    for site in cluster.sites.values():
        assert (await site.engine.control("state")).state.paused is None
    refused = await client.control("load_adapter", name="x", folder="/nowhere")
    assert refused.error is not None and refused.error.startswith("instance a: ") and "--enable-lora" in refused.error


async def test_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have one or none, who joins later too; a call goes on with the files that it began with, or not at all."""
    for name, seed in (("v1", 1), ("v2", 2)):
        write_adapter(tmp_path / name, seed)
    config = EngineConfig.from_flat(**SETTINGS, max_num_seqs=4, enable_lora=True)
    async with three_sites(config) as cluster:
        client, (a, b, c) = cluster.client, cluster.sites.values()
        client.leave("c", "its connection was cut")
        assert (await client.control("load_adapter", name="x", folder=str(tmp_path / "v1"))).error is None
        assert client.adapters == a.client.adapters == b.client.adapters == ("x",)
        cluster.join(c)
        await until(lambda: "c" in client.members.up)
        assert c.client.adapter_digests == a.client.adapter_digests
        expected = answers(await read(client.submit([make_request("x", lora="x")])))["x"].token_ids
        assert expected != answers(await read(client.submit([make_request("y")])))["y"].token_ids
        stream = client.submit([make_request("x", lora="x")])
        after(stream, 5, lambda: cluster.having(stream).kill())
        assert answers(await read(stream))["x"].token_ids == expected

        left = list(client.members.all)
        other = cluster.sites[left[1]]
        await other.client.control("unload_adapter", name="x")
        await other.client.control("load_adapter", name="x", folder=str(tmp_path / "v2"))
        monkeypatch.setattr(recovery, "MAX_WAIT_S", 0.1)
        stream = client.submit([make_request("x", lora="x")])
        assert stream.place == left[0]  # type: ignore[attr-defined]
        after(stream, 5, cluster.sites[left[0]].kill)
        with pytest.raises(EngineDeadError, match="the request was given up"):
            await read(stream)
        await client.close()


# --- sums


async def test_sums(cluster: Cluster) -> None:
    client = cluster.client
    assert client.stats.num_blocks == 3 * 256 and client.facts is not None and client.engines == (client,)
    await read(client.submit([make_request("x")]))
    await until(lambda: client.stats.generation_tokens_total == NUM_TOKENS)
    for site in cluster.sites.values():
        site.kill()
    await until(lambda: not client.members.all)
    assert (client.stats.num_blocks, client.stats.generation_tokens_total) == (0, NUM_TOKENS), "totals never fall"
    await cluster.back(cluster.sites["a"])
    assert client.stats.num_blocks == 256
