"""`Traffic`: requests to a cluster from many clients at once, each judged by what one engine alone says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import httpx

from tests.cluster.chaos.cluster import ChaosCluster
from tests.cluster.chaos.requests import Answer, Asked, all_requests, ask, difference, drawn, salted

BOUND_S = 90.0  # of a request: an instance that is waited for (30 s), and the longest fault, on a busy machine
SALTED = 0.7  # of the requests, where KV is to travel: what everybody has cached does not


@dataclass
class Ended:
    """One request. master: by its place."""

    index: int
    name: str
    master: int
    begun_s: float
    ended_s: float
    answer: Answer
    outcome: str  # "right", "left", "unavailable", "broken", "lost", "wrong", "hung"
    why: str = ""


class Traffic:
    """Requests from so many clients at once, each judged as it ends. expected: by name."""

    def __init__(self, cluster: ChaosCluster, expected: dict[str, Answer], seed: int):
        self.cluster, self.expected, self.seed = cluster, expected, seed
        self.ended: list[Ended] = []
        self._num = 0

    async def play(self, clients: int, is_over: asyncio.Event) -> None:
        await asyncio.gather(*(self._client(is_over) for _ in range(clients)))

    async def _client(self, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            index, self._num = self._num, self._num + 1
            rng = Random(f"{self.seed} {index}")
            asked = drawn(rng)
            master, leave_after = rng.randrange(len(self.cluster.masters)), None
            if rng.random() < 0.08:
                leave_after = rng.randrange(2, 30)
            if self.cluster.has_roles and rng.random() < SALTED:
                asked = salted(asked, f"{self.seed} {index}")
            one = await self.one(index, master, asked, leave_after)
            if one.outcome in ("unavailable", "broken"):
                await asyncio.sleep(0.5)

    async def one(self, index: int, master: int, asked: Asked, leave_after: int | None = None) -> Ended:
        begun_s, found, outcome, why = time.monotonic(), Answer(), "", ""
        try:
            found = await asyncio.wait_for(ask(self.cluster.masters[master].get(), asked, leave_after), BOUND_S)
        except asyncio.TimeoutError:
            outcome, why = "hung", f"no end within {BOUND_S:g} s"
        except httpx.HTTPError as error:
            outcome, why = "broken", f"{type(error).__name__}: {error}"
        else:
            outcome, why = self._judged(asked, found, leave_after)
        one = Ended(index, asked.name, master, begun_s, time.monotonic(), found, outcome, why)
        self.ended.append(one)
        return one

    def _judged(self, asked: Asked, found: Answer, leave_after: int | None) -> tuple[str, str]:
        if found.error is not None:
            if found.status == 503 and found.retry_after is not None:
                return "unavailable", found.error
            return "lost", f"{found.status}: {found.error}"
        has_left = leave_after is not None and not found.num_done
        wrong = difference(found, self.expected[asked.name], is_whole=not has_left)
        if wrong is not None:
            return "wrong", wrong
        return ("left", "") if has_left else ("right", "")


async def references(http: httpx.AsyncClient, more: Iterable[Asked] = ()) -> dict[str, Answer]:
    """What one engine says to every request, and to more, one at a time."""
    found = {}
    for asked in (*all_requests(), *more):
        found[asked.name] = await ask(http, asked)
        assert found[asked.name].error is None, found[asked.name]
    return found
