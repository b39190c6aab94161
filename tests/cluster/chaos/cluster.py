"""`ChaosCluster`: etcd, instances and masters as processes of their own, of which one master reaches the instances
through networks that can be broken."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.cluster.chaos.bad_network import BadNetwork
from tests.cluster.etcd_process import EtcdProcess
from tests.parallel.test_meeting import free_port

ROOT = Path(__file__).resolve().parents[3]
ADMIN = {"Authorization": "Bearer the-admins"}
CLOCK = Path(__file__).parent / "clock"  # a folder of Python's path
# A start takes as long as the machine's other work lets it: PATIENCE times what the first one took, START_S at least.
START_S, PATIENCE = 120.0, 8.0
NO_LIMIT = resource.RLIM_INFINITY
ENGINE = ("--dtype", "float32", "--max-model-len", "512", "--num-kv-blocks", "512", "--max-num-seqs", "16")


class NotPlayed(Exception):
    """A fault could not be played: this machine was too slow for it, or what it is about was not there. That says
    nothing about the cluster."""


async def until(condition: Callable[[], Any], timeout_s: float, what: str) -> float:
    """Poll until `condition`, or what it returns to be awaited, holds; returns how long that took."""
    begun_s = time.monotonic()
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            try:
                found = await found
            except httpx.HTTPError:
                found = False
        if found:
            return time.monotonic() - begun_s
        if time.monotonic() - begun_s > timeout_s:
            raise AssertionError(f"{what} did not come true in {timeout_s:g} s")
        await asyncio.sleep(0.05)


class Process:
    """A command of `xllm`, its log, and HTTP to it. Its wall clock can be stepped, and its files kept from growing."""

    start_s = START_S  # of all: for one to start

    def __init__(self, log: Path, secret: str, *words: str):
        self.log_path = log
        self._clock = log.with_suffix(".clock")
        self.step_clock(0.0)
        path = os.pathsep.join([str(CLOCK), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("ab") as out:
            self._said_before = out.tell()
            self.process = subprocess.Popen([sys.executable, "-m", "serving.commands.cli", *words], cwd=ROOT,
                                            stdout=out, stderr=subprocess.STDOUT,
                                            env={**os.environ, "XLLM_CLUSTER_SECRET": secret, "PYTHONPATH": path,
                                                 "CHAOS_CLOCK": str(self._clock)})
        self.http: httpx.AsyncClient | None = None

    @property
    def log(self) -> str:
        """Of this life."""
        return self.log_path.read_bytes()[self._said_before:].decode(errors="replace")

    async def await_log(self, pattern: str) -> str:
        try:
            await until(lambda: not self.is_alive or re.search(pattern, self.log), Process.start_s, pattern)
        except AssertionError:
            raise NotPlayed(f"{self.log_path.stem} has not started within {Process.start_s:.0f} s") from None
        found = re.search(pattern, self.log)
        assert found, self.log[-3000:]
        return found[1]

    async def await_url(self) -> None:
        url = await self.await_log(r"on (http://127\.0\.0\.1:\d+)")
        self.http = httpx.AsyncClient(base_url=url, timeout=None, headers=ADMIN, limits=httpx.Limits(
            max_connections=None, max_keepalive_connections=4))

    def get(self) -> httpx.AsyncClient:
        assert self.http is not None
        return self.http

    async def gauge(self, name: str, unknown: float | None = None, **labels: str) -> float:
        """The sum over all of its labels but for those given. unknown: for one that its engine has not said yet; None:
        it has."""
        text = (await self.get().get("/metrics", timeout=10)).text
        found = [float(value) for said, value in re.findall(rf"^xllm:{name}(\{{.*\}})? (\S+)$", text, re.MULTILINE)
                 if all(f'{label}="{wanted}"' in said for label, wanted in labels.items())]
        if not found:
            assert unknown is not None, name
            return unknown
        return sum(found)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """It, and what it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        return []

    def step_clock(self, seconds: float) -> None:
        """Its wall clock, and those of what it has started, are so far ahead from now on, until it starts again."""
        with self._clock.open("r+b" if self._clock.exists() else "wb") as file:
            file.write(struct.pack("d", seconds))

    def limit_files(self, num_bytes: int) -> None:
        """No file may grow beyond that by what it, or what it has started, writes: EFBIG, as on a full disk ENOSPC."""
        for one in self.family():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (num_bytes, NO_LIMIT))

    async def stop(self, number: int = signal.SIGTERM, timeout_s: float = 45.0) -> int:
        if self.is_alive:
            self.process.send_signal(number)
            try:
                await until(lambda: not self.is_alive, timeout_s, "its end")
            finally:
                self.process.kill()
        if self.http is not None:
            await self.http.aclose()
        return self.process.wait()


class Instance:
    """A place in the cluster where an `xllm serve` runs, or is started again. children: of the lives before."""

    def __init__(self, cluster: ChaosCluster, name: str):
        self.cluster, self.name = cluster, name
        self.address = f"127.0.0.1:{free_port()}"
        self.network = BadNetwork(self.address)
        self.now: Process | None = None
        self.children: list[psutil.Process] = []

    def launch(self, name: str | None = None, address: str | None = None) -> Process:
        return Process(
            self.cluster.folder / f"{name or self.name}{'-double' if address else ''}.log", self.cluster.secret,
            "serve", "--port", "0", *ENGINE, "--admin-api-key", "the-admins", "--drain-timeout", "30", "--etcd-addr",
            self.cluster.etcd.address, "--instance-name", self.name, "--cluster-listen", address or self.address,
            *self._role(), *(() if address else self._tiers()))

    @property
    def key(self) -> str:
        """Of its record in etcd."""
        return f"XLLM:{self.role}:{self.name}"

    @property
    def role(self) -> str:
        return ROLES.get(self.name, "DECODE") if self.cluster.has_roles else "DEFAULT"

    def _role(self) -> tuple[str, ...]:
        if not self.cluster.has_roles:
            return ()
        return ("--enable-disagg-pd", "--instance-role", self.role, "--kv-lease-s", str(KV_LEASE_S),
                "--kv-transfer-ways", WAYS.get(self.name, "shm,tcp"), *LONG_PROMPTS)

    def _tiers(self) -> tuple[str, ...]:
        if not self.cluster.has_tiers:
            return ()
        tiers = ROLE_TIERS if self.cluster.has_roles else TIERS
        return (*tiers, "--disk-cache-dir", str(self.cluster.folder / f"{self.name}-kv"))

    async def start(self) -> None:
        """Raises NotPlayed: it takes too long."""
        self.now = self.launch()
        await self.await_start()

    async def await_start(self) -> None:
        """As `start`, of one that was launched."""
        await self.process.await_log("(curl)")
        await self.process.await_url()
        self.children += self.process.family()

    @property
    def process(self) -> Process:
        assert self.now is not None
        return self.now

    @property
    def network_address(self) -> str | None:
        """None: it has no network."""
        return self.network.address if self.network.is_open else None

    @property
    def engine_pid(self) -> int | None:
        for one in self.process.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "xllm.client.engine_process" in one.cmdline():
                    return one.pid
        return None


MASTERS = ("etcd", "networks", "standby")
TIERS = ("--host-cache-size", "16MiB", "--disk-cache-size", "64MiB")
# Two compute prompts and two go on, which KV reaches in shared memory and over TCP. Prompts are long, and computed in
# many steps, so that there is time for a fault in each phase; all that has two tokens is handed over.
ROLES = {"a": "PREFILL", "b": "PREFILL"}
WAYS = {"d": "tcp"}
LONG_PROMPTS = ("--max-model-len", "2048", "--max-num-batched-tokens", "128")
ROLE_TIERS = ("--host-cache-size", "64MiB", "--disk-cache-size", "64MiB")
KV_LEASE_S = 10.0  # longer than a prompt takes here, and soon enough for what is looked at after the traffic
ROLE_TARGETS = ("--target-tpot", "0.1")  # ms: those that go on compute no prompt themselves


class ChaosCluster:
    """`await open()`, then `close()`. masters: as many of `MASTERS` as are asked for. The first and the last find the
    instances in etcd, and one of these two leads; the second is told where the networks before them are. has_tiers:
    instances keep KV blocks in host memory and on disk, too. has_roles: they have the roles of `ROLES`."""

    def __init__(self, folder: Path, secret: str, num_instances: int = 3, *, has_tiers: bool = False,
                 has_roles: bool = False):
        self.folder, self.secret, self.has_tiers, self.has_roles = folder, secret, has_tiers, has_roles
        self.etcd = EtcdProcess(folder)
        self.instances = [Instance(self, name) for name in "abcd"[:num_instances]]
        self.masters: list[Process] = []
        self._dead: list[Process] = []

    async def open(self, *, num_masters: int = len(MASTERS)) -> ChaosCluster:
        await asyncio.to_thread(self.etcd.start)
        begun_s = time.monotonic()
        await asyncio.gather(*(instance.start() for instance in self.instances))
        Process.start_s = max(START_S, PATIENCE * (time.monotonic() - begun_s))
        if num_masters > 1:
            for instance in self.instances:
                await instance.network.open()
        self._ports = [free_port() for _ in range(num_masters)]
        self.masters = [self._launch_master(number) for number in range(num_masters)]
        for master in self.masters:
            await master.await_url()
        await self.await_whole()
        return self

    def _launch_master(self, number: int) -> Process:
        kind = MASTERS[number]
        place = ("--instances", ",".join(one.network.address for one in self.instances)) if kind == "networks" else \
            ("--etcd-addr", self.etcd.address, "--rpc-server-port", str(8889 + number))
        return Process(self.folder / f"master-{kind}.log", self.secret, "master", "--http_server_port",
                       str(self._ports[number]), "--admin-api-key", "the-admins", *place,
                       *(ROLE_TARGETS if self.has_roles else ()))

    async def start_master(self, number: int) -> None:
        """Again, where it was."""
        old = self.masters[number]
        old.process.wait()
        master = self._launch_master(number)
        await master.await_url()
        self.masters[number] = master
        self._dead.append(old)  # somebody may be asking it just now

    async def leader(self) -> int | None:
        """The place of the master that leads, as those say that follow etcd; None: nobody."""
        for number, master in enumerate(self.masters):
            with contextlib.suppress(httpx.HTTPError):
                if (await master.get().get("/cluster", timeout=10)).raise_for_status().json()["is_leader"]:
                    return number
        return None

    async def states(self, master: Process) -> list[str]:
        shown = (await master.get().get("/cluster", timeout=10)).raise_for_status().json()
        return sorted(member["state"] for member in shown["members"])

    async def await_whole(self, timeout_s: float = 90.0) -> float:
        """Until every master takes requests and uses every instance; returns how long that took."""
        async def is_whole() -> bool:
            for master in self.masters:
                if (await master.get().get("/health", timeout=10)).status_code != 200:
                    return False
                if await self.states(master) != ["active"] * len(self.instances):
                    return False
            return True

        return await until(is_whole, timeout_s, "that the cluster is whole")

    async def close(self) -> None:
        for instance in self.instances:
            with contextlib.suppress(Exception):
                await instance.network.close()
        await asyncio.gather(*(process.stop() for process in (*self.masters, *self._dead)), return_exceptions=True)
        await asyncio.gather(*(one.now.stop() for one in self.instances if one.now), return_exceptions=True)
        self.etcd.kill()

    @property
    def processes(self) -> list[Process]:
        return [*self.masters, *(instance.process for instance in self.instances)]
