"""Prompts that one instance computes and another answers: tokens as of one engine, in each phase and after any loss."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import pytest

from tests.llm.cluster_sites import Answer, Cluster, Site, after, answers, make_request, same
from tests.llm.conftest import SETTINGS
from tests.llm.gated import WatchedLocal
from tests.llm.test_clients import idle, read
from tests.llm.test_remote import until
from xllm.client.cluster import ClusterClient
from xllm.client.cluster_call import ClusterCall
from xllm.config import EngineConfig
from xllm.engine.commands import Expected
from xllm.engine.core import EngineCore
from xllm.errors import EngineDeadError
from xllm.request import FinishReason, SamplingParams
from xllm.routing.fleet import Fleet
from xllm.routing.fleet_snapshot import Decision
from xllm.routing.pair_snapshot import PairDecision
from xllm.structured.spec import StructuredOutput

CONFIG = EngineConfig.from_flat(**SETTINGS, max_num_seqs=4, max_waiting_requests=8, max_num_batched_tokens=64,
                                enable_disagg_pd=True, host_blocks_factor=1.0, block_size=16)
NUM_TOKENS = 60  # so many that KV is there before they are, on a busy machine as well
LONG = tuple((7 * i) % 900 + 3 for i in range(150))
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True),
    "seeded": SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=7, max_tokens=NUM_TOKENS, ignore_eos=True),
    "penalties": SamplingParams(temperature=0.8, seed=3, presence_penalty=0.5, frequency_penalty=0.3,
                                repetition_penalty=1.2, min_tokens=5, max_tokens=NUM_TOKENS),
    "logprobs": SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, max_tokens=NUM_TOKENS, ignore_eos=True),
    "bias": SamplingParams(temperature=0, logit_bias={5: 4.0}, bad_words_token_ids=((9, 9),), max_tokens=NUM_TOKENS,
                           ignore_eos=True),
    "form": SamplingParams(temperature=0.7, seed=11, max_tokens=NUM_TOKENS,
                           structured=StructuredOutput(regex="[a-z]{3}-[0-9]{12}")),
    "short": SamplingParams(temperature=0, max_tokens=2, ignore_eos=True),
}


class PairingFleet(Fleet):
    """Splits every call that can be split: what that is worth is for others to judge (tests/routing)."""

    def decide_pair(self, prompts, num_tokens, num_requests, now_s, *, session=None, exclude=(), deadline_s=None):
        def decide(role: str) -> Decision:
            others = {name for name, one in self._instances.items() if one.role != role}
            return self.decide(prompts, num_tokens, num_requests, now_s, exclude={*exclude, *others})

        prefill, decode = decide("PREFILL"), decide("DECODE")
        if prefill.name is None or decode.name is None:
            return super().decide_pair(prompts, num_tokens, num_requests, now_s, session=session, exclude=exclude,
                                       deadline_s=deadline_s)
        return PairDecision(prefill.name, decode.name, "pair", {}, prefill.matched_tokens, decode.matched_tokens)


@contextlib.asynccontextmanager
async def sites(config: EngineConfig = CONFIG, **roles: str) -> AsyncIterator[Cluster]:
    """Instances by name, in these roles."""
    engines = [WatchedLocal(EngineCore(config)) for _ in roles]
    async with contextlib.AsyncExitStack() as stack:
        found = Cluster(ClusterClient(PairingFleet()))
        for (name, role), engine in zip(roles.items(), engines, strict=True):
            await found.add(name, engine, stack, role=role)
        yield found
        await found.client.close()
    for engine in engines:
        engine.shutdown()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """p computes prompts, d and e answer."""
    async with sites(p="PREFILL", d="DECODE", e="DECODE") as found:
        yield found


def call_of(cluster: Cluster, *names: str, sampling: SamplingParams = SAMPLINGS["seeded"],
            prompt: tuple[int, ...] = LONG) -> ClusterCall:
    call = cluster.client.submit([make_request(name, sampling, prompt) for name in names])
    assert isinstance(call, ClusterCall)
    return call


async def alone(cluster: Cluster, sampling: SamplingParams, prompt: tuple[int, ...] = LONG) -> Answer:
    """What one engine answers, which has nothing cached."""
    engine = cluster.sites["p"].engine
    (answer,) = answers(await read(engine.submit([make_request("alone", sampling, prompt)]))).values()
    await engine.control("reset_prefix_cache")
    return answer


def moved(cluster: Cluster) -> int:
    return cluster.client.counts.handovers["moved"]


async def settled(cluster: Cluster) -> None:
    """Nothing is open anywhere."""
    assert not cluster.client.request_ids
    for site in cluster.sites.values():
        if site.engine.dead_reason is None:
            await idle(site.engine)
            core = site.engine._core
            await until(lambda core=core: not core.scheduler.kv.num_held_blocks and not len(core.scheduler.departures))
            await until(lambda core=core: is_sound(core))
            await until(lambda core=core: not num_reserved(core))


def num_reserved(core: EngineCore) -> int:
    """Slots of host memory that nobody else can have, and landings that are waited for."""
    lander = core.scheduler.promotions.lander
    return len(lander) + lander._store.host.num_held


def is_sound(core: EngineCore) -> bool:
    """Its thread may be at work on what is counted here; what is wrong stays so."""
    try:
        core.scheduler.check_integrity()
    except (AssertionError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", SAMPLINGS)
async def test_the_tokens_are_those_of_one_engine(cluster: Cluster, name: str) -> None:
    expected = await alone(cluster, SAMPLINGS[name])
    call = call_of(cluster, "x", sampling=SAMPLINGS[name])
    found = answers(await read(call))["x"]
    same(found, expected)
    assert moved(cluster) == 1 or name in ("short", "form")  # which may have ended before their KV was there
    await settled(cluster)


async def test_the_first_token_comes_from_the_prefill_and_the_rest_from_the_other(cluster: Cluster) -> None:
    call = call_of(cluster, "x", sampling=SAMPLINGS["seeded"].varied(max_tokens=120))
    places = []
    call.listeners.append(lambda request_id, number: places.append(call.place))
    await read(call)
    assert places[0] == "p" and places[-1] in ("d", "e")
    receiver = cluster.sites[places[-1]].engine._core
    assert receiver.scheduler.promotions.lander.num_landed == len(LONG) // CONFIG.cache.block_size
    counters = receiver.scheduler.counters
    assert counters.cached_tokens_by_tier_total["l3"] == len(LONG) // CONFIG.cache.block_size * CONFIG.cache.block_size
    await settled(cluster)


async def test_several_choices_of_one_prompt(cluster: Cluster) -> None:
    samplings = [SAMPLINGS["seeded"].varied(seed=seed) for seed in range(5)]  # more than run at a time
    expected = [await alone(cluster, sampling) for sampling in samplings]
    requests = [make_request(f"x{i}", sampling, LONG) for i, sampling in enumerate(samplings)]
    found = answers(await read(cluster.client.submit(requests)))
    for i, answer in enumerate(expected):
        same(found[f"x{i}"], answer)
    assert moved(cluster) == 1
    await settled(cluster)


async def test_what_is_cached_there_does_not_travel(cluster: Cluster) -> None:
    cluster.client.leave("e", "one is enough")
    await read(call_of(cluster, "x"))
    landed = cluster.sites["d"].engine._core.scheduler.promotions.lander
    before = landed.num_landed
    longer = (*LONG, *range(3, 100))
    expected = await alone(cluster, SAMPLINGS["greedy"], longer)
    same(answers(await read(call_of(cluster, "y", sampling=SAMPLINGS["greedy"], prompt=longer)))["y"], expected)
    assert landed.num_landed - before < (len(longer) - len(LONG)) // CONFIG.cache.block_size + 2
    same(answers(await read(call_of(cluster, "z", sampling=SAMPLINGS["greedy"], prompt=longer)))["z"], expected)
    assert cluster.client.counts.handovers["nothing_missing"] == 1
    await settled(cluster)


async def test_without_one_that_decodes_the_prefill_instance_does_it_all(cluster: Cluster) -> None:
    expected = await alone(cluster, SAMPLINGS["seeded"])
    cluster.client.leave("d", "gone")
    cluster.client.leave("e", "gone")
    call = call_of(cluster, "x")
    same(answers(await read(call))["x"], expected)
    assert moved(cluster) == 0
    await settled(cluster)


async def test_without_one_that_prefills_the_others_do_it_all(cluster: Cluster) -> None:
    expected = await alone(cluster, SAMPLINGS["seeded"])
    cluster.client.leave("p", "gone")
    same(answers(await read(call_of(cluster, "x")))["x"], expected)
    await settled(cluster)


@pytest.mark.parametrize("how", ["refused", "silent", "lost"])
async def test_no_room_for_its_kv(cluster: Cluster, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = await alone(cluster, SAMPLINGS["seeded"])
    monkeypatch.setattr("xllm.client.handovers.ASK_S", 0.2)

    async def answer(site: Site) -> Expected:
        if how == "silent":
            await asyncio.sleep(60)
        if how == "lost":
            site.kill("while it was asked")
            await asyncio.sleep(60)
        return Expected(0, reason="there is no room")

    for site in (cluster.sites["d"], cluster.sites["e"]):
        monkeypatch.setattr(site.client, "expect", lambda request, lease_s, site=site: answer(site))
    same(answers(await read(call_of(cluster, "x")))["x"], expected)
    assert moved(cluster) == 0
    await settled(cluster)


@pytest.mark.parametrize("num_tokens", [1, 3, 12])
@pytest.mark.parametrize("who", ["the one that has it", "the one that is to go on"])
async def test_an_instance_is_lost(cluster: Cluster, who: str, num_tokens: int) -> None:
    expected = await alone(cluster, SAMPLINGS["seeded"])
    call = call_of(cluster, "x")

    def kill() -> None:
        place = call.place
        if who == "the one that is to go on":
            places = [place for place, _ in cluster.client._dispatcher.handovers._receivers.values()]
            place = places[0] if places else None
        if place is not None and len(call.open_ids):
            cluster.sites[place].kill()

    after(call, num_tokens, kill)
    same(answers(await read(call))["x"], expected)
    await settled(cluster)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9])
async def test_a_reader_that_leaves(cluster: Cluster, num_tokens: int) -> None:
    call = call_of(cluster, "x")
    if num_tokens:
        after(call, num_tokens, call.close)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(call), 1.0)
    else:
        await asyncio.sleep(0)
    call.close()
    await settled(cluster)


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
async def test_an_abort(cluster: Cluster, num_tokens: int) -> None:
    call = call_of(cluster, "x")
    if num_tokens:
        after(call, num_tokens, lambda: cluster.client.abort(["x"]))
    else:
        cluster.client.abort(["x"])
    found = answers(await read(call))["x"]
    assert found.finish_reasons == [FinishReason.ABORT]
    await settled(cluster)


@pytest.mark.parametrize("num_tokens", [1, 5, 12])
async def test_a_drain_takes_the_kv_along(cluster: Cluster, num_tokens: int) -> None:
    expected = await alone(cluster, SAMPLINGS["seeded"])
    call = call_of(cluster, "x")
    left: list[str] = []

    def drain() -> None:
        if call.place is not None:
            left.append(call.place)
            cluster.sites[call.place].client.gate.drain()

    after(call, num_tokens, drain)
    same(answers(await read(call))["x"], expected)
    assert (left and call.place != left[0]) or num_tokens == 12  # which may end before its KV is there
    await settled(cluster)


async def test_a_drain_of_whole_requests_takes_the_kv_along() -> None:
    async with sites(a="MIX", b="MIX", p="DEFAULT") as found:
        found.client.leave("p", "it says what is expected")
        sampling = SAMPLINGS["greedy"].varied(max_tokens=200)
        expected = await alone(found, sampling)
        call = call_of(found, "x", sampling=sampling)
        first = []
        after(call, 30, lambda: (first.append(call.place), found.sites[call.place].client.gate.drain()))
        same(answers(await read(call))["x"], expected)
        other = found.sites["b" if first == ["a"] else "a"].engine._core
        # The prompt's blocks, and those of the answer that were full by then.
        assert other.scheduler.promotions.lander.num_landed >= (len(LONG) + 30) // CONFIG.cache.block_size
        assert found.client.counts.recovered["drained"] == 1 and found.client.counts.recomputed_tokens == 0
        await settled(found)


async def test_a_call_that_is_lost_before_it_can_leave(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is nobody's for a while: nothing but its way back may begin it again."""
    monkeypatch.setattr("xllm.client.handovers.MOVE_S", 0.1)
    expected = await alone(cluster, SAMPLINGS["greedy"])
    call, otherwise = call_of(cluster, "x", sampling=SAMPLINGS["greedy"]), list[str]()
    members = cluster.client.members.all

    def leave_and_lose() -> None:
        assert call.place is not None
        for name in members:
            members[name].is_ready = False
        handovers = cluster.client._dispatcher.handovers
        handovers.move(call, "d" if call.place != "d" else "e", call.unaborted, lambda: otherwise.append("again"))
        cluster.sites[call.place].client.drop(call.open_ids)
        call.lose(EngineDeadError("it was hit"))

    after(call, 5, leave_and_lose)
    reading = asyncio.create_task(read(call))
    await until(lambda: not all(member.is_ready for member in members.values()))
    await asyncio.sleep(0.3)
    for member in members.values():
        member.is_ready = True
    same(answers(await reading)["x"], expected)
    assert not otherwise
    await settled(cluster)


async def test_blocks_of_other_sizes() -> None:
    async with contextlib.AsyncExitStack() as stack:
        found = Cluster(ClusterClient(PairingFleet()))
        for name, role, size in (("p", "PREFILL", 16), ("d", "DECODE", 32)):
            config = dataclasses.replace(CONFIG, cache=dataclasses.replace(CONFIG.cache, block_size=size))
            engine = WatchedLocal(EngineCore(config))
            stack.callback(engine.shutdown)
            await found.add(name, engine, stack, role=role)
        expected = await alone(found, SAMPLINGS["greedy"])
        same(answers(await read(call_of(found, "x", sampling=SAMPLINGS["greedy"])))["x"], expected)
        assert moved(found) == 1
        await settled(found)
        await found.client.close()
