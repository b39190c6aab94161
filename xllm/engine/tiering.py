"""Builds the engine's side of the KV tiers below the device; the workers hold their bytes
(`worker/worker_tiers.py`).
"""

from __future__ import annotations

import functools
import logging
import time
from pathlib import Path

from xllm.config import EngineConfig
from xllm.kv.block_pool import BlockPool
from xllm.kv.eviction import make_policy
from xllm.kv.landing import Lander
from xllm.kv.moves import Move, MoveDone, OpenMoves, SharedFacts, TierFacts
from xllm.kv.outbox import Outbox
from xllm.kv.prefetch import Prefetcher
from xllm.kv.prefix_index import PrefixIndex
from xllm.kv.shared_follower import SharedFollower
from xllm.kv.shared_store import SharedStore
from xllm.kv.store_key import store_seal
from xllm.kv.store_tier import StoreTier
from xllm.kv.tier_index import TierIndex
from xllm.kv.tiers import TieredStore
from xllm.scheduler.scheduler import Scheduler
from xllm.worker.link import WorkerLink
from xllm.worker.messages import EndLanding, Foreground

_log = logging.getLogger(__name__)


class WorkerMoves:
    """A `MoveLink` to the workers: every rank performs a move on its own memory, and the move is done when all ranks
    have done it."""

    def __init__(self, link: WorkerLink):
        self._link = link

    def send(self, move: Move) -> None:
        """Send a move to every rank. A step that is submitted later may name the move's ticket."""
        self._link.send(move)

    def receive(self, timeout_s: float) -> list[MoveDone]:
        """The results that have come since the last call; if there are none, waits up to `timeout_s` for one."""
        done, until_s = self._link.take(MoveDone), time.monotonic() + timeout_s
        while not done and (left_s := until_s - time.monotonic()) > 0.0 and self._link.wait(left_s):
            done = self._link.take(MoveDone)
        return done

    def set_foreground(self, steps_run: bool) -> None:
        """Say whether steps are running: moves that no request waits for are then slowed down."""
        self._link.send(Foreground(steps_run))

    def end_landing(self, number: int) -> None:
        """See `MoveLink.end_landing`."""
        self._link.send(EndLanding(number))

    def close(self) -> None:
        """Nothing to do: the workers end their moves when they are shut down (`WorkerLink.close`)."""


def attach_tiers(scheduler: Scheduler, link: WorkerLink, config: EngineConfig, facts: TierFacts) -> None:
    """Put host memory, and disk and a shared store where there are such, below the scheduler's KV manager. Raises
    ConfigError or DiskError if the store cannot be read."""
    cache = config.cache
    make_store = None if facts.shared is None else functools.partial(_follow, facts, facts.shared, config)

    def make(index: PrefixIndex, pool: BlockPool) -> TieredStore:
        store = TieredStore(
            index, pool, facts, WorkerMoves(link),
            lambda n: make_policy(cache.eviction_policy, n, lru_k=cache.lru_k, history=cache.eviction_history),
            _disk_lost, scheduler.cost, make_store)
        if facts.windows:
            scheduler.promotions.lander = Lander(store, facts.windows)
            scheduler.departures.outbox = Outbox(pool, store.moves)
        return store

    tiers = scheduler.kv.attach(make)
    if cache.kv_prefetch:
        tiers.prefetcher = Prefetcher(tiers)
    _log.info("KV tiers: %d blocks on the device, %d in host memory, %d on disk, %d of them found there%s",
              scheduler.kv.num_blocks, facts.num_host_slots, facts.num_disk_slots, len(tiers.disk) if tiers.disk else 0,
              "" if tiers.store is None else f", {len(tiers.store)} in the shared store")


def _follow(facts: TierFacts, shared: SharedFacts, config: EngineConfig, host: TierIndex,
            moves: OpenMoves) -> StoreTier:
    store = SharedStore(Path(shared.folder), fingerprint=shared.fingerprint, payload_bytes=facts.payload_bytes,
                        seal=store_seal(config.cache, 0, config.device.num_ranks))
    return StoreTier(SharedFollower(store), host, moves, _log.warning, shared.num_blocks)


def _disk_lost(message: str) -> None:
    _log.error("the disk tier of the KV cache failed and is switched off; serving goes on without it: %s", message)
