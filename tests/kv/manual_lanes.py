"""Lanes without threads: moves run when a seeded dice says so, in any order between lanes, never by the clock."""

from __future__ import annotations

import heapq
import itertools
import random

import numpy as np

from xllm.kv.moves import LANES, LOAD, PUT, READ, STORE_LANES, WRITE, Move, MoveDone, OpenMoves, error_of
from xllm.kv.performer import MovePerformer


def check_plain(move: Move) -> None:
    """It can be encoded as it is: no numpy scalars, int32 throughout, and only what its lane needs."""
    assert all(type(value) is int for value in (move.number, move.priority, move.num_bytes, move.ticket))
    assert move.sources.dtype == move.targets.dtype == np.int32
    assert 0 < len(move.sources) == len(move.targets)
    assert all(type(name) is bytes and len(name) == 16 for name in (*move.digests, *move.parents))
    assert len(move.digests) == (len(move.sources) if move.lane in (READ, WRITE, *STORE_LANES) else 0)
    assert len(move.parents) == (len(move.sources) if move.lane in (WRITE, PUT) else 0)
    assert (move.ticket > 0) == (move.lane == LOAD)


class ManualLanes:
    """A `MoveLink`. eagerness: how likely a queued move runs at each poll; 1: at once."""

    def __init__(self, performer: MovePerformer, rng: random.Random, eagerness: float = 0.5):
        self.performer = performer
        self.closed = False
        self.foreground = False
        self.eagerness = eagerness
        self._rng = rng
        self._order = itertools.count()
        self._queues: dict[str, list[tuple[int, int, Move]]] = {name: [] for name in LANES}
        self._done: list[tuple[Move, MoveDone]] = []

    def send(self, move: Move) -> None:
        assert not self.closed
        check_plain(move)
        self.performer.begin(move)
        heapq.heappush(self._queues[move.lane], (move.priority, next(self._order), move))

    def queued(self, lane: str) -> list[Move]:
        """The moves that have not run, the next one first."""
        return [entry[2] for entry in sorted(self._queues[lane])]

    def not_received(self, lane: str) -> list[Move]:
        """The moves that have not run, and those whose end nobody has heard of."""
        return self.queued(lane) + [move for move, _ in self._done if move.lane == lane]

    def run_one(self, lane: str) -> bool:
        """Run the first move of a lane; its end is told with the next `receive`."""
        if not self._queues[lane]:
            return False
        _, _, move = heapq.heappop(self._queues[lane])
        num_done, error = 0, None
        try:
            num_done = self.performer.run(move)
        except Exception as raised:
            error = error_of(lane, raised)
        self._done.append((move, MoveDone(move.number, num_done, 1e-3, 1e-3, error)))
        return True

    def run_lane(self, lane: str) -> None:
        while self.run_one(lane):
            pass

    def receive(self, timeout_s: float) -> list[MoveDone]:
        """Without a timeout some moves run, as the dice say; with one somebody has nothing else to do: one runs."""
        if timeout_s > 0.0:
            lanes = [lane for lane in LANES if self._queues[lane]]
            if lanes and not self._done:
                self.run_one(self._rng.choice(lanes))
        else:
            for lane in LANES:
                while self._rng.random() < self.eagerness and self.run_one(lane):
                    pass
        done, self._done = self._done, []
        return [told for _, told in done]

    def set_foreground(self, steps_run: bool) -> None:
        self.foreground = steps_run

    def end_landing(self, number: int) -> None:
        raise AssertionError("there is no lane for landings here")

    def drain(self, moves: OpenMoves) -> None:
        """Run and finish everything, and what follows from it."""
        while len(moves):
            for lane in LANES:
                self.run_lane(lane)
            moves.poll()

    def close(self) -> None:
        self.closed = True
        self.performer.close()
