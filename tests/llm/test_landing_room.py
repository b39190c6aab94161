"""Room that is kept for KV which does not come: how soon it is free, and who is not asked for any."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator

import pytest

from tests.llm.cluster_sites import Cluster, answers, make_request, same
from tests.llm.test_clients import read
from tests.llm.test_disaggregation import LONG, SAMPLINGS, alone, call_of, moved, num_reserved, settled, sites
from tests.llm.test_remote import until
from xllm.errors import TransferError
from xllm.kv_offer import KVOffer
from xllm.request import Request
from xllm.transfer.way import Way


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """p computes prompts, d and e answer."""
    async with sites(p="PREFILL", d="DECODE", e="DECODE") as found:
        yield found


async def test_room_for_one_prompt_of_several_that_ends(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader gives it up while the KV of the other is still on its way."""
    cluster.client.leave("e", "one is enough")
    lander = cluster.sites["d"].engine._core.scheduler.promotions.lander
    monkeypatch.setattr("xllm.scheduler.departures.Departures.publish", lambda departures, step: 0)  # it never is
    requests = [make_request(name, SAMPLINGS["greedy"].varied(max_tokens=300), (number, *LONG))
                for number, name in enumerate("xy", start=5)]
    call = cluster.client.submit(requests)
    await until(lambda: len(lander) == 2)
    await call.next()
    cluster.client.abort(["x"])
    await until(lambda: len(lander) == 1)
    call.abort("y")
    call.close()
    await settled(cluster)
    assert not cluster.client._dispatcher.handovers._receivers
    assert not cluster.client._fleet._instances["d"].sent.num_expected


async def test_an_answer_that_comes_too_late_keeps_no_room(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xllm.client.handovers.ASK_S", 0.1)
    cluster.client.leave("e", "one is enough")
    core = cluster.sites["d"].engine._core
    expect, offers = core.expect, []

    def slowly(request: Request, lease_s: float) -> KVOffer | str:
        time.sleep(0.3)
        offers.append(expect(request, lease_s))
        return offers[-1]

    monkeypatch.setattr(core, "expect", slowly)
    await read(call_of(cluster, "x"))
    await until(lambda: len(offers) == 1 and not num_reserved(core))
    assert isinstance(offers[0], KVOffer) and cluster.client.counts.handovers["silent"] == 1
    await settled(cluster)


async def test_one_that_does_not_answer_is_not_asked_for_a_while(cluster: Cluster,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xllm.client.handovers.ASK_S", 0.2)
    monkeypatch.setattr("xllm.client.ask_pauses.FIRST_PAUSE_S", 600.0)
    handovers, counts = cluster.client._dispatcher.handovers, cluster.client.counts.handovers
    expected = await alone(cluster, SAMPLINGS["greedy"])
    cluster.client.leave("e", "one is enough")
    core, answers_again = cluster.sites["d"].engine._core, threading.Event()
    expect = core.expect
    monkeypatch.setattr(core, "expect", lambda *asked: (answers_again.wait(10.0), expect(*asked))[1])  # it hangs
    for name in "xyz":
        same(answers(await read(call_of(cluster, name, sampling=SAMPLINGS["greedy"])))[name], expected)
        assert (counts["silent"], counts["offered"], handovers.paused) == (1, 0, {"d"})
    answers_again.set()
    await cluster.sites["d"].client.control("state")
    assert handovers.paused == {"d"}, "nobody has asked"
    for pause in handovers._pauses._pauses.values():
        pause.until_s = 0.0  # by now
    same(answers(await read(call_of(cluster, "w", sampling=SAMPLINGS["greedy"])))["w"], expected)
    assert (counts["silent"], counts["offered"], moved(cluster)) == (1, 1, 1)
    assert not handovers.paused and not handovers._pauses._pauses
    await settled(cluster)


async def test_another_is_asked_while_one_does_not_answer(cluster: Cluster) -> None:
    handovers = cluster.client._dispatcher.handovers
    handovers._pauses.silent(("d", cluster.sites["d"].client.incarnation), time.monotonic())
    for name in "xyz":
        call = call_of(cluster, name, prompt=(ord(name), *LONG), sampling=SAMPLINGS["greedy"].varied(max_tokens=150))
        await read(call)
        assert call.place == "e"
    assert moved(cluster) == 3
    cluster.client.leave("d", "it is started again")
    assert not handovers.paused
    await settled(cluster)


async def test_kv_that_cannot_be_sent_keeps_no_room(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request goes on where it is, and long before it ends the room that was kept for it is free."""
    def connect(*args, **options):
        raise TransferError("no way leads there")

    monkeypatch.setattr("xllm.transfer.way.connect", connect)
    sampling = SAMPLINGS["greedy"].varied(max_tokens=300)
    expected = await alone(cluster, sampling)
    call = call_of(cluster, "x", "y", sampling=sampling)  # the same prompt
    landers = [cluster.sites[name].engine._core.scheduler.promotions.lander for name in "de"]
    numbers = []
    call.listeners.append(lambda request_id, number: numbers.append(sum(map(len, landers))))
    found = answers(await read(call))
    for name in "xy":
        same(found[name], expected)
    assert call.place == "p" and moved(cluster) == 0 and cluster.client.counts.handovers["offered"] == 1
    assert numbers[0] == 1 and not numbers[-1], numbers
    await settled(cluster)


async def test_one_prompt_of_several_whose_kv_cannot_be_sent(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests of a call go on together: this one without its KV."""
    sampling, put, numbers = SAMPLINGS["greedy"].varied(max_tokens=200), Way._put, []
    expected = [await alone(cluster, sampling, (number, *LONG)) for number in (5, 6)]

    def put_one(way: Way, offer: KVOffer, *what) -> None:
        numbers.append(offer.number)
        if offer.number == numbers[0]:
            raise TransferError("it broke")
        put(way, offer, *what)

    monkeypatch.setattr("xllm.transfer.way.Way._put", put_one)
    call = cluster.client.submit([make_request(f"x{n}", sampling, (n, *LONG)) for n in (5, 6)])
    found = answers(await read(call))
    same(found["x5"], expected[0])
    same(found["x6"], expected[1])
    assert call.place in ("d", "e") and moved(cluster) == 1
    await settled(cluster)
