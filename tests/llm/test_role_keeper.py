"""Roles that change under load: nothing is lost, whatever is decided when."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator

import pytest

from tests.llm.cluster_sites import Cluster, after, answers, make_request, same
from tests.llm.test_clients import read
from tests.llm.test_disaggregation import CONFIG, LONG, SAMPLINGS, alone, call_of, settled, sites
from tests.llm.test_remote import until
from xllm.client.cluster import ClusterClient
from xllm.client.cluster_call import ClusterCall
from xllm.client.role_keeper import RoleKeeper
from xllm.routing.role_snapshot import Flip, RolePlan, RoleRules, RoleSnapshot, RoleState

LASTING = SAMPLINGS["greedy"].varied(max_tokens=120)


class Turning:
    """Has a cluster's instances turned when it is told to, by its real `RoleKeeper`. seen: what that looked at."""

    def __init__(self, client: ClusterClient):
        self.seen = list[RoleSnapshot]()
        self._next = tuple[Flip, ...]()
        self.keeper = RoleKeeper(client.members, client._fleet, client._dispatcher, RoleRules(), self._plan)

    def _plan(self, snapshot: RoleSnapshot, state: RoleState, rules: RoleRules) -> RolePlan:
        self.seen.append(snapshot)
        flips, self._next = self._next, ()
        return RolePlan(flips, state)

    def flip(self, name: str, role: str) -> None:
        self._next = (Flip(name, role, "ttft"),)  # type: ignore[arg-type]
        self.keeper.look()

    def turned_from(self, name: str) -> str | None:
        self.keeper.look()
        return next(view.turned_from for view in self.seen[-1].instances if view.name == name)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with sites(p="PREFILL", d="DECODE", e="DECODE", w="MIX") as found:
        found.client.leave("w", "whole requests are not what this is about")
        yield found


async def test_a_decode_instance_becomes_a_prefill_instance_under_load(cluster: Cluster) -> None:
    expected = await alone(cluster, LASTING)
    turning, turned = Turning(cluster.client), list[str]()
    call = call_of(cluster, "x", sampling=LASTING)

    def turn() -> None:
        assert call.place is not None
        turned.append(call.place)
        turning.flip(call.place, "PREFILL")
        assert turning.turned_from(call.place) == "DECODE"

    after(call, 30, turn)
    reading = asyncio.create_task(read(call))
    await until(lambda: turned and call.place not in ("p", *turned))
    turning.keeper.look()
    assert turning.turned_from(turned[0]) is None, "it has been drained"
    assert cluster.client.members.roles[turned[0]] == "PREFILL"
    same(answers(await reading)["x"], expected)
    assert cluster.client.counts.recomputed_tokens == 0, "its KV went with it"
    event = cluster.client.members.events[-1]
    assert (event.kind, event.instance, event.text) == ("turned", turned[0], "PREFILL (ttft)")
    assert turning.keeper.flips == {"ttft": 1}
    cluster.client.leave("p", "the other one prefills now")
    same(answers(await read(call_of(cluster, "y", sampling=LASTING)))["y"], expected)
    await settled(cluster)


async def test_a_prefill_instance_computes_what_waits_there_and_then_decodes(cluster: Cluster) -> None:
    expected = await alone(cluster, LASTING)
    turning = Turning(cluster.client)
    await cluster.client.control("pause")
    call = call_of(cluster, "x", sampling=LASTING)
    await until(lambda: call.place == "p")
    turning.flip("p", "DECODE")
    assert turning.turned_from("p") == "PREFILL" and call.place == "p"
    await cluster.client.control("resume")
    same(answers(await read(call))["x"], expected)
    assert turning.turned_from("p") is None
    turning.flip("e", "PREFILL")
    same(answers(await read(call_of(cluster, "y", sampling=LASTING)))["y"], expected)
    await settled(cluster)


async def test_it_may_be_turned_back_before_it_is_drained(cluster: Cluster) -> None:
    expected = await alone(cluster, LASTING)
    turning = Turning(cluster.client)
    call = call_of(cluster, "x", sampling=LASTING)

    def turn() -> None:
        place = call.place
        assert place is not None
        turning.flip(place, "PREFILL")
        turning.flip(place, "DECODE")
        assert cluster.client.members.roles[place] == "DECODE"

    after(call, 20, turn)
    same(answers(await read(call))["x"], expected)
    await settled(cluster)


async def test_who_may_not_be_turned(cluster: Cluster) -> None:
    """Whole requests' instances, those that are drained, and those that send no KV; nor is one that has left known."""
    turning = Turning(cluster.client)
    cluster.join(cluster.sites["w"])
    cluster.client.members.all["d"].was_drained = True
    turning.keeper.look()
    assert {view.name for view in turning.seen[-1].instances if view.is_flexible} == {"p", "e"}
    turning.flip("e", "PREFILL")
    cluster.client.leave("e", "gone")
    turning.keeper.look()
    assert "e" not in {view.name for view in turning.seen[-1].instances}


@pytest.mark.parametrize("seed", range(2))
async def test_flips_at_random_times_lose_nothing(seed: int) -> None:
    """Calls come and go while instances are turned at random, some of them before they are drained; one may be lost."""
    rng = random.Random(seed)
    config = dataclasses.replace(CONFIG, scheduler=dataclasses.replace(CONFIG.scheduler, max_waiting_requests=64))
    async with sites(config, p="PREFILL", q="PREFILL", d="DECODE", e="DECODE") as found:
        prompts = [tuple((rng.randrange(900) + 3) for _ in range(rng.randrange(20, 150))) for _ in range(12)]
        samplings = [SAMPLINGS[rng.choice(["seeded", "penalties", "logprobs", "short"])] for _ in prompts]
        expected = [await alone(found, sampling, prompt) for sampling, prompt in zip(samplings, prompts, strict=True)]
        turning = Turning(found.client)

        async def one(i: int) -> None:
            await asyncio.sleep(rng.random() * 0.5)
            call = found.client.submit([make_request(f"x{i}", samplings[i], prompts[i])])
            assert isinstance(call, ClusterCall)
            same(answers(await read(call))[f"x{i}"], expected[i])

        async def turn() -> None:
            while True:
                await asyncio.sleep(rng.random() * 0.06)
                roles = found.client.members.roles
                kinds = {role: [name for name in roles if roles[name] == role] for role in ("PREFILL", "DECODE")}
                able = [(name, other) for role, other in (("PREFILL", "DECODE"), ("DECODE", "PREFILL"))
                        if len(kinds[role]) > 1 for name in kinds[role]]
                if able:
                    turning.flip(*rng.choice(able))
                if seed % 2 and turning.keeper.flips["ttft"] == 4 and len(roles) == 4:
                    found.sites[rng.choice(sorted(roles))].kill()

        turns = asyncio.create_task(turn())
        await asyncio.gather(*(one(i) for i in range(len(prompts))))
        turns.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turns
        assert turning.keeper.flips["ttft"] >= 4 and found.client.counts.handovers["moved"]
        await settled(found)


async def test_a_cluster_with_rules_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode instance too few: one is turned at once, by the real rules."""
    monkeypatch.setattr("xllm.client.role_keeper.LOOK_S", 0.02)
    async with sites(p="PREFILL", q="PREFILL", d="DECODE") as found:
        assert found.client.flips == {}
        found.client._roles = RoleKeeper(found.client.members, found.client._fleet, found.client._dispatcher,
                                         RoleRules())
        found.join(found.sites["d"])
        await until(lambda: sorted(found.client.members.roles.values()) == ["DECODE", "DECODE", "PREFILL"])
        assert found.client.flips == {"few_decode": 1}
        expected = await alone(found, SAMPLINGS["seeded"], LONG)
        same(answers(await read(call_of(found, "x")))["x"], expected)
        await settled(found)
