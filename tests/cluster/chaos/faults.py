"""The faults that a chaos run draws. Each ends once the cluster is as it was before."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from tests.cluster.chaos.cluster import ChaosCluster, Instance, Process, until

SEES_S = 90.0  # for masters to use an instance again
END_S = 60.0


@dataclass
class Happened:
    """One fault. begun_s, ended_s: on the `time.monotonic()` clock. lifted_s: when its cause was gone; recovery is
    from there."""

    kind: str
    target: str
    begun_s: float = field(default_factory=time.monotonic)
    lifted_s: float = 0.0
    ended_s: float = 0.0
    problem: str | None = None


class Faults:
    """`play` them for a while. happened: those that have been. away_s: for each master, by its place, the times at
    which it may have had no instance."""

    def __init__(self, cluster: ChaosCluster, rng: Random):
        self.cluster, self.rng = cluster, rng
        self.happened: list[Happened] = []
        self.away_s: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
        self._free = asyncio.Semaphore(len(cluster.instances) - 1)  # one is left alone
        self._idle = set(cluster.instances)
        self._etcd = asyncio.Lock()
        self._until_s = 0.0

    async def play(self, seconds: float) -> None:
        self._until_s = time.monotonic() + seconds
        lanes = [self._lane(self._of_an_instance, 0.2, 2.0), self._lane(self._of_an_instance, 1.0, 5.0),
                 self._lane(self._of_etcd, 2.0, 8.0), self._lane(self._of_a_master, 10.0, 25.0),
                 self._lane(self._of_all, 40.0, 80.0)]
        await asyncio.gather(*lanes)

    async def play_each(self) -> None:
        """Every kind once, one after the other."""
        rng = Random(self.rng.random())
        for fault in self._kinds:
            await self._of_an_instance(rng, fault)
            await asyncio.sleep(1.0)
        for kind in ETCD_FAULTS:
            await self._of_etcd(rng, kind)
            await asyncio.sleep(1.0)
        await self._of_a_master(rng)
        await asyncio.sleep(1.0)
        await self._of_all(rng)

    @property
    def _kinds(self) -> tuple[InstanceFault, ...]:
        return INSTANCE_FAULTS if len(self.cluster.masters) > 1 else PROCESS_FAULTS

    async def _lane(self, fault: Callable[[Random], Awaitable[None]], least_s: float, most_s: float) -> None:
        rng = Random(self.rng.random())
        while True:
            pause_s = rng.uniform(least_s, most_s)
            if time.monotonic() + pause_s > self._until_s:
                return
            await asyncio.sleep(pause_s)
            await fault(rng)

    @contextlib.contextmanager
    def _noted(self, kind: str, target: str) -> Iterator[Happened]:
        one = Happened(kind, target)
        self.happened.append(one)
        try:
            yield one
        except Exception as error:
            one.problem = f"{type(error).__name__}: {error}"
        one.ended_s = time.monotonic()
        one.lifted_s = one.lifted_s or one.begun_s

    # --- of one instance

    async def _of_an_instance(self, rng: Random, fault: InstanceFault | None = None) -> None:
        async with self._free:
            instance = rng.choice(sorted(self._idle, key=lambda one: one.name))
            self._idle.discard(instance)
            fault = fault or rng.choice(self._kinds)
            with self._noted(fault.__name__.replace("_", " "), instance.name) as one:
                await fault(self, instance, rng, one)
                await self._sees(instance)
            self._idle.add(instance)

    async def _sees(self, *instances: Instance) -> None:
        """Until every master uses them."""
        names = {address for one in instances for address in (one.name, one.network_address)}

        async def is_used() -> bool:
            for master in self.cluster.masters:
                shown = (await master.get().get("/cluster", timeout=10)).json()
                active = {member["name"] for member in shown["members"] if member["state"] == "active"}
                if len(active & names) < len(instances):
                    return False
            return True

        await until(is_used, SEES_S, f"that {', '.join(one.name for one in instances)} is used")

    async def killed(self, instance: Instance, rng: Random, one: Happened) -> None:
        instance.process.process.kill()
        await asyncio.sleep(rng.uniform(0, 2))
        await self._again(instance, one)

    async def engine_killed(self, instance: Instance, rng: Random, one: Happened) -> None:
        pid = instance.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: instance.engine_pid not in (None, pid), END_S, "another engine")
        instance.children += instance.process.family()

    async def terminated(self, instance: Instance, rng: Random, one: Happened) -> None:
        code = await instance.process.stop(signal.SIGTERM, END_S)
        assert code == 0, f"it ended with {code}"
        await self._again(instance, one)

    async def paused(self, instance: Instance, rng: Random, one: Happened) -> None:
        await self._pause(instance.process.process.pid, rng.uniform(0.5, 8), one)

    async def engine_paused(self, instance: Instance, rng: Random, one: Happened) -> None:
        pid = instance.engine_pid
        assert pid is not None
        await self._pause(pid, rng.uniform(0.5, 6), one)

    async def doubled(self, instance: Instance, rng: Random, one: Happened) -> None:
        """Another one is started under its name."""
        async with self._etcd:
            double = instance.launch(address="127.0.0.1:0")
            try:
                await until(lambda: not double.is_alive, END_S, "that it does not start")
                assert double.process.returncode != 0 and "is taken" in double.log, double.log[-2000:]
            finally:
                double.process.kill()
                double.process.wait()

    async def _pause(self, pid: int, seconds: float, one: Happened) -> None:
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
        one.lifted_s = time.monotonic()

    async def _again(self, instance: Instance, one: Happened) -> None:
        if instance.process.http is not None:
            await instance.process.http.aclose()
        instance.process.process.wait()
        one.lifted_s = time.monotonic()
        await instance.start()

    # --- of the network before one instance

    async def connection_cut(self, instance: Instance, rng: Random, one: Happened) -> None:
        instance.network.cut()

    async def network_cut(self, instance: Instance, rng: Random, one: Happened) -> None:
        instance.network.is_cut = True
        instance.network.cut()
        await asyncio.sleep(rng.uniform(0.5, 4))
        instance.network.is_cut, one.lifted_s = False, time.monotonic()

    async def network_slow(self, instance: Instance, rng: Random, one: Happened) -> None:
        instance.network.delay_s = rng.uniform(0.02, 0.3)
        await asyncio.sleep(rng.uniform(1, 5))
        instance.network.delay_s, one.lifted_s = 0.0, time.monotonic()

    async def network_silent(self, instance: Instance, rng: Random, one: Happened) -> None:
        """What is under way is lost without a word; a TCP stream with a hole is a broken one."""
        instance.network.is_swallowing = True
        await asyncio.sleep(rng.uniform(0.5, 7))
        instance.network.is_swallowing, one.lifted_s = False, time.monotonic()

    async def bit_flipped(self, instance: Instance, rng: Random, one: Happened) -> None:
        instance.network.to_flip = 1
        await until(lambda: not instance.network.to_flip, END_S, "traffic")

    # --- of what all share

    async def _of_etcd(self, rng: Random, kind: str | None = None) -> None:
        etcd = self.cluster.etcd
        async with self._etcd:
            kind = kind or rng.choice(ETCD_FAULTS)
            with self._noted(kind, "etcd") as one:
                if kind == "etcd paused":
                    assert etcd.process is not None
                    await self._pause(etcd.process.pid, rng.uniform(0.5, 7), one)
                else:
                    etcd.kill()
                    if kind == "etcd wiped":
                        etcd.wipe()
                    await asyncio.sleep(rng.uniform(0, 5))
                    one.lifted_s = time.monotonic()
                    await asyncio.to_thread(etcd.start)
                await until(self._knows_all, SEES_S, "that etcd knows all that live")

    async def _knows_all(self) -> bool:
        """Instances that another fault has are not waited for."""
        keys = await asyncio.to_thread(self.cluster.etcd.ctl, "get", "XLLM:", "--prefix", "--keys-only")
        wanted = {f"XLLM:DEFAULT:{one.name}" for one in self._idle} | {"XLLM:SERVICE:MASTER"}
        return wanted <= set(keys.split())

    async def _of_a_master(self, rng: Random) -> None:
        number = rng.randrange(len(self.cluster.masters))
        master: Process = self.cluster.masters[number]
        with self._noted("master paused", ("etcd", "networks")[number]) as one:
            await self._pause(master.process.pid, rng.uniform(0.5, 8), one)
            self.away_s[number].append((one.begun_s, one.lifted_s + 10))

    async def _of_all(self, rng: Random) -> None:
        places = len(self.cluster.instances) - 1
        for _ in range(places):
            await self._free.acquire()
        instances = list(self.cluster.instances)
        self._idle.clear()
        with self._noted("all killed", "all") as one:
            for instance in instances:
                instance.process.process.kill()
            begun_s = time.monotonic()
            try:
                await asyncio.sleep(rng.uniform(0, 3))
                await asyncio.gather(*(self._again(instance, one) for instance in instances))
                await self._sees(*instances)
            finally:
                for away in self.away_s.values():
                    away.append((begun_s, time.monotonic()))
        self._idle.update(instances)
        for _ in range(places):
            self._free.release()


InstanceFault = Callable[[Faults, Instance, Random, Happened], Awaitable[None]]
ETCD_FAULTS = ("etcd paused", "etcd killed", "etcd wiped")
PROCESS_FAULTS: tuple[InstanceFault, ...] = (
    Faults.killed, Faults.engine_killed, Faults.terminated, Faults.paused, Faults.engine_paused, Faults.doubled)
INSTANCE_FAULTS: tuple[InstanceFault, ...] = (
    *PROCESS_FAULTS, Faults.connection_cut, Faults.network_cut, Faults.network_slow, Faults.network_silent,
    Faults.bit_flipped)
