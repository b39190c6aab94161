"""Runs the traffic on a server of its own and judges what is left."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import httpx

from tests.serving.server_process import ServerProcess
from tests.soak.gauges import COUNTS, PARTS, Gauges, Sample, slope_bytes
from tests.soak.traffic import MIX, Caller, Kind, Wrong

KEY, ADMIN_KEY = "soak", "soak-admin"
# Few blocks, so that prefixes are evicted and sequences preempted.
FLAGS = ("--num-kv-blocks", "256", "--max-num-seqs", "24", "--scheduling-policy", "priority",
         "--api-key", KEY, "--admin-api-key", ADMIN_KEY, "--drain-timeout", "5")
ANSWER_WITHIN_S, REST_WITHIN_S = 120.0, 30.0
NUM_SAMPLES = 200
NUM_ERRORS_SHOWN = 20

# Allowances. Memory: an allocator's arenas creep; a leak of 1 KiB a request is 50 MiB over the half of 10^5.
# Threads: the event loop's pool starts them as it needs them, up to so many.
RSS_GROWTH_BYTES = 24 * 2**20
COUNT_GROWTH = {"threads": min(32, (os.cpu_count() or 1) + 4), "files": 4, "sockets": 4}


class Soak:
    """One run. `outcomes` and `samples` grow while it goes on."""

    def __init__(self, server: ServerProcess, num_requests: int, seed: int, concurrency: int,
                 progress: Callable[[int], object] = lambda _: None, within_s: float = math.inf):
        self.seed, self.concurrency, self.within_s = seed, concurrency, within_s
        self.gauges = Gauges(server)
        self.samples: list[Sample] = []
        self.statuses: dict[str, Counter[str]] = defaultdict(Counter)
        self.latencies_s: dict[str, list[float]] = defaultdict(list)
        self.errors: list[str] = []
        self.num_errors = self.num_done = 0
        self._server, self._progress = server, progress
        self._next = iter(range(num_requests))
        self._every = max(1, num_requests // NUM_SAMPLES)

    async def play(self) -> None:
        """All requests, so many at once. What goes wrong is kept in `errors`."""
        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency)
        async with httpx.AsyncClient(base_url=self._server.url, headers=headers, limits=limits, timeout=None) as http:
            caller = Caller(http, {"Authorization": f"Bearer {ADMIN_KEY}"})
            await asyncio.gather(*(self._work(caller) for _ in range(self.concurrency)))

    async def _work(self, caller: Caller) -> None:
        until_s = time.monotonic() + self.within_s
        for index in self._next:
            if time.monotonic() > until_s:
                return
            rng = Random(f"{self.seed} {index}")
            kind, = rng.choices(list(MIX), weights=list(MIX.values()))
            await self._one(caller, kind, rng, index)
            self.num_done += 1
            self._progress(1)
            if self.num_done % self._every == 0:
                self.samples.append(self.gauges.sample(self.num_done))

    async def _one(self, caller: Caller, kind: Kind, rng: Random, index: int) -> None:
        name, began_s = kind.__name__, time.perf_counter()
        try:
            status = await asyncio.wait_for(kind(caller, rng), ANSWER_WITHIN_S)
        except (Wrong, asyncio.TimeoutError, httpx.HTTPError, KeyError, ValueError) as error:
            self.num_errors += 1
            self.errors.append(f"request {index}, {name}: {type(error).__name__}: {error}")
            del self.errors[NUM_ERRORS_SHOWN:]
            status = "wrong answer" if isinstance(error, Wrong) else "no answer"
        self.latencies_s[name].append(time.perf_counter() - began_s)
        self.statuses[name][status] += 1


def settle(gauges: Gauges) -> dict[str, float]:
    """What is still held once nothing more goes away, or `REST_WITHIN_S` are over."""
    until_s = time.monotonic() + REST_WITHIN_S
    while any(gauges.at_rest().values()) and time.monotonic() < until_s:
        time.sleep(0.2)
    return gauges.at_rest()


def judge(samples: list[Sample], before: Sample, after: Sample, at_rest: dict[str, float],
          num_errors: int) -> list[str]:
    """What is wrong, in words; empty: nothing.

    samples: in the order of time. before and after: an idle server that had some traffic, and one that had all of it.
    """
    found = [f"{num_errors} requests got no answer or a wrong one"] if num_errors else []
    found += [f"{name} is {value:g} at the end" for name, value in at_rest.items() if value]
    for name in COUNTS:
        grown, allowed = after.counts[name] - before.counts[name], COUNT_GROWTH[name.rpartition("_")[2]]
        if grown > allowed:
            found.append(f"{name} grew from {before.counts[name]} to {after.counts[name]}")
    half = samples[len(samples) // 2:]
    for part in PARTS:
        grown_bytes = slope_bytes(half, part) * (half[-1].num_done - half[0].num_done)
        if grown_bytes > RSS_GROWTH_BYTES:
            found.append(f"{part} grew by {grown_bytes / 2**20:.0f} MiB over the last half")
    return found


def quantile_ms(values_s: list[float], q: float) -> float:
    return round(sorted(values_s)[max(0, math.ceil(q * len(values_s)) - 1)] * 1e3, 1)


def latency_table(latencies_s: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {name: {"num": len(found), "p50_ms": quantile_ms(found, 0.5), "p99_ms": quantile_ms(found, 0.99)}
            for name, found in sorted(latencies_s.items())}


def memory_table(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """MiB at the start, the middle and the end of the traffic; the slope of the last half per 1000 requests."""
    middle = len(samples) // 2
    table = {}
    for part in PARTS:
        rss = [round(samples[at].rss_bytes[part] / 2**20, 1) for at in (0, middle, -1)]
        slope = slope_bytes(samples[middle:], part) * 1000 / 2**10
        table[part] = {"start_mib": rss[0], "middle_mib": rss[1], "end_mib": rss[2],
                       "last_half_slope_kib_per_1000_requests": round(slope, 1)}
    return table


def run(num_requests: int, seed: int, concurrency: int, log: Path,
        progress: Callable[[int], object] = lambda _: None, within_s: float = math.inf) -> dict[str, Any]:
    """Start a server, soak it, report. within_s: after so long no new request is sent.

    `problems` in the result is what a caller should look at.
    """
    with ServerProcess(log, *FLAGS, key=ADMIN_KEY) as server:
        warm_up = Soak(server, min(num_requests, 64), seed + 10**6, concurrency)
        asyncio.run(warm_up.play())
        server.wait_idle()
        before = warm_up.gauges.sample(0)
        soak = Soak(server, num_requests, seed, concurrency, progress, within_s)
        began_s, began_cpu_s = time.perf_counter(), soak.gauges.cpu_s()
        asyncio.run(soak.play())
        seconds, cpu_s = time.perf_counter() - began_s, soak.gauges.cpu_s() - began_cpu_s
        at_rest, after = settle(soak.gauges), soak.gauges.sample(soak.num_done)
        tracebacks = server.log.count("Traceback")
    num_errors = soak.num_errors + warm_up.num_errors + tracebacks
    problems = judge(soak.samples, before, after, at_rest, num_errors)
    statuses = Counter[str]()
    for found in soak.statuses.values():
        statuses.update(found)
    return {
        "requests": soak.num_done, "seed": seed, "concurrency": concurrency, "seconds": round(seconds, 1),
        "requests_per_s": round(soak.num_done / seconds, 1), "server_cpu_s": round(cpu_s, 1),
        "statuses": dict(sorted(statuses.items())), "tracebacks_in_log": tracebacks,
        "by_kind": {name: dict(sorted(found.items())) for name, found in sorted(soak.statuses.items())},
        "latency": latency_table(soak.latencies_s), "memory": memory_table(soak.samples),
        "counts": {name: {"before": before.counts[name], "after": after.counts[name],
                          "peak": max(sample.counts[name] for sample in soak.samples)} for name in COUNTS},
        "at_rest": at_rest, "errors": [*warm_up.errors, *soak.errors], "problems": problems,
    }
