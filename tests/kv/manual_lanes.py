"""Lanes without threads: jobs run when a seeded dice says so, in any order between lanes, never by the clock."""

from __future__ import annotations

import heapq
import itertools
import random

from xllm.kv.lanes import LANES, Job, LaneStats


class ManualLanes:
    """A `Lanes`. eagerness: how likely a queued job runs at each `poll`; 1: at once."""

    def __init__(self, rng: random.Random, eagerness: float = 0.5):
        self.stats = {name: LaneStats() for name in LANES}
        self.closed = False
        self.foreground = False
        self.eagerness = eagerness
        self._rng = rng
        self._order = itertools.count()
        self._queues: dict[str, list[tuple[int, int, Job]]] = {name: [] for name in LANES}
        self._done: list[tuple[Job, BaseException | None]] = []

    @property
    def num_open(self) -> int:
        return sum(map(len, self._queues.values())) + len(self._done)

    def submit(self, job: Job) -> None:
        assert not self.closed
        self.stats[job.lane].queued += 1
        heapq.heappush(self._queues[job.lane], (job.priority, next(self._order), job))

    def run_one(self, lane: str) -> bool:
        """Run the first job of a lane; its `finish` comes with the next poll."""
        if not self._queues[lane]:
            return False
        _, _, job = heapq.heappop(self._queues[lane])
        error: BaseException | None = None
        try:
            job.run()
        except Exception as raised:
            error = raised
        self._done.append((job, error))
        return True

    def run_lane(self, lane: str) -> None:
        while self.run_one(lane):
            pass

    def poll(self) -> int:
        for lane in LANES:
            while self._rng.random() < self.eagerness and self.run_one(lane):
                pass
        return self._finish()

    def _finish(self) -> int:
        done, self._done = self._done, []
        for job, error in done:
            self.stats[job.lane].count(job.num_bytes, 1e-3, 1e-3)
            job.finish(error)
        return len(done)

    def wait(self, timeout_s: float) -> bool:
        """Somebody has nothing else to do: one job runs."""
        lanes = [lane for lane in LANES if self._queues[lane]]
        return bool(self._done) or (bool(lanes) and self.run_one(self._rng.choice(lanes)))

    def drain(self) -> None:
        """Run and finish everything, and what follows from it."""
        while self.num_open:
            for lane in LANES:
                self.run_lane(lane)
            self._finish()

    def close(self) -> None:
        self.closed = True
