"""Instances that come and go under steady load: no request may notice, and who is new has its share of them soon."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

import httpx

from tests.cluster.chaos.cluster import ChaosCluster, Instance, until
from tests.cluster.chaos.faults import Faults
from tests.cluster.chaos.run import MAX_SHOWN, counts, judged, left_over
from tests.cluster.chaos.traffic import Ended, Traffic, references

FEW, MANY = 2, 4
SHARE_S = 10.0  # after it has joined, a new instance has its share of new requests
LEAST_SHARE = 0.5  # of a fair one
SETTLE_S = 10.0  # that each size is looked at
SEES_S = 120.0
LOOK_S = 0.25  # between looks at the last decisions, of which a master keeps a hundred


@dataclass
class Placed:
    """Where a master sent calls that were new. sent: (Unix time, instance). joined: Unix times, by instance."""

    cluster: ChaosCluster
    sent: list[tuple[float, str]] = field(default_factory=list)
    joined: dict[str, float] = field(default_factory=dict)
    _seen: set[tuple[str, str]] = field(default_factory=set)

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(httpx.HTTPError):
                self._note((await self.cluster.masters[0].get().get("/cluster", timeout=10)).json())
            await asyncio.sleep(LOOK_S)

    def _note(self, shown: dict[str, Any]) -> None:
        for one in shown["decisions"]:
            if not one["instances_lost"] and (key := (one["time"], one["request_id"])) not in self._seen:
                self._seen.add(key)
                self.sent.append((_unix_s(one["time"]), one["instance"]))
        for event in shown["events"]:
            if event["event"] == "joined":
                self.joined.setdefault(event["instance"], _unix_s(event["time"]))

    def share(self, name: str, begin_s: float, end_s: float) -> dict[str, Any]:
        """Of an instance, from begin_s to end_s behind its joining."""
        joined_s = self.joined[name]
        found = Counter(place for sent_s, place in self.sent if begin_s <= sent_s - joined_s < end_s)
        return {"requests": found[name], "of": found.total(), "share": round(found[name] / max(1, found.total()), 3)}


def _unix_s(shown: str) -> float:
    return datetime.fromisoformat(shown).timestamp()


@contextlib.asynccontextmanager
async def _phase(name: str, traffic: Traffic, phases: dict[str, Any]) -> AsyncIterator[None]:
    """Note what clients saw meanwhile."""
    begun_s = time.monotonic()
    yield
    seconds = time.monotonic() - begun_s
    ended = [one for one in traffic.ended if one.ended_s > begun_s]
    phases[name] = {"seconds": round(seconds, 1), "requests": len(ended),
                    "requests_per_s": round(len(ended) / seconds, 2), **_latencies(ended)}


def _latencies(ended: list[Ended]) -> dict[str, float]:
    took_s = sorted(one.ended_s - one.begun_s for one in ended) or [0.0]
    return {"median_s": round(took_s[len(took_s) // 2], 2), "max_s": round(took_s[-1], 2),
            "longest_silence_s": round(max((one.answer.longest_gap_s for one in ended), default=0.0), 2)}


async def _all_used(cluster: ChaosCluster) -> bool:
    return await cluster.states(cluster.masters[0]) == ["active"] * len(cluster.instances)


async def _grow(cluster: ChaosCluster) -> list[Instance]:
    """To as many as there are at most; those that are new."""
    new = [Instance(cluster, name) for name in "abcdefgh"[len(cluster.instances):MANY]]
    cluster.instances += new
    await asyncio.gather(*(one.start() for one in new))
    await until(lambda: _all_used(cluster), SEES_S, "that the new instances are used")
    return new


async def _shrink(cluster: ChaosCluster, gone: list[Instance]) -> list[int]:
    """End these; their exit codes."""
    codes = await asyncio.gather(*(one.process.stop(signal.SIGTERM) for one in gone))
    cluster.instances = [one for one in cluster.instances if one not in gone]
    await until(lambda: _all_used(cluster), SEES_S, "that those that have ended are forgotten")
    return list(codes)


async def elastic(folder: Path, seed: int, clients: int = 10) -> dict[str, Any]:
    """The report; `problems` in it is what a caller should look at."""
    cluster = ChaosCluster(folder, secrets.token_hex(32), num_instances=FEW)
    try:
        await cluster.open(num_masters=1)
        expected = await references(cluster.instances[0].process.get())
        traffic, placed, is_over = Traffic(cluster, expected, seed), Placed(cluster), asyncio.Event()
        following, phases = asyncio.create_task(placed.follow()), dict[str, Any]()
        playing = asyncio.create_task(traffic.play(clients, is_over))
        await asyncio.sleep(SETTLE_S / 2)
        before = await counts(cluster)
        async with _phase(f"{FEW} instances", traffic, phases):
            await asyncio.sleep(SETTLE_S)
        async with _phase(f"{FEW} to {MANY}", traffic, phases):
            new = await _grow(cluster)
        async with _phase(f"{MANY} instances", traffic, phases):
            await asyncio.sleep(SHARE_S + SETTLE_S)
        shares = {one.name: {"first": placed.share(one.name, 0.0, SHARE_S),
                             "then": placed.share(one.name, SHARE_S, SHARE_S + SETTLE_S)} for one in new}
        async with _phase(f"{MANY} to {FEW}", traffic, phases):
            codes = await _shrink(cluster, new)
        async with _phase(f"{FEW} again", traffic, phases):
            await asyncio.sleep(SETTLE_S)
        is_over.set()
        await playing
        following.cancel()
        problems = judged(traffic, Faults(cluster, Random(seed)))
        problems += [f"{name} had {share['first']} of new requests in its first {SHARE_S:g} s"
                     for name, share in shares.items() if share["first"]["share"] < LEAST_SHARE / MANY]
        problems += [f"{one.name} ended with {code}" for one, code in zip(new, codes, strict=True) if code]
        problems += await left_over(cluster, before)
        totals = (await cluster.masters[0].get().get("/cluster")).json()["totals"]
        outcomes = Counter(one.outcome for one in traffic.ended)
        return {
            "seed": seed, "clients": clients, "requests": len(traffic.ended),
            "outcomes": dict(sorted(outcomes.items())),
            "failed": sum(number for what, number in outcomes.items() if what not in ("right", "left")),
            "fair_share": 1 / MANY, "shares": shares, "phases": phases, "recovered": totals["recovered"],
            "retried": totals["retried"], "given_up": totals["given_up"], "num_problems": len(problems),
            "problems": [problem[:3000] for problem in problems[:MAX_SHOWN]],
        }
    finally:
        await cluster.close()
