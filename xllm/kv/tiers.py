"""`TieredStore`: the KV cache below the device: host memory (L3), local disk (L4) and a shared store (L5).

Down: when a row leaves, its full blocks are copied to host memory in the background, root first, and from there to
disk; so the device evicts without waiting, each tier is closed under prefixes, and disk holds what a restart needs.
What reaches host memory is offered to the shared store too, with a disk or without (`store_tier.py`).
Up: a prompt whose prefix continues in host memory gets those blocks loaded to the device; blocks on disk or in the
shared store are staged into host memory first. A block that is copied up stays in the tier below, so most evictions
need no copy at all.

This module keeps the books; the worker holds the bytes and performs the moves (`moves.py`). Everything belongs to the
thread that owns the KV manager.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from xllm.cost.online import OnlineCost
from xllm.errors import DeviceError
from xllm.kv import failpoints
from xllm.kv.block import DIGEST_BYTES
from xllm.kv.block_pool import BlockPool
from xllm.kv.demotion import NORMAL, Demoter, Path
from xllm.kv.eviction import EvictionPolicy
from xllm.kv.finder import Finder
from xllm.kv.kv_source import Extension
from xllm.kv.lift import Lift, Lifter
from xllm.kv.lower_tiers import LowerTiers
from xllm.kv.moves import URGENT, MoveError, MoveLink, OpenMoves, TierFacts
from xllm.kv.origins import DeviceOrigin, HostOrigin
from xllm.kv.passage import Passage
from xllm.kv.prefetch import Prefetcher
from xllm.kv.prefix_index import NO_BLOCK, PrefixIndex, PrefixMatch
from xllm.kv.promotion import Loader, Stage, Stager
from xllm.kv.store_tier import StoreTier
from xllm.kv.tier_index import NO_SLOT, TierIndex
from xllm.stats import LaneStats, SourceStats, TierStats

# Of the host slots: while more are held and disk is being written, no further path begins to be saved.
MAX_WRITING_SHARE = 0.5  # chosen: half of host memory stays evictable
# Of the device's blocks: if more wait to be saved, paths are saved over what disk has not taken yet.
MAX_WAITING_SHARE = 0.5  # chosen: running requests have the other half
# How long a swap's blocks are kept for their copy to begin. Chosen: the swap was begun because copying is sooner than
# computing anew; after this long it is not, and the lane in front of it is stuck.
SWAP_LEASE_S = 10.0
PREFETCH = 2**40  # priority: behind the moves of every request (`kv_waits.py:_priority`, of `request.py:MAX_PRIORITY`)
# From the end of a turn's path, by which its earlier turn is found.
RECOGNISED_BLOCKS = 256  # chosen: more find longer turns, and cost each admission more look-ups
BUSY_POLL_S = 0.01  # between polls of an idle engine while moves are open. Chosen: a move's end is noticed that late


class TieredStore:
    """A `KVSource`: host memory and disk below one device pool."""

    has_tiers = True

    def __init__(self, index: PrefixIndex, pool: BlockPool, facts: TierFacts, link: MoveLink,
                 make_policy: Callable[[int], EvictionPolicy],
                 on_disk_error: Callable[[str], None] = lambda message: None, cost: OnlineCost | None = None,
                 make_store: Callable[[TierIndex, OpenMoves], StoreTier] | None = None):
        """link: the way to the worker that performs the moves. make_policy: makes an eviction policy for so many slots.
        on_disk_error: called once, with the reason, when the disk tier is given up. cost: None: one of its own.
        make_store: makes the shared store's tier; None: there is none."""
        self._index, self._pool, self._on_disk_error = index, pool, on_disk_error
        self.find_on_device = index.find
        self.moves = moves = OpenMoves(link, facts.payload_bytes, cost or OnlineCost(), facts.lanes)
        self.num_device_blocks = pool.num_blocks
        self.prefetcher: Prefetcher | None = None
        self._polled_s = 0.0  # by the owner's clock
        num_slots = facts.num_host_slots
        self.slot_of_block = np.full(pool.num_blocks, NO_SLOT, dtype=np.int32)
        self.disk_of_slot = np.full(num_slots, NO_SLOT, dtype=np.int32)
        self.host = TierIndex(num_slots, make_policy(num_slots), self._host_removed)
        self.loader = Loader(index, pool, self.host, moves)
        device = DeviceOrigin(index, pool, self.slot_of_block, self.loader.ticket_of, self._saved)
        self.saver = Demoter(device, self.host, moves, self._save_failed, self._shall_wait)
        self.disk: TierIndex | None = None
        self.store = None if make_store is None else make_store(self.host, moves)
        self.flushing = False
        moves.on_ended = self._go_on
        if facts.num_disk_slots:
            self.disk = TierIndex(facts.num_disk_slots, make_policy(facts.num_disk_slots), self._disk_removed)
            self.writer = Demoter(HostOrigin(self.host, self.disk_of_slot), self.disk, moves, self._disk_failed)
            self.passage = Passage(device, self.host, self.disk, moves, self._disk_failed,
                                   lambda: not self.writer.is_idle)
            # What an earlier process left there can be found again, where all ancestors are there too.
            self.disk.adopt(facts.stored.slots.tolist(), _digests(facts.stored.digests), _digests(facts.stored.parents))
        self.lower = LowerTiers(self.host, self.disk, self.store, moves)
        self.lifter = Lifter(index, pool, self.host, self.lower, self.loader, moves, self.slot_of_block)
        self.stager = Stager(self.host, self.lower, self._staged)
        self.finder = Finder(index, self.host, self.disk, self.store)

    @property
    def indexes(self) -> Sequence[TierIndex]:
        """Which blocks each tier has."""
        return [self.host] if self.disk is None else [self.host, self.disk]

    # --- what the KV manager reports

    def committed(self, block_ids: Sequence[int], digests: Sequence[bytes]) -> None:
        find = self.host.find
        self.slot_of_block[block_ids] = [find(digest) for digest in digests] if len(self.host) else NO_SLOT

    def released(self, path: np.ndarray, *, swap: bool) -> None:
        """Queue the blocks that host memory or disk lacks to be copied there. The blocks of a swap are copied first and
        leased until they are, at most `SWAP_LEASE_S`: what has been evicted then is computed anew."""
        if not len(path):
            return
        slots = self.slot_of_block[path]
        missing = slots == NO_SLOT
        num_known = int(missing.argmax()) if missing.any() else len(path)
        known = slots[:num_known]
        self.host.use(known)
        if num_known < len(path):
            digests = [self._index.digest_of(block) for block in path.tolist()]
            lease = self._pool.lease(path, self._polled_s + SWAP_LEASE_S) if swap else None
            self.saver.add(Path(path, digests, URGENT if swap else NORMAL, lease))
        else:
            self.write_down(known)

    def turn_began(self, session_id: str | None, path: np.ndarray, clock: Callable[[], float]) -> None:
        if self.prefetcher is not None:
            self.prefetcher.turn_began(session_id, self._last_digests(path), clock())

    def turn_ended(self, session_id: str | None, path: np.ndarray, clock: Callable[[], float]) -> None:
        if self.prefetcher is not None:
            digests = self._last_digests(path)
            self.prefetcher.turn_ended(session_id, digests[-1], digests, clock())

    def _last_digests(self, path: np.ndarray) -> list[bytes]:
        """The digests of a path's last blocks: a turn adds few, so the end of the turn before is among them."""
        return [self._index.digest_of(block) for block in path[-RECOGNISED_BLOCKS:].tolist()]

    def _saved(self, path: Path) -> bool:
        """Called when no more of a path is saved to host memory: queue the saved part for disk, and pass a rest that
        found no room to `passage`; returns whether it did that."""
        if path.done:
            self.write_down(path.slots[: path.done])
        if path.done == len(path.items) or self.disk is None or self.writer.disabled:
            return False
        if self._index.find(path.digests[path.done]) != path.items[path.done]:
            return False  # the device has given it up
        self.passage.add(path, path.done)
        return True

    def write_down(self, slots: np.ndarray) -> None:
        """Queue a path of host slots to be written to disk and to the shared store, as far as they lack it; under
        pressure it is dropped instead."""
        if self.store is not None:
            self.store.offer(slots)
        if self.disk is None:
            return
        on_disk = self.disk_of_slot[slots]
        missing = on_disk == NO_SLOT
        self.disk.use(on_disk[: int(missing.argmax())] if missing.any() else on_disk)
        if not missing.any() or self.writer.disabled:
            return
        if self._is_writing_much(len(slots)) and self._is_pressed:
            self.writer.num_cut += int(missing.sum())
            return
        self.host.hold(slots)
        self.writer.add(Path(slots, [self.host.digest_of(slot) for slot in slots.tolist()], NORMAL))

    def _shall_wait(self, path: Path, begun: bool) -> bool:
        """Whether a path to be saved waits until more of host memory is on disk, rather than evict what is not."""
        if self.disk is None or self.writer.is_idle or self._is_pressed:
            return False
        return begun or (path.priority > URGENT and self._is_writing_much(len(path.items)))

    def _go_on(self) -> None:
        """Continue everything that waited for slots: moves have ended, and some may be free."""
        self.saver.pump()
        if self.disk is not None:
            self.passage.pump()
        self.lifter.pump()

    def _is_writing_much(self, num_more: int) -> bool:
        return not self.writer.is_idle and self.host.num_held + num_more > MAX_WRITING_SHARE * self.host.num_slots

    @property
    def _is_pressed(self) -> bool:
        """Whether so many blocks wait to be saved that the device may evict some before their copy."""
        return not self.flushing and self.saver.num_queued_blocks > MAX_WAITING_SHARE * self._pool.num_usable

    # --- finding and bringing up

    @property
    def can_stage(self) -> bool:
        return self.finder.can_stage

    def extend(self, match: PrefixMatch, token_ids: np.ndarray) -> Extension:
        return self.finder.extend(match, token_ids)

    def stage(self, extension: Extension, priority: int) -> Stage:
        digests = self.lower.digests(extension.host_path, extension.disk_path, extension.stored)
        return self.stager.find(digests[-1]) or self.stager.stage(digests, extension.disk_path, extension.host_path,
                                                                  priority)

    def lift(self, resident: np.ndarray, extension: Extension, priority: int) -> Lift:
        digests = self.lower.digests(extension.host_path, extension.disk_path, extension.stored)
        return self.lifter.lift(resident, digests, extension.disk_path, priority)

    def load(self, resident: np.ndarray, extension: Extension, priority: int) -> np.ndarray:
        path = self.loader.load(resident, extension.host_path, priority)
        self.slot_of_block[path] = extension.host_path
        return path

    def fetch(self, tail: bytes, max_blocks: int) -> tuple[int, bool]:
        """For the prefetcher: see `prefetch.Fetcher.fetch`. Takes only blocks that nothing holds."""
        if self._index.find(tail) != NO_BLOCK or not self.finder.has(tail):
            return 0, False
        paths = self.finder.paths(tail)
        if len(paths.disk_path):
            stage = self.stage(paths, PREFETCH)
            return 0, not stage.is_done
        digests = [self.host.digest_of(slot) for slot in paths.host_path.tolist()]
        resident = bisect.bisect_left(digests, True, key=lambda digest: self._index.find(digest) == NO_BLOCK)
        num_blocks = len(digests) - resident
        if num_blocks > min(max_blocks, self._pool.num_available):
            return 0, False
        on_device = np.array([self._index.find(digest) for digest in digests[:resident]], dtype=np.int32)
        if num_blocks > self._pool.num_available - self._pool.num_idle(on_device):
            return 0, False
        self.load(on_device, paths, PREFETCH)
        return num_blocks, False

    @property
    def num_loading(self) -> int:
        return self.loader.num_open + len(self.lifter.open_lifts)

    def open_tickets(self, block_ids: np.ndarray) -> tuple[int, ...]:
        return self.loader.open_tickets(block_ids) if self.loader.num_open else ()

    def is_open(self, ticket: int) -> bool:
        return self.loader.is_open(ticket)

    def move_s(self, lane: str, num_blocks: int) -> float:
        return self.moves.seconds(lane, num_blocks)

    # --- turns of the owner

    def poll(self, now_s: float) -> int:
        self._polled_s = now_s
        done = self.moves.poll()
        if self.store is not None:
            self.store.poll(now_s)
        if self.prefetcher is not None:
            self.prefetcher.step(now_s)
        return done

    def wait(self, timeout_s: float) -> bool:
        if not len(self.moves):
            return False
        self.moves.wait(timeout_s)
        return True

    def set_foreground(self, steps_run: bool) -> None:
        self.moves.foreground = steps_run

    def clear(self) -> None:
        self.host.clear()

    def idle_s(self, now_s: float) -> float | None:
        if len(self.moves):
            return BUSY_POLL_S
        return None if self.prefetcher is None else self.prefetcher.next_s(now_s)

    def flush(self, deadline_s: float, clock: Callable[[], float] = time.monotonic) -> bool:
        """Copy every findable block of the device down, while time and room last; returns whether all moves ended."""
        self.flushing = True
        for path in self._device_paths():
            if failpoints.armed is not None:
                failpoints.hit("tier.flush")
            self.saver.add(path)
            while self.saver.num_queued > 8 and clock() < deadline_s:
                self._wait_and_poll(deadline_s, clock)
        while len(self.moves) and clock() < deadline_s:
            self._wait_and_poll(deadline_s, clock)
        return len(self.moves) == 0

    def begin_flush(self) -> None:
        """Queue every findable block of the device to be copied down, until the queue is full."""
        for path in self._device_paths():
            if not self.saver.add(path):
                return

    def _device_paths(self) -> Iterator[Path]:
        for leaf in self._index.leaves().tolist():
            blocks = self._index.path_to(leaf)
            yield Path(blocks, [self._index.digest_of(block) for block in blocks.tolist()], NORMAL)

    def _wait_and_poll(self, deadline_s: float, clock: Callable[[], float]) -> None:
        self.moves.wait(min(0.1, max(0.0, deadline_s - clock())))
        self.moves.poll()

    def close(self, flush_s: float) -> None:
        """See `KVSource.close`. Without disk and store nothing is flushed: host memory ends with the process."""
        self.moves.foreground = False
        writes = (self.disk is not None and not self.writer.disabled) or (self.store is not None and self.store.is_up)
        if writes and flush_s:
            self.flush(time.monotonic() + flush_s)
        if self.store is not None:
            self.store.close()
        self.moves.close()

    # --- links between the tiers

    def _host_removed(self, slots: np.ndarray) -> None:
        self.disk_of_slot[slots] = NO_SLOT
        for slot in slots.tolist():
            block = self._index.find(self.host.digest_of(slot))
            if block != NO_BLOCK:
                self.slot_of_block[block] = NO_SLOT

    def _disk_removed(self, slots: np.ndarray) -> None:
        assert self.disk is not None
        for slot in slots.tolist():
            on_host = self.host.find(self.disk.digest_of(slot))
            if on_host != NO_SLOT:
                self.disk_of_slot[on_host] = NO_SLOT

    def _staged(self, host_slots: np.ndarray, disk_slots: np.ndarray) -> None:
        assert self.disk is not None
        for slot, disk_slot in zip(host_slots.tolist(), disk_slots.tolist()):
            if self.disk.find(self.host.digest_of(slot)) == disk_slot:  # not if another stage found its path broken
                self.disk_of_slot[slot] = disk_slot

    def _save_failed(self, error: MoveError) -> None:
        """Raise DeviceError: host memory does not fail, so this is a bug or the device is lost."""
        raise DeviceError(f"KV could not be saved to host memory: {error.message}")

    def _disk_failed(self, error: MoveError) -> None:
        if error.kind != "disk":
            raise DeviceError(f"KV could not be written to disk: {error.message}")
        if not self.writer.disabled:
            self.writer.disable()
            self.passage.disable()
            self._on_disk_error(error.message)

    # --- audit

    def stats(self, missed_total: dict[str, dict[str, int]]) -> SourceStats:
        pool, disk, store = self._pool, self.disk, self.store
        unsaved = self.saver.num_cut + (self.passage.num_cut if disk else 0)
        device = TierStats(num_blocks=pool.num_usable, num_used=pool.num_usable - pool.num_free,
                           num_held=pool.num_held, unsaved_total=unsaved, evicted_total=pool.num_evicted)
        tiers = {"device": device, "host": _tier_stats(self.host, self.writer.num_cut if disk else 0, {})}
        if disk is not None:
            tiers["disk"] = _tier_stats(disk, 0, missed_total.get("disk", {}))
        if store is not None:
            tiers["store"] = TierStats(num_blocks=store.num_own_blocks, num_used=len(store),
                                       unsaved_total=store.num_cut, missed_total=missed_total.get("store", {}))
        lanes = {name: LaneStats(queued=lane.queued, jobs_total=lane.num_moves, bytes_total=lane.num_bytes,
                                 busy_s_total=lane.busy_s, wait_s_total=lane.wait_s)
                 for name, lane in self.moves.stats.items()}
        prefetcher = self.prefetcher
        prefetched = {} if prefetcher is None else {"right": prefetcher.num_right, "wrong": prefetcher.num_wrong}
        return SourceStats(kv_tiers=tiers, kv_lanes=lanes, prefetched_blocks_total=prefetched,
                           kv_disk_up=disk is not None and not self.writer.disabled,
                           kv_store_up=store is not None and store.is_up)

    def held_paths(self) -> list[np.ndarray]:
        return [load.path for load in self.loader.open_loads] + [lift.path for lift in self.lifter.open_lifts]

    def check_integrity(self) -> None:
        """Raise IntegrityError if a tier is inconsistent or a link leads to other contents."""
        self.host.check_integrity()
        for block in np.flatnonzero(self.slot_of_block != NO_SLOT).tolist():
            if self._index.is_cached(block):
                slot = int(self.slot_of_block[block])
                assert self.host.digest_of(slot) == self._index.digest_of(block), f"block {block} is not in slot {slot}"
        if self.disk is not None:
            self.disk.check_integrity()
            for slot in np.flatnonzero(self.disk_of_slot != NO_SLOT).tolist():
                assert self.host.digest_of(slot) == self.disk.digest_of(int(self.disk_of_slot[slot]))


def _tier_stats(index: TierIndex, unsaved: int, missed: dict[str, int]) -> TierStats:
    return TierStats(num_blocks=index.num_slots, num_used=len(index), num_held=index.num_held,
                     evicted_total=index.num_evicted, unsaved_total=unsaved, missed_total=missed)


def _digests(packed: np.ndarray) -> list[bytes]:
    """uint8 [N, 16] as N byte strings."""
    data = packed.tobytes()
    return [data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES)]
