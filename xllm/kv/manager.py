"""`KVManager`: the interface of the KV cache for scheduler and engine.

It keeps each row's block table, finds prefix hits, makes full blocks findable, and releases a row's
blocks when the row leaves. Letters: R rows, M blocks per row, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from xllm.errors import IntegrityError
from xllm.kv.block import Hasher, root_hasher, token_bytes
from xllm.kv.block_pool import BlockPool
from xllm.kv.eviction import EvictionPolicy, Protected, make_policy
from xllm.kv.kv_events import EventSink, NoteTokens
from xllm.kv.kv_source import Extension, KVSource, NoSource
from xllm.kv.lift import Lift
from xllm.kv.moves import LOAD, SAVE
from xllm.kv.prefix_index import NO_BLOCK, PrefixIndex, PrefixMatch
from xllm.kv.promotion import Stage
from xllm.stats import SourceStats

S = TypeVar("S", bound=KVSource)
DEFAULT_POLICY = "duel"
_NO_BLOCKS = np.zeros(0, dtype=np.int32)


class KVManager:
    """Block tables over one `BlockPool`, with an optional `KVSource` below. Not thread-safe: owned by the scheduler's
    thread.

    Scheduler and engine call these methods only: `pool` and `source` are public for tests and benchmarks.
    """

    def __init__(self, *, num_blocks: int, block_size: int, num_rows: int, max_tokens_per_row: int,
                 num_reserved_blocks: int = 0, enable_prefix_caching: bool = True,
                 policy: EvictionPolicy | None = None):
        """policy: the eviction policy; None: `DEFAULT_POLICY`. num_reserved_blocks: how many of `num_blocks`, from
        block 0 on, no row gets."""
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._index = PrefixIndex(num_blocks, block_size)
        self._policy = make_policy(DEFAULT_POLICY, num_blocks) if policy is None else policy
        self.pool = BlockPool(num_blocks, self._index, self._policy, num_reserved=num_reserved_blocks)
        self._admitted: tuple[list[int], list[bytes], list[int]] = ([], [], [])  # (blocks, digests, parents)
        self.block_table_RM = np.zeros((num_rows, -(-max_tokens_per_row // block_size)), dtype=np.int32)
        self.num_blocks_R = np.zeros(num_rows, dtype=np.int64)
        self.num_committed_R = np.zeros(num_rows, dtype=np.int64)  # full blocks already offered to the index
        self._hashers: list[Hasher | None] = [None] * num_rows
        self._parents = [NO_BLOCK] * num_rows  # the cached block that ends the row's committed prefix
        self._is_salted = [False] * num_rows
        self.note_tokens: NoteTokens | None = None  # hears of each block before it is stored, but for salted ones
        self._replaced: list[tuple[int, int, int]] = []  # (row, place in the table, block) not yet in a plan
        self.source: KVSource = NoSource()
        self._held_paths: dict[int, np.ndarray] = {}  # blocks that a waiting request keeps, by its key

    def attach(self, make_source: Callable[[PrefixIndex, BlockPool], S]) -> S:
        """Make a source, put it below the device and return it. Called at most once, before the first request."""
        assert not self.source.has_tiers and self.enable_prefix_caching
        self.source = source = make_source(self._index, self.pool)
        return source

    def listen(self, sink: EventSink, *below: EventSink) -> None:
        """Tell `sink` which blocks are findable on the device, now and from now on, and `below` which are in host
        memory and on disk. One sink each at a time."""
        self._index.listen(sink)
        for tier, its_sink in zip(self.source.indexes, below):
            tier.listen(its_sink)

    # --- how many blocks there are

    @property
    def num_blocks(self) -> int:
        """All blocks of the device, reserved ones included."""
        return self.pool.num_blocks

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that rows can have."""
        return self.pool.num_usable

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken now: empty ones, and those that hold only evictable prefixes."""
        return self.pool.num_available

    @property
    def num_pending_blocks(self) -> int:
        """Blocks that become free by themselves once the running steps and transfers are done."""
        return self.pool.num_pending

    @property
    def num_held_blocks(self) -> int:
        """Blocks that a row, a waiting request or a load holds."""
        return self.pool.num_held

    @property
    def usage(self) -> float:
        """Share of the blocks, 0 to 1, that are held or still in flight."""
        return 1.0 - self.pool.num_available / self.pool.num_usable

    # --- finding a prefix

    def lookup(self, token_ids: np.ndarray, cache_salt: str) -> PrefixMatch:
        """The cached prefix of `token_ids`; empty with prefix caching off. Changes nothing.

        At least the last token is left to compute. Where it alone is missing from a cached block, that
        block is the match's `tail`.
        """
        if not self.enable_prefix_caching:
            return PrefixMatch(_NO_BLOCKS, root_hasher(self.block_size, cache_salt), cache_salt != "")
        match = self._index.match(token_ids[:-1], cache_salt)
        done = len(match.block_ids) * self.block_size
        if done + self.block_size == len(token_ids):
            ahead = match.hasher.copy()
            ahead.update(token_bytes(token_ids[done:]))
            match.tail = self._index.find(ahead.digest())
        return match

    def num_hot(self, match: PrefixMatch) -> int:
        """How many of the hit's blocks are in the protected tier L1. Must be called before the blocks are shared."""
        return self._policy.num_hot(match.block_ids) if isinstance(self._policy, Protected) else 0

    def num_idle(self, match: PrefixMatch) -> int:
        """How many of the hit's blocks count in `num_free_blocks` now and would not after `enter`."""
        return self.pool.num_idle(match.block_ids) + (match.tail != NO_BLOCK)

    def num_cached_tokens(self, match: PrefixMatch) -> int:
        """How many tokens of the prompt need not be computed after this hit."""
        whole = len(match.block_ids) * self.block_size
        return whole + (self.block_size - 1 if match.tail != NO_BLOCK else 0)

    def enter(self, row: int, match: PrefixMatch, step: int) -> tuple[int, int] | None:
        """Put the blocks of a prefix hit into an empty row's table; returns (src, dst), a block that step `step` must
        copy, or None.

        The last token is computed again, so its KV is written again: where it lies in a cached block, the row
        gets a copy of that block (copy-on-write), for which one block must be available.
        """
        assert self.num_blocks_R[row] == 0
        block_ids, copy = match.block_ids, None
        self.pool.share(block_ids)
        if match.tail != NO_BLOCK:
            source = np.array([match.tail], dtype=np.int32)
            self.pool.share(source)
            private = self.pool.allocate(1)
            self.pool.release(source, fence=step)  # the copy in that step still reads it
            copy = (match.tail, int(private[0]))
            block_ids = np.append(block_ids, private)
        self.block_table_RM[row, : len(block_ids)] = block_ids
        self.num_blocks_R[row] = len(block_ids)
        self.num_committed_R[row] = len(match.block_ids)
        self._hashers[row], self._is_salted[row] = match.hasher, match.is_salted
        self._parents[row] = int(match.block_ids[-1]) if len(match.block_ids) else NO_BLOCK
        return copy

    # --- paths held for requests that have no row yet

    def hold(self, key: int, path: np.ndarray) -> None:
        """Hold a path of findable blocks (int32, root first) under `key`, for a request that has no row yet, until
        `let_go`."""
        assert key not in self._held_paths
        self.pool.share(path)
        self._held_paths[key] = path

    def holds(self, key: int) -> bool:
        return key in self._held_paths

    @property
    def held_keys(self) -> list[int]:
        """The keys of all open `hold`s."""
        return list(self._held_paths)

    def let_go(self, key: int) -> None:
        """Release the path held under `key`."""
        self.pool.release(self._held_paths.pop(key), fence=-1)

    # --- rows

    def blocks_read(self, match: PrefixMatch) -> np.ndarray:
        """The cached blocks that a hit reads, also the one that is only copied: int32."""
        return match.block_ids if match.tail == NO_BLOCK else np.append(match.block_ids, np.int32(match.tail))

    def blocks_of(self, row: int) -> np.ndarray:
        """A copy of the row's block ids: int32 [B]."""
        return self.block_table_RM[row, : self.num_blocks_R[row]].copy()

    def blocks_needed(self, rows: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """How many more blocks each row needs to hold `num_tokens` tokens (never negative)."""
        return np.maximum(-(-num_tokens // self.block_size) - self.num_blocks_R[rows], 0)

    def grow(self, rows: np.ndarray, num_new_blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take new blocks and append them to the rows' tables; returns (rows, block ids), both int32 [B], in table
        order. As many blocks must be available."""
        total = int(num_new_blocks.sum())
        block_ids = self.pool.allocate(total)
        if len(rows) == total:  # one each, the usual case
            repeated, columns = rows, self.num_blocks_R[rows]
        else:
            repeated = np.repeat(rows, num_new_blocks)
            ends = np.cumsum(num_new_blocks)
            within = np.arange(total) - np.repeat(ends - num_new_blocks, num_new_blocks)
            columns = self.num_blocks_R[repeated] + within
        self.block_table_RM[repeated, columns] = block_ids
        self.num_blocks_R[rows] += num_new_blocks
        return repeated.astype(np.int32), block_ids

    def commit(self, row: int, token_ids: np.ndarray, num_computed: int, fence: int) -> None:
        """Make the row's blocks that are full and settled findable in the prefix index.

        token_ids: the row's tokens; the first `num_computed` have their KV written by settled steps.
        fence: the last step planned with the row. Where another row made the same tokens findable first, this row's
        table is pointed at that block and its own is released (`take_replaced`).
        """
        hasher, index, size = self._hashers[row], self._index, self.block_size
        assert hasher is not None
        first, last = int(self.num_committed_R[row]), num_computed // size
        data, width = token_bytes(token_ids[first * size : last * size]), size * 4
        parent = self._parents[row]
        new_blocks, new_digests = [], []
        for i in range(last - first):
            hasher.update(data[i * width : (i + 1) * width])
            digest = hasher.digest()
            block = index.find(digest)
            if block == NO_BLOCK:
                block = int(self.block_table_RM[row, first + i])
                if self.note_tokens is not None and not self._is_salted[row]:
                    self.note_tokens(digest, data[i * width : (i + 1) * width])
                index.insert(digest, block, parent)
                new_blocks.append(block)
                new_digests.append(digest)
                self._admitted[2].append(parent)
            else:
                self._replace(row, first + i, block, fence)
            parent = block
        self._parents[row] = parent
        self.num_committed_R[row] = last
        self._admitted[0].extend(new_blocks)
        self._admitted[1].extend(new_digests)
        if new_blocks:
            self.source.committed(new_blocks, new_digests)

    def _admit(self) -> None:
        """Pass the blocks committed since the last call to the eviction policy, before any of them can be evicted."""
        blocks, digests, parents = self._admitted
        if blocks:
            self._policy.admit(np.array(blocks, dtype=np.int32), digests, np.array(parents, dtype=np.int32))
            self._admitted = ([], [], [])

    def _replace(self, row: int, place: int, block: int, fence: int) -> None:
        self.pool.share(np.array([block], dtype=np.int32))
        self.pool.release(self.block_table_RM[row, place : place + 1].copy(), fence)
        self.block_table_RM[row, place] = block
        self._replaced.append((row, place, block))

    def take_replaced(self) -> np.ndarray:
        """Block table entries that changed since the last call: int32 [C, 3] of (row, place, block)."""
        replaced, self._replaced = self._replaced, []
        return np.array(replaced, dtype=np.int32).reshape(-1, 3)

    def turn_began(self, session_id: str | None, block_ids: np.ndarray, clock: Callable[[], float]) -> None:
        """Report to the source that a request was admitted with this hit; see `KVSource.turn_began`."""
        self.source.turn_began(session_id, block_ids, clock)

    def turn_ended(self, session_id: str | None, row: int, clock: Callable[[], float]) -> None:
        """Report to the source that a row's request has ended normally; called before `leave`."""
        if self.num_committed_R[row]:
            self.source.turn_ended(session_id, self.block_table_RM[row, : self.num_committed_R[row]], clock)

    def leave(self, row: int, fence: int, *, used: bool = True, swap: bool = False) -> None:
        """Release all blocks of the row and empty its table. `fence`: the last step planned with it, -1 for none.

        used: whether this counts as a use of its findable blocks; not for a preempted row. swap: the row was preempted,
        and its findable blocks are to be copied to host memory before they are reused.
        """
        if self.enable_prefix_caching:
            self._admit()
            path = self.block_table_RM[row, : self.num_committed_R[row]].copy()
            if used:
                self._policy.use(path)
            self.source.released(path, swap=swap)
        self.pool.release(self.blocks_of(row), fence)
        self.num_blocks_R[row] = 0
        self.num_committed_R[row] = 0
        self._hashers[row] = None
        self._parents[row] = NO_BLOCK
        if self._replaced:
            self._replaced = [entry for entry in self._replaced if entry[0] != row]

    def settle(self, step: int) -> None:
        """Note that step `step` and all before it are done on the device: blocks that waited for them can be reused."""
        self.pool.settle(step)

    def reset_prefix_cache(self) -> int:
        """Drop every cached block that nothing holds, on the device and in host memory, not on disk; returns how many
        on the device."""
        self.source.clear()
        return self.pool.drop_cached()

    # --- what stands below the device; see `KVSource`

    @property
    def has_tiers(self) -> bool:
        """Whether KV that is evicted from the device may be found again."""
        return self.source.has_tiers

    @property
    def can_stage(self) -> bool:
        """Whether `extend` may find blocks that `stage` must bring to host memory first; see `KVSource`."""
        return self.source.can_stage

    def extend(self, match: PrefixMatch, token_ids: np.ndarray) -> Extension:
        """Find the blocks stored below the device that continue the hit; see `KVSource.extend`."""
        return self.source.extend(match, token_ids)

    def stage(self, extension: Extension, priority: int) -> Stage:
        """Begin to copy what `extension` has below host memory there; see `KVSource.stage`."""
        return self.source.stage(extension, priority)

    def lift(self, match: PrefixMatch, extension: Extension, priority: int) -> Lift:
        """Begin to copy what lies below host memory behind the hit to the device; see `KVSource.lift`."""
        return self.source.lift(match.block_ids, extension, priority)

    def lifted(self, lift: Lift) -> np.ndarray:
        """The device blocks of a lift that is done, up to the first that no longer holds what was loaded: the lift has
        released them, and some may have been evicted since."""
        pairs = zip(lift.path.tolist(), lift.digests)
        num = next((i for i, (block, digest) in enumerate(pairs) if self._index.find(digest) != block), len(lift.path))
        return lift.path[:num]

    def load(self, key: int, match: PrefixMatch, extension: Extension, priority: int) -> tuple[int, ...]:
        """Begin to copy the host blocks that follow the hit to the device, and `hold` the whole path under `key`;
        returns the tickets of the loads to wait for. The blocks needed must be available."""
        path = self.source.load(match.block_ids, extension, priority)
        self.hold(key, path)
        return self.source.open_tickets(path)

    @property
    def num_loading(self) -> int:
        """How many loads and lifts are not complete: each holds blocks until it is."""
        return self.source.num_loading

    def open_tickets(self, block_ids: np.ndarray) -> tuple[int, ...]:
        """The tickets of incomplete loads into these blocks; a step that reads the blocks must wait for them."""
        return self.source.open_tickets(block_ids)

    def is_loading(self, tickets: tuple[int, ...]) -> bool:
        """Whether any of these loads is not complete."""
        return any(map(self.source.is_open, tickets))

    def load_s(self, num_blocks: int) -> float:
        """The expected time in seconds to copy `num_blocks` blocks from host memory to the device."""
        return self.source.move_s(LOAD, num_blocks)

    def swap_s(self, num_blocks: int) -> float:
        """The expected time in seconds to copy `num_blocks` blocks to host memory and back."""
        return self.source.move_s(SAVE, num_blocks) + self.source.move_s(LOAD, num_blocks)

    def poll(self, now_s: float) -> int:
        """Take in the moves that have ended, begin those that are due and end the leases that have expired; returns how
        many moves ended. now_s: by the owner's clock."""
        done = self.source.poll(now_s)
        self.pool.expire_leases(now_s)
        return done

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a move has ended, at most `timeout_s`. Returns False at once if none is under way."""
        return self.source.wait(timeout_s)

    def idle_s(self, now_s: float) -> float | None:
        """In how many seconds an otherwise idle engine should call `poll`; None: not before something else happens."""
        return self.source.idle_s(now_s)

    def set_foreground(self, steps_run: bool) -> None:
        """Say whether steps are running: moves that no request waits for are then slowed down."""
        self.source.set_foreground(steps_run)

    def close(self, flush_s: float) -> None:
        """End all moves; with a disk or a store, first copy the device's blocks there for at most `flush_s` seconds."""
        self.source.close(flush_s)

    def source_stats(self, missed_total: dict[str, dict[str, int]]) -> SourceStats:
        """The source's numbers; may be called from another thread. missed_total: see `MovePerformer.missed_total`."""
        return self.source.stats(missed_total)

    def check_integrity(self) -> None:
        """Raise IntegrityError if pool, index and block tables disagree."""
        self.pool.check_integrity()
        held = np.zeros(self.pool.num_blocks, dtype=np.int64)
        held[: self.pool.num_reserved] = 1
        for row, count in enumerate(self.num_blocks_R.tolist()):
            np.add.at(held, self.block_table_RM[row, :count], 1)
        for path in (*self._held_paths.values(), *self.source.held_paths()):
            held[path] += 1
        if not np.array_equal(held, self.pool.ref_counts()):
            raise IntegrityError("ref counts differ from what rows, waiting requests and loads hold")
        self.source.check_integrity()
