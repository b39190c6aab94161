"""The faults that a chaos run draws. Each ends once the cluster is as it was before."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from random import Random

from serving.cluster.master_seat import LEASE_S
from tests.cluster.chaos.cluster import MASTERS, NO_LIMIT, ChaosCluster, Instance, NotPlayed, Process, until
from tests.cluster.chaos.happened import Happened
from tests.cluster.chaos.stall import STALLED_S, Stall

LEADS_S = LEASE_S + 2.0  # for another master to lead, once the leading one is dead
LOADS_S = LEADS_S + 2.0  # and to have written loads
SEES_S = 90.0  # for masters to use an instance again
END_S = 60.0
STEP_S = 3600.0  # of a wall clock, either way
FULL_S = 8.0  # that a disk is full at most
LOG_BYTES = 2**16  # that a log may grow by while its instance's KV blocks find no room


class Faults:
    """`play` them for a while. happened: those that have been. away_s: for each master, by its place, the times at
    which it may have had no instance. dead_s: the same, of those at which there may have been no such master."""

    def __init__(self, cluster: ChaosCluster, rng: Random):
        self.cluster, self.rng = cluster, rng
        self.happened: list[Happened] = []
        self.away_s: dict[int, list[tuple[float, float]]] = {number: [] for number in range(len(MASTERS))}
        self.dead_s: dict[int, list[tuple[float, float]]] = {number: [] for number in range(len(MASTERS))}
        self.stall = Stall()
        self._free = asyncio.Semaphore(len(cluster.instances) - 1)  # one is left alone
        self._idle = set(cluster.instances)
        self._etcd, self._all = asyncio.Lock(), asyncio.Lock()
        self._until_s = 0.0

    async def play(self, seconds: float) -> None:
        self._until_s = time.monotonic() + seconds
        await asyncio.gather(*(self._lane(*lane) for lane in self._lanes()))

    def _lanes(self) -> list[tuple[Callable[[Random], Awaitable[None]], float, float]]:
        """Faults that come one after the other, and the least and the most seconds between them."""
        return [(self._of_an_instance, 0.2, 2.0), (self._of_an_instance, 1.0, 5.0), (self._of_etcd, 2.0, 8.0),
                (self._of_a_master, 10.0, 25.0), (self._of_all, 40.0, 80.0)]

    def kinds(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Each kind of fault, to be played alone, by name."""
        rng = Random(self.rng.random())
        return {**{_name(fault): partial(self._of_an_instance, rng, fault) for fault in self._kinds},
                **{kind: partial(self._of_etcd, rng, kind) for kind in ETCD_FAULTS},
                **{kind: partial(self._of_a_master, rng, kind) for kind in self._of_masters},
                "all killed": partial(self._of_all, rng)}

    @property
    def _kinds(self) -> tuple[InstanceFault, ...]:
        return INSTANCE_FAULTS if len(self.cluster.masters) > 1 else PROCESS_FAULTS

    @property
    def _of_masters(self) -> tuple[str, ...]:
        everything = len(self.cluster.masters) == len(MASTERS)
        return MASTER_FAULTS if everything else tuple(kind for kind in MASTER_FAULTS if kind != "master killed")

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
        except NotPlayed as error:
            one.not_played = str(error)
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
            with self._noted(_name(fault), instance.name) as one:
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
        await until(lambda: instance.engine_pid not in (None, pid), Process.start_s, "another engine")
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
                with self._slow_start():
                    await until(lambda: not double.is_alive, Process.start_s, "that it does not start")
                assert double.process.returncode != 0 and "is taken" in double.log, double.log[-2000:]
            finally:
                double.process.kill()
                double.process.wait()

    async def clock_stepped(self, instance: Instance, rng: Random, one: Happened) -> None:
        await self._step(instance.process, rng, one)

    async def disk_full(self, instance: Instance, rng: Random, one: Happened) -> None:
        """Its KV blocks find no room on disk; its log does, and says so. The tier stays off until it starts again."""
        process = instance.process
        if not await process.gauge("kv_disk_up", 0.0):
            raise NotPlayed("its disk tier is off already, or has not begun")
        process.limit_files(process.log_path.stat().st_size + LOG_BYTES)
        try:
            async def is_off() -> bool:
                text = " ".join(str(rng.randrange(10**6)) for _ in range(60))  # which is nowhere yet
                await process.get().post("/v1/completions", json={"prompt": text, "max_tokens": 1}, timeout=END_S)
                return not await process.gauge("kv_disk_up")

            await until(is_off, END_S, "that its disk tier is off")
        finally:
            process.limit_files(NO_LIMIT)
            one.lifted_s = time.monotonic()
        assert "switched off" in process.log and "File too large" in process.log, process.log[-2000:]

    async def nothing_written(self, instance: Instance, rng: Random, one: Happened) -> None:
        """No file can grow, not even its log."""
        await self._fill(instance.process, 0, rng, one)

    async def _fill(self, process: Process, num_bytes: int, rng: Random, one: Happened) -> None:
        process.limit_files(num_bytes)
        await asyncio.sleep(rng.uniform(FULL_S / 4, FULL_S))
        process.limit_files(NO_LIMIT)
        one.lifted_s = time.monotonic()
        assert process.is_alive, process.log[-2000:]

    async def _step(self, process: Process, rng: Random, one: Happened) -> None:
        """There and back, with longer than leases last between."""
        for seconds in (rng.choice((-STEP_S, STEP_S)), 0.0):
            process.step_clock(seconds)
            await asyncio.sleep(rng.uniform(LEASE_S + 1, LEASE_S + 3))
        one.lifted_s = time.monotonic()
        assert process.is_alive, process.log[-2000:]

    async def lease_lost(self, instance: Instance, rng: Random, one: Happened) -> None:
        """etcd forgets the lease of an instance that lives, and with it its record."""
        async with self._etcd:
            key, etcd = instance.key, self.cluster.etcd

            def lease() -> int:
                found = json.loads(etcd.ctl("get", key, "-w", "json")).get("kvs", [{}])
                return found[0].get("lease", 0)

            old = await asyncio.to_thread(lease)
            assert old, f"{key} has no lease"
            await asyncio.to_thread(etcd.ctl, "lease", "revoke", f"{old:x}")
            one.lifted_s = time.monotonic()

            async def is_back() -> bool:
                return await asyncio.to_thread(lease) not in (0, old)

            await until(is_back, LEASE_S, "that it is registered again")
            one.figures["registered"] = time.monotonic() - one.lifted_s

    @contextlib.contextmanager
    def _slow_start(self) -> Iterator[None]:
        """What does not come true here is the machine's fault."""
        try:
            yield
        except AssertionError as error:
            raise NotPlayed(str(error)) from None

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
        try:
            await instance.start()
        except NotPlayed as slow:
            one.not_played = str(slow)
            await instance.await_start()  # once more as long: the cluster is to be whole again

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
        wanted = {one.key for one in self._idle} | {"XLLM:SERVICE:MASTER"}
        return wanted <= set(keys.split())

    async def _of_a_master(self, rng: Random, kind: str | None = None) -> None:
        kind = kind or rng.choice(self._of_masters)
        if kind == "master killed":
            await self._kill_leader(rng)
            return
        number = rng.randrange(len(self.cluster.masters))
        with self._noted(kind, MASTERS[number]) as one:
            if kind == "master's clock stepped":
                await self._step(self.cluster.masters[number], rng, one)
                return
            if kind == "master's disk full":
                await self._fill(self.cluster.masters[number], 0, rng, one)
                return
            await self._pause(self.cluster.masters[number].process.pid, rng.uniform(0.5, 8), one)
            self.away_s[number].append((one.begun_s, one.lifted_s + 10))

    async def _kill_leader(self, rng: Random) -> None:
        """The other one that follows etcd leads then; this one is started again."""
        cluster = self.cluster
        async with self._all, self._etcd:  # in this order: who has all waits for who may wait for etcd
            await until(self._has_leader, END_S, "that a master leads")
            number = await cluster.leader()
            assert number is not None
            with self._noted("master killed", MASTERS[number]) as one:
                one.dead = number
                cluster.masters[number].process.kill()
                cluster.masters[number].process.wait()
                last = max((await asyncio.to_thread(self._loads)).values(), default=0)
                try:
                    with self._in_time(one):
                        await until(self._has_leader, LEADS_S, "that the other one leads")
                    one.figures["leads"] = time.monotonic() - one.begun_s
                    assert await cluster.leader() != number

                    async def writes() -> bool:
                        now = await asyncio.to_thread(self._loads)
                        return all(now.get(instance.name, 0) > last for instance in self._idle)

                    with self._in_time(one):
                        await until(writes, LOADS_S, "that it writes loads")
                    one.figures["loads"] = time.monotonic() - one.begun_s
                    await asyncio.sleep(rng.uniform(0, 3))
                finally:
                    one.lifted_s = time.monotonic()
                    await cluster.start_master(number)
                    self.dead_s[number].append((one.begun_s, time.monotonic()))
                await self._sees()
                assert await cluster.leader() not in (None, number), "the other one does not lead any more"

    @contextlib.contextmanager
    def _in_time(self, one: Happened) -> Iterator[None]:
        """What comes too late here while this process, too, waited for its turn is the machine's fault."""
        try:
            yield
        except AssertionError as error:
            if (stalled_s := self.stall.since(one.begun_s)) > STALLED_S:
                raise NotPlayed(f"{error}; this machine stood still for {stalled_s:.1f} s of that") from None
            raise

    async def _has_leader(self) -> bool:
        return await self.cluster.leader() is not None

    def _loads(self) -> dict[str, int]:
        """The revisions at which each instance's load was written last."""
        prefix = "XLLM:LOADMETRICS:"
        found = json.loads(self.cluster.etcd.ctl("get", prefix, "--prefix", "--keys-only", "-w", "json"))
        return {base64.b64decode(item["key"]).decode().removeprefix(prefix): item["mod_revision"]
                for item in found.get("kvs", ())}

    async def _of_all(self, rng: Random) -> None:
        async with self._all:
            await self._kill_all(rng)

    async def _kill_all(self, rng: Random) -> None:
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


def _name(fault: InstanceFault) -> str:
    return fault.__name__.replace("_", " ")


InstanceFault = Callable[[Faults, Instance, Random, Happened], Awaitable[None]]
MASTER_FAULTS = ("master paused", "master killed", "master's clock stepped", "master's disk full")
ETCD_FAULTS = ("etcd paused", "etcd killed", "etcd wiped")
PROCESS_FAULTS: tuple[InstanceFault, ...] = (
    Faults.killed, Faults.engine_killed, Faults.terminated, Faults.paused, Faults.engine_paused, Faults.doubled,
    Faults.clock_stepped, Faults.disk_full, Faults.nothing_written, Faults.lease_lost)
INSTANCE_FAULTS: tuple[InstanceFault, ...] = (
    *PROCESS_FAULTS, Faults.connection_cut, Faults.network_cut, Faults.network_slow, Faults.network_silent,
    Faults.bit_flipped)
