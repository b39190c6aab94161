"""A master over two instances, all real processes, under one fault at a time: no request notices it but by a pause."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

from serving.cluster.master_seat import LEASE_S
from tests.cluster.chaos.cluster import NO_LIMIT, ChaosCluster, Instance, Process, until
from tests.cluster.chaos.requests import Answer, Asked, all_requests, ask
from tests.cluster.chaos.run import counts, held, left_over, lives
from tests.cluster.chaos.traffic import Ended, Traffic
from tests.cluster.etcd_process import stop
from xllm.client.remote import SILENCE_S

T = TypeVar("T")
NAMES = ("greedy, long answer 0", "seeded 1", "stop strings 2", "JSON schema 3", "n=2 4", "logprobs 5",
         "seeded, penalties 0", "chat logprobs, n=2 1")


def named(name: str) -> Asked:
    asked = next(one for one in all_requests() if one.name == name)
    asked.body.update(stream=True, stream_options={"include_usage": True})
    return asked


@dataclass
class Small:
    """A cluster, what one engine alone says to `NAMES`, and the threads and files of all before the faults."""

    cluster: ChaosCluster
    expected: dict[str, Answer]
    loop: asyncio.AbstractEventLoop
    before: dict[str, dict[str, int]] = field(default_factory=dict)

    def run(self, what: Awaitable[T]) -> T:
        async def whole() -> T:
            return await what

        return self.loop.run_until_complete(asyncio.wait_for(whole(), 100))

    @property
    def master(self) -> Process:
        return self.cluster.masters[0]

    async def shown(self) -> dict[str, Any]:
        return (await self.master.get().get("/cluster")).json()

    async def loaded(self, copies: int = 1) -> list[asyncio.Task[Ended]]:
        """So many of each request under way."""
        traffic = Traffic(self.cluster, self.expected, 0)
        return [asyncio.create_task(traffic.one(0, 0, named(name))) for name in NAMES for _ in range(copies)]

    async def has_some(self, *instances: Instance) -> Instance:
        """Wait until one of them has a request; which."""
        found: list[Instance] = []

        async def is_there() -> bool:
            sent = {member["name"]: member.get("sent", 0) for member in (await self.shown())["members"]}
            found.extend(one for one in instances if sent.get(one.name, 0))
            return bool(found)

        await until(is_there, 20, "that a request is at an instance")
        return found[0]


def all_right(ended: list[Ended]) -> None:
    assert [(one.name, one.outcome, one.why) for one in ended if one.outcome != "right"] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    loop = asyncio.new_event_loop()
    cluster = ChaosCluster(tmp_path_factory.mktemp("chaos"), secrets.token_hex(32), num_instances=2)
    found = Small(cluster, {}, loop)
    try:
        found.run(cluster.open(num_masters=1))
        for name in NAMES:
            found.expected[name] = found.run(ask(cluster.instances[0].process.get(), named(name)))
        found.run(asyncio.gather(*found.run(found.loaded())))
        found.before = found.run(counts(cluster))
        yield found
    finally:
        loop.run_until_complete(cluster.close())
        loop.close()


def test_etcd_is_killed_and_wiped_while_streams_run(small: Small) -> None:
    async def play() -> list[Ended]:
        calls = await small.loaded()
        await small.has_some(*small.cluster.instances)
        small.cluster.etcd.kill()
        more = await small.loaded()
        ended = await asyncio.gather(*calls)
        small.cluster.etcd.wipe()
        await asyncio.to_thread(small.cluster.etcd.start)
        ended += await asyncio.gather(*more)
        await small.cluster.await_whole(20)
        return ended

    ended = small.run(play())
    all_right(ended)
    totals = small.run(small.shown())["totals"]
    assert totals["recovered"] == {} and totals["given_up"] == 0


def test_wall_clocks_step_and_nothing_can_be_written(small: Small) -> None:
    """For longer than a lease lasts. Nobody notices: no lease, deadline or order hangs on the wall clock."""
    async def play() -> list[Ended]:
        processes, before = small.cluster.processes, (await small.shown())["totals"]["recovered"]
        seen = [len(process.log) for process in processes]
        for process in processes:
            process.limit_files(0)
        ended = []
        for step_s in (3600.0, -3600.0, 0.0):
            for process in processes:
                process.step_clock(step_s)
            calls, over_s = await small.loaded(), time.monotonic() + (LEASE_S + 0.5 if step_s else 0.0)
            while time.monotonic() < over_s:
                states = await small.cluster.states(small.master)
                assert len(states) == 2 and {*states} <= {"active", "lease lost"}, "a busy machine may cost a lease"
                await asyncio.sleep(0.2)
            ended += await asyncio.gather(*calls)
        for process in processes:
            process.limit_files(NO_LIMIT)
        assert (await small.shown())["totals"]["recovered"] == before
        for process, number in zip(processes, seen, strict=True):
            assert "Traceback" not in process.log[number:]
        return ended

    all_right(small.run(play()))


def test_a_lease_is_lost_by_an_instance_that_lives(small: Small) -> None:
    async def play() -> list[Ended]:
        instance, etcd = small.cluster.instances[0], small.cluster.etcd
        key = f"XLLM:DEFAULT:{instance.name}"

        def lease() -> int:
            found = json.loads(etcd.ctl("get", key, "-w", "json")).get("kvs", [{}])
            return found[0].get("lease", 0)

        calls, old = await small.loaded(), await asyncio.to_thread(lease)
        before = (await small.shown())["totals"]["recovered"]
        await asyncio.to_thread(etcd.ctl, "lease", "revoke", f"{old:x}")

        async def is_back() -> bool:
            return await asyncio.to_thread(lease) not in (0, old)

        await until(is_back, 10, "that it is registered again")
        ended = await asyncio.gather(*calls)
        assert (await small.shown())["totals"]["recovered"] == before
        return ended

    all_right(small.run(play()))


def test_an_instance_is_stopped_before_it_has_computed_a_prompt(small: Small) -> None:
    async def play() -> list[Ended]:
        instance = small.cluster.instances[0]
        await asyncio.to_thread(stop, instance.process.process)
        try:
            ended = await asyncio.gather(*await small.loaded())
        finally:
            instance.process.process.send_signal(signal.SIGCONT)
        await small.cluster.await_whole(20)
        return ended

    ended = small.run(play())
    all_right(ended)
    assert small.run(small.shown())["totals"]["recovered"]["lost"] >= 1
    waited_s = max(one.ended_s - one.begun_s for one in ended)
    assert waited_s > SILENCE_S - 1.0, "it had some of them"


def test_a_rolling_restart_under_load(small: Small) -> None:
    async def play() -> list[Ended]:
        is_over = asyncio.Event()
        ended: list[Ended] = []

        async def client(number: int) -> None:
            traffic = Traffic(small.cluster, small.expected, 0)
            while not is_over.is_set():
                ended.append(await traffic.one(0, 0, named(NAMES[number % len(NAMES)])))
                number += 3

        clients = [asyncio.create_task(client(number)) for number in range(3)]
        for instance in small.cluster.instances:
            await small.has_some(instance)
            assert await instance.process.stop(signal.SIGTERM) == 0
            await instance.start()
            await small.cluster.await_whole(40)
        is_over.set()
        await asyncio.gather(*clients)
        return ended

    ended = small.run(play())
    all_right(ended)
    assert len(ended) > 8
    assert small.run(small.shown())["totals"]["recovered"].get("drained", 0) >= 1
    for process in small.cluster.processes:
        small.run(until(lambda process=process: _is_idle(process), 10, "rest"))


async def _is_idle(process: Process) -> bool:
    return not any((await held(process)).values())


def test_an_instance_is_killed_as_it_answers(small: Small) -> None:
    async def play() -> list[Ended]:
        before = (await small.shown())["totals"]["recovered"].get("lost", 0)
        calls = await small.loaded()
        instance = await small.has_some(*small.cluster.instances)
        os.kill(instance.process.process.pid, signal.SIGKILL)
        children = instance.children
        ended = await asyncio.gather(*calls)
        assert (await small.shown())["totals"]["recovered"]["lost"] >= before + 1
        await until(lambda: not any(map(lives, children)), 10, "that its engine ends, too")
        return ended

    all_right(small.run(play()))

    async def afterwards() -> list[str]:
        (dead,) = [one for one in small.cluster.instances if not one.process.is_alive]
        await dead.process.stop()  # closes what is open to it
        await dead.start()
        return await left_over(small.cluster, small.before)

    assert small.run(afterwards()) == [], "after all these tests"
