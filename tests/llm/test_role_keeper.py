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


class Planned:
    """Plans what it was told to, at the next look; notes what it saw."""

    def __init__(self) -> None:
        self.next: Flip | None = None
        self.seen = list[RoleSnapshot]()

    def __call__(self, snapshot: RoleSnapshot, state: RoleState, rules: RoleRules) -> RolePlan:
        self.seen.append(snapshot)
        flips, self.next = (() if self.next is None else (self.next,)), None
        return RolePlan(flips, state)


def keeper_of(client: ClusterClient, plan: Planned) -> RoleKeeper:
    return RoleKeeper(client.members, client._fleet, client._dispatcher, RoleRules(), plan)


def flip(keeper: RoleKeeper, plan: Planned, name: str, role: str) -> None:
    plan.next = Flip(name, role, "ttft")  # type: ignore[arg-type]
    keeper.look()


def turned_from(keeper: RoleKeeper, plan: Planned, name: str) -> str | None:
    keeper.look()
    return next(view.turned_from for view in plan.seen[-1].instances if view.name == name)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with sites(p="PREFILL", d="DECODE", e="DECODE", w="MIX") as found:
        found.client.leave("w", "whole requests are not what this is about")
        yield found


async def test_a_decode_instance_becomes_a_prefill_instance_under_load(cluster: Cluster) -> None:
    expected = await alone(cluster, LASTING)
    plan = Planned()
    keeper, turned = keeper_of(cluster.client, plan), list[str]()
    call = call_of(cluster, "x", sampling=LASTING)

    def turn() -> None:
        assert call.place is not None
        turned.append(call.place)
        flip(keeper, plan, call.place, "PREFILL")
        assert turned_from(keeper, plan, call.place) == "DECODE"

    after(call, 30, turn)
    reading = asyncio.create_task(read(call))
    await until(lambda: turned and call.place not in ("p", *turned))
    keeper.look()
    assert turned_from(keeper, plan, turned[0]) is None, "it has been drained"
    assert cluster.client.members.roles[turned[0]] == "PREFILL"
    same(answers(await reading)["x"], expected)
    assert cluster.client.counts.recomputed_tokens == 0, "its KV went with it"
    event = cluster.client.members.events[-1]
    assert (event.kind, event.instance, event.text) == ("turned", turned[0], "PREFILL (ttft)")
    assert keeper.flips == {"ttft": 1}
    cluster.client.leave("p", "the other one prefills now")
    same(answers(await read(call_of(cluster, "y", sampling=LASTING)))["y"], expected)
    await settled(cluster)


async def test_a_prefill_instance_computes_what_waits_there_and_then_decodes(cluster: Cluster) -> None:
    expected = await alone(cluster, LASTING)
    plan = Planned()
    keeper = keeper_of(cluster.client, plan)
    await cluster.client.control("pause")
    call = call_of(cluster, "x", sampling=LASTING)
    await until(lambda: call.place == "p")
    flip(keeper, plan, "p", "DECODE")
    assert turned_from(keeper, plan, "p") == "PREFILL" and call.place == "p"
    await cluster.client.control("resume")
    same(answers(await read(call))["x"], expected)
    assert turned_from(keeper, plan, "p") is None
    flip(keeper, plan, "e", "PREFILL")
    same(answers(await read(call_of(cluster, "y", sampling=LASTING)))["y"], expected)
    await settled(cluster)


async def test_it_may_be_turned_back_before_it_is_drained(cluster: Cluster) -> None:
    expected = await alone(cluster, LASTING)
    plan = Planned()
    keeper = keeper_of(cluster.client, plan)
    call = call_of(cluster, "x", sampling=LASTING)

    def turn() -> None:
        place = call.place
        assert place is not None
        flip(keeper, plan, place, "PREFILL")
        flip(keeper, plan, place, "DECODE")
        assert cluster.client.members.roles[place] == "DECODE"

    after(call, 20, turn)
    same(answers(await read(call))["x"], expected)
    await settled(cluster)


async def test_who_may_not_be_turned(cluster: Cluster) -> None:
    """Whole requests' instances, those that are drained, and those that send no KV; nor is one that has left known."""
    plan = Planned()
    keeper = keeper_of(cluster.client, plan)
    cluster.join(cluster.sites["w"])
    cluster.client.members.all["d"].was_drained = True
    keeper.look()
    assert {view.name for view in plan.seen[-1].instances if view.is_flexible} == {"p", "e"}
    flip(keeper, plan, "e", "PREFILL")
    cluster.client.leave("e", "gone")
    keeper.look()
    assert "e" not in {view.name for view in plan.seen[-1].instances}


@pytest.mark.parametrize("seed", range(2))
async def test_flips_at_random_times_lose_nothing(seed: int) -> None:
    """Calls come and go while instances are turned at random, some of them before they are drained; one may be lost."""
    rng = random.Random(seed)
    config = dataclasses.replace(CONFIG, scheduler=dataclasses.replace(CONFIG.scheduler, max_waiting_requests=64))
    async with sites(config, p="PREFILL", q="PREFILL", d="DECODE", e="DECODE") as found:
        prompts = [tuple((rng.randrange(900) + 3) for _ in range(rng.randrange(20, 150))) for _ in range(12)]
        samplings = [SAMPLINGS[rng.choice(["seeded", "penalties", "logprobs", "short"])] for _ in prompts]
        expected = [await alone(found, sampling, prompt) for sampling, prompt in zip(samplings, prompts, strict=True)]
        plan = Planned()
        keeper = keeper_of(found.client, plan)

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
                    flip(keeper, plan, *rng.choice(able))
                if seed % 2 and keeper.flips["ttft"] == 4 and len(roles) == 4:
                    found.sites[rng.choice(sorted(roles))].kill()

        turning = asyncio.create_task(turn())
        await asyncio.gather(*(one(i) for i in range(len(prompts))))
        turning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turning
        assert keeper.flips["ttft"] >= 4 and found.client.counts.handovers["moved"]
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
