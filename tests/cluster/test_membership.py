"""What masters believed of instances that come, go, vanish and lose their connections, against what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time

import pytest

from serving.cluster.instance_record import InstanceRecord
from tests.cluster.linearizable import NEVER
from tests.cluster.members import Instance, Instances, Master
from tests.cluster.membership import Life, Membership, MembershipHistory, complaints_of_members
from tests.cluster.sites import StoreSite
from xllm.client.remote import RemoteClient

ALL = os.environ.get("HISTORIES_ALL") == "1"
SECONDS = 60.0 if ALL else 2.0
SOON_S = 3.0  # a try to connect is made every 0.5 s at least
NAMES = ("a:1", "b:1", "c:1", "d:1")


class NotedMaster(Master):
    """It writes down who joins and leaves."""

    history: MembershipHistory

    def _join(self, name: str, client: RemoteClient, record: InstanceRecord) -> None:
        super()._join(name, client, record)
        self.history.join(name, client.incarnation)

    def _leave(self, name: str, reason: str) -> None:
        super()._leave(name, reason)
        self.history.leave(name, reason)


async def _live(instances: Instances, site: StoreSite, name: str, rng: random.Random, until_s: float,
                lives: list[Life]) -> None:
    """One name: instances one after the other."""
    async with site.open() as store:
        while time.monotonic() < until_s:
            begun_s = time.monotonic()
            instance: Instance = await instances(store, name)
            life = Life(name, instance.gate.incarnation, begun_s, time.monotonic())
            lives.append(life)
            end_s = time.monotonic() + rng.uniform(0.3, 2.0)
            while time.monotonic() < min(end_s, until_s):
                await asyncio.sleep(rng.uniform(0.05, 0.4))
                kind = rng.random()
                if kind < 0.25:
                    life.disturbed.append(time.monotonic())
                    instance.gate._drop_all("of this test")
                elif kind < 0.4:  # somebody deletes the record: no reason to leave
                    await store.delete(b"XLLM:DEFAULT:" + name.encode())
                    life.unlisted.append(time.monotonic())
            if time.monotonic() >= until_s:
                return
            life.ended_s = time.monotonic()
            await (instance.die() if rng.random() < 0.5 else instance.close())
            life.gone_s = time.monotonic()
            await asyncio.sleep(rng.uniform(0.0, 0.5))


@pytest.mark.parametrize("site", ["etcd", "embedded"] if ALL else ["embedded"], indirect=True)
async def test_what_masters_believed_was_so(site: StoreSite, instances: Instances) -> None:
    rng, lives, masters = random.Random(7), list[Life](), list[NotedMaster]()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            master = NotedMaster(await stack.enter_async_context(site.open()))
            master.history = MembershipHistory()
            await master.registry.start()
            masters.append(master)
        until_s = time.monotonic() + SECONDS
        await asyncio.gather(*(_live(instances, site, name, random.Random(rng.random()), until_s, lives)
                               for name in NAMES))
        living = {life.name: life.incarnation for life in lives if life.ended_s == NEVER}
        for master in masters:
            await master.until(lambda master=master: {name: client.incarnation for name, client
                                                      in master.joined.items()} == living, SOON_S)
        end_s = time.monotonic()
        complaints = [complaint for master in masters
                      for complaint in complaints_of_members(lives, master.history.memberships, end_s, soon_s=SOON_S)]
        for master in masters:
            await master.registry.close()
    print(f"{len(lives)} lives, {sum(len(life.disturbed) for life in lives)} times disturbed, "
          f"{[len(master.history.memberships) for master in masters]} joins")
    assert not complaints, "\n".join([*complaints, *map(str, lives)])
    assert len(lives) > len(NAMES) and sum(len(life.disturbed) for life in lives) > 2


A = Life("a", "1", 0.0, 0.5, ended_s=10.0, gone_s=10.1, disturbed=[5.0])
WAS = [Membership("a", "1", 0.4, 5.1, "lost"), Membership("a", "1", 5.4, 10.05, "the end")]


@pytest.mark.parametrize(("memberships", "words"), [
    (WAS, None),
    (WAS[:1], "a lived for 4.900 s from 5.100 on and was no member"),
    (WAS[1:], "a lived for 4.500 s from 0.500 on and was no member"),
    ([Membership("a", "1", 0.4, 10.05)], None),
    ([Membership("a", "1", 0.4, 10.05), Membership("a", "1", 10.2, 10.3)], "joined at 10.200, and lived from"),
    ([Membership("a", "1", 0.4, 3.0, "why"), Membership("a", "1", 3.1, 10.05)],
     "a left at 3.000 (why) without a cause"),
    ([Membership("a", "1", 0.4)], "a was held to be a member 9.900 s after its end"),
    ([*WAS, Membership("a", "2", 6.0, 6.1)], "a joined as 2, which it never was"),
    ([Membership("a", "1", 0.4, 10.05), Membership("a", "1", 5.4, 10.05)], "joined as 1 while it was a member"),
])
def test_a_wrong_belief_is_found_out(memberships: list[Membership], words: str | None) -> None:
    complaints = complaints_of_members([A], memberships, 20.0, soon_s=1.0)
    assert complaints == [] if words is None else any(words in complaint for complaint in complaints), complaints
