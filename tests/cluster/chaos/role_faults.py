"""`RoleFaults`: faults of instances that compute prompts and of those that go on with them, each at a chosen moment of
a request that is handed over."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from random import Random

import httpx
import psutil

from tests.cluster.chaos.cluster import ChaosCluster, Instance, NotPlayed, until
from tests.cluster.chaos.faults import END_S, Faults
from tests.cluster.chaos.happened import Happened
from tests.cluster.chaos.requests import LONGEST, salted
from tests.cluster.chaos.traffic import Ended, Traffic
from tests.cluster.chaos.transfer_cut import cut_transfers

NUM_PROBES = 3  # that a fault sends for itself, one of which it then strikes
MOMENT_S = 15.0  # for the moment to come; a busy machine computes the prompt in 5 s
DECODED = 8  # events of a probe that has gone on elsewhere, before it counts as decoded there
MOMENTS = ("prefill", "transfer", "decode")
Strike = Callable[["RoleFaults", Instance, Random, Happened], Awaitable[None]]


@dataclass(eq=False)
class Probe:
    """A long request of a fault's own. request_id: as its master shows it. places: the instances that it was sent to,
    in that order."""

    request_id: str
    task: asyncio.Task[Ended]
    places: tuple[str, ...] = ()

    @property
    def is_at_prefill(self) -> bool:
        return len(self.places) == 1 and not self.task.done()

    @property
    def is_handed_over(self) -> bool:
        return len(self.places) == 2 and not self.task.done()


class RoleFaults(Faults):
    """As `Faults`, and those of the two roles, in turn. The first master or the third has the probes: they know the
    roles."""

    def __init__(self, cluster: ChaosCluster, rng: Random, traffic: Traffic):
        super().__init__(cluster, rng)
        self._traffic = traffic
        self._numbers = itertools.count()
        self._left: list[tuple[str, str, str]] = []  # of this round: how, whom, when

    def _lanes(self) -> list[tuple[Callable[[Random], Awaitable[None]], float, float]]:
        return [(self._of_a_role, 0.1, 0.5), (self._of_an_instance, 10.0, 20.0), (self._of_etcd, 5.0, 15.0),
                (self._of_a_master, 20.0, 50.0), (self._of_all, 150.0, 250.0)]

    def kinds(self) -> dict[str, Callable[[], Awaitable[None]]]:
        rng = Random(self.rng.random())
        of_roles = {_name(*kind): partial(self._of_a_role, rng, kind) for kind in KINDS}
        return {**of_roles, **super().kinds()}

    async def _of_a_role(self, rng: Random, kind: tuple[str, str, str] | None = None) -> None:
        if kind is None:
            self._left = self._left or rng.sample(KINDS, len(KINDS))
            kind = self._left.pop()
        async with self._free:
            with self._noted(_name(*kind), kind[1]) as one:
                await self._strike(*kind, rng, one)

    async def _strike(self, how: str, role: str, moment: str, rng: Random, one: Happened) -> None:
        await self._all_there(role)
        probes = self._send(rng)
        victim: Instance | None = None
        try:
            victim = await self._victim(role, moment, probes)
            struck = [probe for probe in probes if probe.is_at_prefill and (role == "DECODE" or
                                                                            probe.places[0] == victim.name)]
            one.target, one.begun_s = victim.name, time.monotonic()
            await STRIKES[how](self, victim, rng, one)
            await self._sees(victim)
        finally:
            ended = await asyncio.gather(*(probe.task for probe in probes))
            if victim is not None:
                self._idle.add(victim)
        if moment == "prefill" and not any((ended[probes.index(probe)].answer.first_s or one.ended_s) > one.begun_s
                                           for probe in struck):
            raise NotPlayed("the prompts had been computed already")

    async def _all_there(self, role: str) -> None:
        """No other fault has an instance of this role, and not all of the other one."""
        def is_there() -> bool:
            busy = [one.role for one in self.cluster.instances if one not in self._idle]
            return role not in busy and len(busy) < 2

        try:
            await until(is_there, END_S, "that other faults are over")
        except AssertionError as error:
            raise NotPlayed(str(error)) from None

    def _send(self, rng: Random) -> list[Probe]:
        master = rng.choice((0, 2)) if len(self.cluster.masters) > 2 else 0
        found = []
        for _ in range(NUM_PROBES):
            number = next(self._numbers)
            asked = salted(LONGEST, f"probe {self.rng.random()}", request_id=f"probe-{number}")
            found.append(Probe(f"cmpl-probe-{number}", asyncio.create_task(self._traffic.one(-number, master, asked))))
        self._master = self.cluster.masters[master]
        return found

    async def _victim(self, role: str, moment: str, probes: list[Probe]) -> Instance:
        """Wait for the moment at one of the idle instances of this role, which is idle then no more."""
        places = {one.name: one for one in self.cluster.instances if one.role == role}
        until_s = time.monotonic() + MOMENT_S
        while time.monotonic() < until_s and not all(probe.task.done() for probe in probes):
            await self._look(probes)
            for name, instance in places.items():
                if instance in self._idle and await self._is_moment(instance, name, role, moment, probes):
                    self._idle.discard(instance)
                    return instance
            await asyncio.sleep(0.01)
        raise NotPlayed(f"no request was at {' or '.join(places)} in {moment}: "
                        f"{[(probe.places, probe.task.done()) for probe in probes]}")

    async def _look(self, probes: list[Probe]) -> None:
        """Where they are, as their master says."""
        with contextlib.suppress(httpx.HTTPError):
            shown = (await self._master.get().get("/cluster", timeout=10)).json()
            for probe in probes:
                mine = [each for each in shown["decisions"][::-1] if each["request_id"].startswith(probe.request_id)]
                probe.places = tuple(each["instance"] for each in mine)

    async def _is_moment(self, instance: Instance, name: str, role: str, moment: str, probes: list[Probe]) -> bool:
        if moment == "decode":
            return any(probe.is_handed_over and name == probe.places[role == "DECODE"] for probe in probes)
        senders = [one for one in self.cluster.instances for probe in probes
                   if probe.is_at_prefill and probe.places[0] == one.name and (role == "DECODE" or one is instance)]
        # Layers are sent while others are computed: before the first of them it is the prompt alone. Room for them is
        # open all the time.
        lanes = [("publish", sender) for sender in senders] if moment == "transfer" else []
        if role == "DECODE":
            lanes.append(("land", instance))
        try:
            return bool(senders) and all([await one.process.gauge("kv_lane_queued_jobs", 0.0, lane=lane)
                                          for lane, one in lanes])
        except httpx.HTTPError:
            return False

    # --- how

    async def struck_killed(self, instance: Instance, rng: Random, one: Happened) -> None:
        await self.killed(instance, rng, one)

    async def struck_stopped(self, instance: Instance, rng: Random, one: Happened) -> None:
        """It and its engine, at once."""
        family = instance.process.family()
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGSTOP)
        await asyncio.sleep(rng.uniform(0.5, 8))
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGCONT)
        one.lifted_s = time.monotonic()

    async def struck_drained(self, instance: Instance, rng: Random, one: Happened) -> None:
        await self.terminated(instance, rng, one)

    async def struck_cut(self, instance: Instance, rng: Random, one: Happened) -> None:
        """All connections for KV that it has, three times: some are made again at once."""
        num_cut = 0

        async def is_cut() -> bool:
            nonlocal num_cut
            pid = instance.engine_pid
            num_cut += cut_transfers(pid) if pid is not None else 0
            return num_cut >= 3

        with contextlib.suppress(AssertionError):
            await until(is_cut, END_S / 10, "that connections are cut")
        if not num_cut:
            raise NotPlayed("there was no connection for KV any more")
        one.lifted_s = time.monotonic()


def _name(how: str, role: str, moment: str) -> str:
    return f"{role} {how} in {moment}"


STRIKES: dict[str, Strike] = {"killed": RoleFaults.struck_killed, "stopped": RoleFaults.struck_stopped,
                              "drained": RoleFaults.struck_drained, "cut": RoleFaults.struck_cut}
KINDS = [*itertools.product(("killed", "stopped", "drained"), ("PREFILL", "DECODE"), MOMENTS),
         ("cut", "PREFILL", "transfer"), ("cut", "DECODE", "transfer")]
