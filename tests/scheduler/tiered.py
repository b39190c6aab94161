"""Puts host memory and a real disk store below the simulated engine of `harness.py`."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from tests.kv.manual_lanes import ManualLanes
from tests.scheduler.harness import Simulation
from tests.scheduler.memory_runner import MemoryRunner
from xllm.kv.disk import DiskStore
from xllm.kv.eviction import make_policy
from xllm.kv.moves import LOAD
from xllm.kv.performer import MovePerformer
from xllm.kv.prefetch import Prefetcher
from xllm.kv.tickets import TicketBoard
from xllm.kv.tiers import TieredStore

FINGERPRINT = bytes(range(32))


class MemoryMover:
    """Copies blocks of a `MemoryRunner`. Its "layers" are the first and the second half of each block's slots."""

    num_layers = 2

    def __init__(self, runner: MemoryRunner, num_host_slots: int):
        self._runner = runner
        self.num_host_slots = num_host_slots
        self.host = np.zeros((num_host_slots, runner.block_size), dtype=np.uint64)
        self.payload_bytes = runner.block_size * 8

    def save(self, block_ids: np.ndarray, slots: np.ndarray) -> None:
        self.host[slots] = self._device()[block_ids]

    def load_layer(self, slots: np.ndarray, block_ids: np.ndarray, layer: int) -> None:
        half = self._runner.block_size // 2
        part = slice(0, half) if layer == 0 else slice(half, None)
        self._device()[block_ids, part] = self.host[slots, part]

    def payload(self, slot: int) -> memoryview:
        return memoryview(self.host[slot]).cast("B")

    def _device(self) -> np.ndarray:
        return self._runner.slots.reshape(-1, self._runner.block_size)


class TieredSimulation(Simulation):
    """A `Simulation` with tiers. A step that reads blocks still on their way waits, as the device would."""

    def __init__(self, rng: random.Random, *, num_host_slots: int, disk_folder: Path | None = None,
                 num_disk_slots: int = 64, eagerness: float = 0.5, policy: str = "lru", **settings):
        super().__init__(**settings)
        runner = self.loop.steps.runner
        self.mover = MemoryMover(runner, num_host_slots)
        self.disk_errors: list[str] = []
        store = None
        if disk_folder is not None:
            payload = self.mover.payload_bytes
            store = DiskStore(disk_folder, fingerprint=FINGERPRINT, payload_bytes=payload,
                              capacity_bytes=num_disk_slots * DISK_SLOT_BYTES,
                              segment_bytes=4 * DISK_SLOT_BYTES)
        self.board = TicketBoard()
        self.lanes = ManualLanes(MovePerformer(self.mover, store, self.board), rng, eagerness)
        facts = self.lanes.performer.facts()
        self.tiers = self.scheduler.kv.attach(lambda index, pool: TieredStore(
            index, pool, facts, self.lanes, lambda n: make_policy(policy, n), self.disk_errors.append))
        self.tiers.prefetcher = Prefetcher(self.tiers) if rng.random() < 0.5 else None
        runner.wait_for = self._wait_for

    def _wait_for(self, tickets: tuple[int, ...]) -> None:
        if self.board.tickets(tickets):
            self.lanes.run_lane(LOAD)
            assert not self.board.tickets(tickets)

    def check_idle(self) -> None:
        self.lanes.drain(self.tiers.moves)
        super().check_idle()
        self.tiers.check_integrity()

    def close(self) -> None:
        self.lanes.drain(self.tiers.moves)
        self.tiers.close(0.0)


DISK_SLOT_BYTES = 8192
