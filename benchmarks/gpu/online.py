"""Requests that arrive as a Poisson process: how long each waits for its first token, and for each one after it."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.driver import Driver
from benchmarks.gpu.roofline import Workload
from xllm.request import OutputDelta

NAP_S = 1e-4


@dataclass
class Life:
    """Of one request, by the host's clock in seconds. gaps: between tokens."""

    arrival: float
    last: float | None = None
    first_wait: float | None = None
    gaps: list[float] = field(default_factory=list)
    finished: bool = False

    def note(self, now: float, delta: OutputDelta) -> None:
        if delta.token_ids and self.last is None:
            self.first_wait = now - self.arrival
        elif delta.token_ids:
            assert self.last is not None
            self.gaps.append((now - self.last) / len(delta.token_ids))
        self.last = now if delta.token_ids else self.last
        self.finished = self.finished or delta.finish_reason is not None


def arrivals(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Times of a Poisson process within a window; at least one."""
    rng, times = random.Random(seed), [0.0]
    while times[-1] < seconds:
        times.append(times[-1] + rng.expovariate(rate))
    return times[:-1]


def serve(bench: Bench, driver: Driver, id: str, work: Workload, rate: float) -> None:
    """`rate` requests a second for the profile's time; what is open then is aborted, and must still end."""
    lives = play(driver, work, arrivals(rate, bench.profile.online_s), bench.profile.online_s)
    unfinished = [request_id for request_id, life in lives.items() if not life.finished]
    for request_id in unfinished:
        driver.core.abort(request_id)
    ended = {delta.request_id for deltas in driver.run().values() for delta in deltas if delta.finish_reason}
    lost = [request_id for request_id in unfinished if request_id not in ended]
    bench.check(f"{id}/none lost", not lost, why=f"{len(lost)} requests have no terminal output")
    first = [life.first_wait for life in lives.values() if life.first_wait is not None]
    gaps = [gap for life in lives.values() for gap in life.gaps]
    tokens = len(first) + len(gaps)
    bench.row(id, cfg={"requests_per_s": rate, "seconds": bench.profile.online_s}, requests=len(lives),
              finished=len(lives) - len(unfinished), ttft_ms=_percentiles(first), itl_ms=_percentiles(gaps),
              tokens_per_s=tokens / bench.profile.online_s)  # fmt: skip


def play(driver: Driver, work: Workload, times: list[float], seconds: float) -> dict[str, Life]:
    """Add each request when its time has come and step in between, until the window ends."""
    lives, began, waiting = dict[str, Life](), time.perf_counter(), list(enumerate(times))
    while (now := time.perf_counter() - began) < seconds:
        while waiting and waiting[0][1] <= now:
            index, at = waiting.pop(0)
            index %= len(work.prompts)
            request_id = driver.add(work.prompts[index], work.outputs[index], temperature=0.6)
            lives[request_id] = Life(arrival=at)
        if not driver.core.has_work():
            time.sleep(NAP_S)
            continue
        deltas = driver.step()
        now = time.perf_counter() - began
        for delta in deltas:
            lives[delta.request_id].note(now, delta)
    return lives


def _percentiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] * 1e3 for p in (50, 90, 99)
            if ordered}  # fmt: skip
