"""`TieredStore`: the KV cache below the device: host memory (L3) and local disk (L4).

Down: when a row leaves, its full blocks are copied to host memory in the background, root first, and from there to
disk; so the device evicts without waiting, each tier is closed under prefixes, and disk holds what a restart needs.
Up: a prompt whose prefix goes on in host memory gets those blocks loaded to the device, one on disk is staged into
host memory first. Copies stay below when blocks go up: host memory includes what it gave to the device, disk what it
gave to host memory, and so most evictions need no copy at all.

Here are the facts about what lies where; the bytes lie with whoever performs the moves (`moves.py`). Everything belongs
to the thread that owns the KV manager.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xllm.errors import DeviceError
from xllm.kv import failpoints
from xllm.kv.block import DIGEST_BYTES, token_bytes
from xllm.kv.block_pool import BlockPool
from xllm.kv.demotion import NORMAL, Demoter, Path
from xllm.kv.eviction import EvictionPolicy
from xllm.kv.moves import LOAD, SAVE, URGENT, WRITE, MoveError, MoveLink, OpenMoves, StoredBlocks, TierFacts
from xllm.kv.prefetch import Prefetcher
from xllm.kv.prefix_index import NO_BLOCK, STRIDE_BLOCKS, PrefixIndex, PrefixMatch
from xllm.kv.promotion import Loader, Stage, Stager
from xllm.kv.tier_index import NO_SLOT, TierIndex

MAX_WRITING_SHARE = 0.5  # of the host slots may be held for writing to disk
ASSUMED_BYTES_PER_S = 1e9  # of a lane that has not moved anything yet
PREFETCH = 2**40  # priority: behind everything that somebody waits for
FOREVER_S = float("inf")
BUSY_POLL_S = 0.01  # between polls of an idle engine while moves are open
_NO_SLOTS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Extension:
    """Where a prompt's prefix goes on below the device: slots of its whole path, root first, int32. Empty: nowhere.

    host_path: as far as host memory has it. disk_path: as far as disk has it, if that is farther.
    """

    host_path: np.ndarray
    disk_path: np.ndarray

    def on_host(self, num_resident: int) -> int:
        """How many blocks host memory has beyond those resident on the device."""
        return max(0, len(self.host_path) - num_resident)


NO_EXTENSION = Extension(_NO_SLOTS, _NO_SLOTS)


class TieredStore:
    """Host memory and disk below one device pool."""

    def __init__(self, index: PrefixIndex, pool: BlockPool, facts: TierFacts, link: MoveLink,
                 make_policy: Callable[[int], EvictionPolicy],
                 on_disk_error: Callable[[str], None] = lambda message: None):
        """link: performs the moves. make_policy: an eviction policy for so many slots. on_disk_error: told once, with
        the reason, when disk is given up."""
        self._index, self._pool, self._payload_bytes = index, pool, facts.payload_bytes
        self._on_disk_error = on_disk_error
        self.moves = moves = OpenMoves(link, facts.payload_bytes)
        self.num_device_blocks = pool.num_blocks
        self.prefetcher: Prefetcher | None = None
        num_slots = facts.num_host_slots
        self.slot_of_block = np.full(pool.num_blocks, NO_SLOT, dtype=np.int32)
        self.disk_of_slot = np.full(num_slots, NO_SLOT, dtype=np.int32)
        self.host = TierIndex(num_slots, make_policy(num_slots), self._host_removed)
        self.loader = Loader(index, pool, self.host, moves)
        self.saver = Demoter(DeviceSource(self), self.host, moves, facts.payload_bytes, self._save_failed)
        self.disk: TierIndex | None = None
        if facts.num_disk_slots:
            self.disk = TierIndex(facts.num_disk_slots, make_policy(facts.num_disk_slots), self._disk_removed)
            self.writer = Demoter(HostSource(self), self.disk, moves, facts.payload_bytes, self._disk_failed)
            self.stager = Stager(self.host, self.disk, moves, self._staged)
            self._warm_start(facts.stored)

    # --- what the KV manager tells

    def committed(self, block_ids: Sequence[int], digests: Sequence[bytes]) -> None:
        """These device blocks hold these contents from now on."""
        find = self.host.find
        self.slot_of_block[block_ids] = [find(digest) for digest in digests] if len(self.host) else NO_SLOT

    def released(self, path: np.ndarray, *, swap: bool = False) -> None:
        """A row is about to give back its findable blocks, root first. Copies down what is not there yet.

        swap: the row will be back soon: its blocks are protected until they are copied, and go first.
        """
        if not len(path):
            return
        slots = self.slot_of_block[path]
        missing = slots == NO_SLOT
        num_known = int(missing.argmax()) if missing.any() else len(path)
        known = slots[:num_known]
        self.host.use(known)
        if num_known < len(path):
            digests = [self._index.digest_of(block) for block in path.tolist()]
            job = SwapPath(path, digests, URGENT) if swap else Path(path, digests, NORMAL)
            if swap:
                self._pool.lease(path, FOREVER_S)
            self.saver.add(job)
        elif self.disk is not None:
            self.write_down(known)

    def write_down(self, slots: np.ndarray) -> None:
        """Copy a path of host slots to disk, as far as it is not there and the queue allows."""
        assert self.disk is not None
        on_disk = self.disk_of_slot[slots]
        missing = on_disk == NO_SLOT
        self.disk.use(on_disk[: int(missing.argmax())] if missing.any() else on_disk)
        if not missing.any() or self.writer.disabled:
            return
        if self.host.num_held + len(slots) > MAX_WRITING_SHARE * self.host.num_slots:
            self.writer.num_cut += int(missing.sum())
            return
        self.host.hold(slots)
        self.writer.add(Path(slots, [self.host.digest_of(slot) for slot in slots.tolist()], NORMAL))

    # --- finding and bringing up

    def extend(self, match: PrefixMatch, token_ids: np.ndarray) -> Extension:
        """Where the prefix of `token_ids` (int32; its last token is left to compute) goes on below the device."""
        if not len(self.host) and not (self.disk and len(self.disk)):
            return NO_EXTENSION
        width = self._index.block_size * 4
        data = token_bytes(token_ids[:-1])
        hasher, done, last = match.hasher, len(match.block_ids) * width, None
        for stride in (STRIDE_BLOCKS * width, width):
            while done + stride <= len(data):
                ahead = hasher.copy()
                ahead.update(data[done : done + stride])
                digest = ahead.digest()
                if not self._has(digest):
                    break
                hasher, last, done = ahead, digest, done + stride
        return NO_EXTENSION if last is None else self._paths(last)

    def _has(self, digest: bytes) -> bool:
        return self.host.find(digest) != NO_SLOT or (self.disk is not None and self.disk.find(digest) != NO_SLOT)

    def _paths(self, last: bytes) -> Extension:
        slot = self.host.find(last)
        if slot != NO_SLOT:
            return Extension(self.host.path(slot), _NO_SLOTS)
        assert self.disk is not None
        disk_path = self.disk.path(self.disk.find(last))
        low, high = 0, len(disk_path) - 1  # host memory has a prefix of the path: how long is it?
        while low < high:
            middle = (low + high) // 2
            if self.host.find(self.disk.digest_of(int(disk_path[middle]))) == NO_SLOT:
                high = middle
            else:
                low = middle + 1
        on_host = self.host.find(self.disk.digest_of(int(disk_path[low - 1]))) if low else NO_SLOT
        return Extension(self.host.path(on_host) if low else _NO_SLOTS, disk_path)

    def stage(self, extension: Extension, priority: int) -> Stage:
        """Bring a path from disk to host memory, or join whoever does already."""
        assert self.disk is not None
        last = self.disk.digest_of(int(extension.disk_path[-1]))
        return self.stager.find(last) or self.stager.stage(extension.disk_path, extension.host_path, priority)

    def load(self, resident: np.ndarray, extension: Extension, priority: int) -> np.ndarray:
        """Bring what host memory has to the device; see `Loader.load`."""
        path = self.loader.load(resident, extension.host_path, priority)
        self.slot_of_block[path] = extension.host_path
        return path

    def fetch(self, tail: bytes, max_blocks: int) -> tuple[int, bool]:
        """For the prefetcher: see `prefetch.Fetcher.fetch`. Takes only blocks that nobody holds."""
        if self._index.find(tail) != NO_BLOCK or not self._has(tail):
            return 0, False
        paths = self._paths(tail)
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

    # --- costs

    def move_s(self, lane: str, num_blocks: int) -> float:
        """How long so many blocks take on a lane, by what it has done so far."""
        return num_blocks * self._payload_bytes / (self.moves.stats[lane].bytes_per_s or ASSUMED_BYTES_PER_S)

    def swap_s(self, num_blocks: int) -> float:
        """How long it takes to copy so many blocks down and up again."""
        return self.move_s(SAVE, num_blocks) + self.move_s(LOAD, num_blocks)

    # --- turns of the owner

    def poll(self, now_s: float) -> int:
        """Take in what the lanes have done, and begin the prefetches that are due; returns how many moves ended."""
        done = self.moves.poll()
        if self.prefetcher is not None:
            self.prefetcher.step(now_s)
        return done

    def idle_s(self, now_s: float) -> float | None:
        """How soon `poll` is worth calling while the engine has nothing else to do; None: never."""
        if len(self.moves):
            return BUSY_POLL_S
        return None if self.prefetcher is None else self.prefetcher.next_s(now_s)

    def flush(self, deadline_s: float, clock: Callable[[], float] = time.monotonic) -> bool:
        """Copy every findable block of the device down, as far as there is time and room; whether all was done."""
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
        """Queue every findable block of the device to be copied down, as far as the queue has room."""
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

    def close(self, flush_s: float = 0.0) -> None:
        """End all moves; with a disk, first spend up to `flush_s` on storing what is not there yet."""
        self.moves.foreground = False
        if self.disk is not None and flush_s and not self.writer.disabled:
            self.flush(time.monotonic() + flush_s)
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
        """Host memory does not fail: a bug, or the device is lost."""
        raise DeviceError(f"KV could not be saved to host memory: {error.message}")

    def _disk_failed(self, error: MoveError) -> None:
        if error.kind != "disk":
            raise DeviceError(f"KV could not be written to disk: {error.message}")
        if not self.writer.disabled:
            self.writer.disable()
            self._on_disk_error(error.message)

    def _warm_start(self, stored: StoredBlocks) -> None:
        """Make findable what an earlier life left on disk: every block whose parent is there as well."""
        assert self.disk is not None
        self.disk.adopt(stored.slots.tolist(), _digests(stored.digests), _digests(stored.parents))

    # --- audit

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


def _digests(packed: np.ndarray) -> list[bytes]:
    """uint8 [N, 16] as N byte strings."""
    data = packed.tobytes()
    return [data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES)]


class SwapPath(Path):
    """The path of a preempted row: leased as a whole until it is copied."""

    __slots__ = ()


class DeviceSource:
    """The device's blocks, as the demoter to host memory reads them: leased while a copy runs."""

    lane = SAVE

    def __init__(self, tiers: TieredStore):
        self._tiers = tiers

    def take(self, items: np.ndarray, digests: Sequence[bytes]) -> int:
        index, num = self._tiers._index, 0
        for block, digest in zip(items.tolist(), digests):
            if index.find(digest) != block:
                break
            num += 1
        self._tiers._pool.lease(items[:num], FOREVER_S)
        return num

    def give_back(self, items: np.ndarray) -> None:
        self._tiers._pool.unlease(items)

    def written(self, items: np.ndarray, digests: Sequence[bytes], slots: np.ndarray) -> None:
        index = self._tiers._index
        for block, digest, slot in zip(items.tolist(), digests, slots.tolist()):
            if index.find(digest) == block:
                self._tiers.slot_of_block[block] = slot

    def ended(self, path: Path) -> None:
        if isinstance(path, SwapPath):
            self._tiers._pool.unlease(path.items)
        if self._tiers.disk is not None and path.done:
            self._tiers.write_down(path.slots[: path.done])


class HostSource:
    """Host slots, as the demoter to disk reads them: the whole path is held until it ends."""

    lane = WRITE

    def __init__(self, tiers: TieredStore):
        self._tiers = tiers

    def take(self, items: np.ndarray, digests: Sequence[bytes]) -> int:
        return len(items)

    def give_back(self, items: np.ndarray) -> None:
        pass

    def written(self, items: np.ndarray, digests: Sequence[bytes], slots: np.ndarray) -> None:
        self._tiers.disk_of_slot[items] = slots

    def ended(self, path: Path) -> None:
        self._tiers.host.let_go(path.items)
