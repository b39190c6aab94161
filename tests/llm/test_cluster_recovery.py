"""Which ends of instances cost a call its tries, and how a call goes over from an instance that ends in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from tests.llm.cluster_sites import (
    NUM_TOKENS,
    Answer,
    Cluster,
    Site,
    answers,
    make_request,
    same,
    three_sites,
)
from tests.llm.test_clients import idle, read
from tests.llm.test_remote import until
from xllm.client import successor
from xllm.client.cluster_call import ClusterCall
from xllm.client.engine_client import EngineAwayError
from xllm.engine.commands import Command, CommandReply, Outputs, Submit
from xllm.errors import EngineDeadError
from xllm.request import FinishReason, OutputDelta, SamplingParams

SEEDED = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=7, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with three_sites() as found:
        yield found


def call_of(cluster: Cluster, *names: str, sampling: SamplingParams = SEEDED) -> ClusterCall:
    call = cluster.client.submit([make_request(name, sampling) for name in names])
    assert isinstance(call, ClusterCall)
    return call


async def expected(cluster: Cluster) -> Answer:
    (answer,) = answers(await read(call_of(cluster, "undisturbed"))).values()
    return answer


def alone(cluster: Cluster, name: str) -> Site:
    for other in [site for site in cluster.sites if site != name]:
        cluster.client.leave(other, "it is withdrawn")
    return cluster.sites[name]


class HeldBack:
    """What a client sends to have requests run, and what it sends behind that, waits until `release`."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch):
        self.waiting: list[Command] = []
        self._send: Callable[[Command], None] = site.client._send
        monkeypatch.setattr(site.client, "_send", self._take)

    def _take(self, command: Command) -> None:
        if isinstance(command, Submit) or self.waiting:
            self.waiting.append(command)
        else:
            self._send(command)

    def release(self) -> None:
        waiting, self.waiting = self.waiting, []
        for command in waiting:
            self._send(command)


# --- what counts


async def test_a_request_that_kills_whoever_computes_it(cluster: Cluster) -> None:
    poison = call_of(cluster, "poison")
    tried = []

    async def hit() -> None:
        while poison.open_ids:
            if (place := poison.place) is not None and poison.has_taken:
                tried.append(place)
                cluster.sites[place].kill(f"hit in {place}")
                await cluster.back(cluster.sites[place])
            await asyncio.sleep(0)

    hitting = asyncio.create_task(hit())
    with pytest.raises(EngineDeadError, match=r"given up: . was lost \(.*hit in .*; . was lost .*; . was ") as caught:
        await read(poison)
    await hitting
    assert sorted(tried) == ["a", "b", "c"], "another one each time"
    assert not isinstance(caught.value, EngineAwayError), "it is no use to send it again"
    assert cluster.client.counts.given_up == 1 and not cluster.client.request_ids
    assert len(answers(await read(call_of(cluster, "y")))["y"].token_ids) == NUM_TOKENS


async def test_its_neighbours_are_answered(cluster: Cluster) -> None:
    """They are beside it each time: there is one instance, which is started again."""
    answer, site = await expected(cluster), alone(cluster, "a")
    poison, others = call_of(cluster, "poison"), [call_of(cluster, f"x{number}") for number in range(5)]
    num_hits = 0

    async def hit() -> None:
        nonlocal num_hits
        while poison.open_ids:
            await asyncio.sleep(0)
            beside = num_hits >= 2 or all(call.has_taken or not call.open_ids for call in others)
            if poison.place is not None and poison.has_taken and beside:
                num_hits += 1
                site.kill(f"hit {num_hits}")
                await cluster.back(site)

    hitting = asyncio.create_task(hit())
    with pytest.raises(EngineDeadError, match="given up"):
        await read(poison)
    await hitting
    assert num_hits == 3
    for number, other in enumerate(others):
        same(answers(await read(other))[f"x{number}"], answer)
        assert other.tries.num_counted == 2
    assert cluster.client.counts.given_up == 1 and not cluster.client.request_ids


async def test_an_instance_that_comes_back_as_it_was_has_not_died_of_it(cluster: Cluster) -> None:
    answer, site = await expected(cluster), alone(cluster, "a")
    call, found = call_of(cluster, "x"), list[OutputDelta]()
    for number in range(1, 6):
        found += await call.next()
        site.client._die("the network was cut")
        await asyncio.sleep(0.01)
        assert call.open_ids and call.tries.num_counted == 1 and len(call.tries.lost) == number
        await site.client.connect()
        cluster.join(site)
        assert call.tries.num_counted == 0
    same(answers(found + await read(call))["x"], answer)


async def test_an_instance_that_has_not_taken_it_has_not_died_of_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch
                                                                   ) -> None:
    answer = await expected(cluster)
    held = {name: HeldBack(site, monkeypatch) for name, site in cluster.sites.items()}
    call = call_of(cluster, "x")
    for _ in range(5):
        await until(lambda: call.place is not None)
        site = cluster.having(call)
        held[site.name].waiting.clear()  # it goes down with the connection
        site.kill("it was hit before")
        await cluster.back(site)
    await until(lambda: call.place is not None)
    held[cluster.having(call).name].release()
    same(answers(await read(call))["x"], answer)
    assert len(call.tries.lost) == 5 and call.tries.num_counted == 0 and cluster.client.counts.given_up == 0


# --- an instance that ends in order


def taken_last(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says that requests are taken comes behind their first tokens, as one of several's do from other servers."""
    hand_out, kept, num_steps = site.client._hand_out, list[str](), 0

    def late(answer: CommandReply) -> None:
        nonlocal num_steps
        if isinstance(answer, Outputs):
            kept.extend(answer.taken)
            answer.taken.clear()
            num_steps += bool(answer.deltas)
        hand_out(answer)
        if num_steps >= 2 and kept:
            hand_out(Outputs(taken=[kept.pop()]))

    monkeypatch.setattr(site.client, "_hand_out", late)


@pytest.mark.parametrize("what", [
    "it is taken late", "it is taken behind its first tokens", "it is not taken", "it is refused", "the other one dies",
    "the old one dies", "it ends", "one is aborted", "its reader leaves"])
async def test_what_may_come_while_another_one_is_asked(pair: Cluster, what: str, monkeypatch: pytest.MonkeyPatch
                                                        ) -> None:
    """The old instance goes on until the other one has taken it; nothing is lost, nothing comes twice."""
    cluster, (a, b, _) = pair, pair.sites.values()
    answer = await expected(cluster)
    cluster.client.leave("b", "to know where calls go")
    cluster.client.counts.recovered.clear()
    call = call_of(cluster, "x", "y")
    await until(lambda: len(call._token_ids["y"]) >= 3)
    if what == "it is not taken":
        monkeypatch.setattr(successor, "TAKES_S", 0.05)
    cluster.join(b)
    held = HeldBack(b, monkeypatch)
    if what == "it is taken behind its first tokens":
        taken_last(b, monkeypatch)
    cluster.client.leave("a", "it is withdrawn")  # a draining one is handed over in the same way
    passed = {name: list(tokens) for name, tokens in call._token_ids.items()}
    if what != "it ends":
        await until(lambda: not call.next_place if what == "it is not taken" else len(call._held) >= 4)
    assert call.place == "a"
    if what != "it is not taken" and what != "it ends":
        assert call._token_ids == passed, "what it says is held back"
    ends = {"x": FinishReason.LENGTH, "y": FinishReason.LENGTH}
    if what == "it is refused":
        b.client.gate.drain()
    elif what == "the other one dies":
        b.kill()
    elif what == "the old one dies":
        a.kill()
    elif what == "it ends":
        await until(lambda: not call.open_ids)
    elif what == "one is aborted":
        cluster.client.abort(["x"])
        ends["x"] = FinishReason.ABORT
    elif what == "its reader leaves":
        call.close()
    if b.client.dead_reason is None:
        held.release()
    if what != "its reader leaves":
        found = answers(await read(call))
        assert {name: one.finish_reasons for name, one in found.items()} == {n: [end] for n, end in ends.items()}
        for name, one in found.items():
            assert one.token_ids == answer.token_ids[:len(one.token_ids)]
            assert len(one.token_ids) == NUM_TOKENS or ends[name] is FinishReason.ABORT
    went_over = what.startswith("it is taken") or what in ("the old one dies", "one is aborted")
    assert cluster.client.counts.recovered == ({"drained": 1} if went_over else {}), what
    assert not cluster.client.request_ids and not call.tries.lost and call.next_place is None
    assert all(not one.sent.num_open for one in cluster.client._fleet._instances.values())
    for site in (a, b):
        if site.engine.dead_reason is None:
            await idle(site.engine)


@pytest.fixture
async def pair() -> AsyncIterator[Cluster]:
    async with three_sites() as found:
        found.client.leave("c", "two are enough")
        yield found


async def test_another_one_is_asked_when_the_first_refuses(cluster: Cluster) -> None:
    answer, call = await expected(cluster), call_of(cluster, "x")
    await call.admitted()
    first = cluster.having(call)
    second, third = [site for site in cluster.sites.values() if site is not first]
    second.client.gate._is_draining = True  # and says so with its next sign of life
    asked = []
    note = cluster.client._dispatcher.not_taken
    cluster.client._dispatcher.not_taken = lambda call, place, error: (  # type: ignore[method-assign]
        asked.append(place), note(call, place, error))
    cluster.client.leave(first.name, "it is withdrawn")
    if call.next_place == third.name:  # it was drawn first
        third.client.gate._is_draining, second.client.gate._is_draining = True, False
        second, third = third, second
    same(answers(await read(call))["x"], answer)
    assert asked == [second.name] and call.tries.lost == []
    assert cluster.client.counts.recovered == {"drained": 1}
