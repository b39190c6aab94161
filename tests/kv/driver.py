"""Drives a real `KVManager` and the slow model side by side through the operations of a scheduler."""

from __future__ import annotations

import numpy as np

from tests.kv.slow_model import SlowModel
from xllm.kv.block_pool import Lease
from xllm.kv.manager import KVManager
from xllm.kv.prefix_index import NO_BLOCK

LEASE_S = 2.0


class Driver:
    """Rows hold token tuples. Every operation checks the invariants; one that cannot be done returns False."""

    def __init__(self, num_blocks: int, block_size: int, num_rows: int):
        self.kv = KVManager(num_blocks=num_blocks, block_size=block_size, num_rows=num_rows,
                            max_tokens_per_row=num_blocks * block_size)
        self.model = SlowModel(num_blocks, block_size)
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.last_step: dict[int, int] = {}
        self.num_written: dict[int, int] = {}  # tokens whose KV the planned steps write
        self.step = 0  # the newest planned
        self.num_hits = 0
        self.pinned: list[np.ndarray] = []  # by moves in flight
        self.leases: list[tuple[Lease, np.ndarray]] = []

    @property
    def free_rows(self) -> list[int]:
        return [row for row in range(len(self.kv.num_blocks_R)) if row not in self.tokens]

    def admit(self, tokens: tuple[int, ...]) -> bool:
        array = np.array(tokens, dtype=np.int32)
        match = self.kv.lookup(array, "")
        self.model.check_hit(match.block_ids.tolist(), tokens)
        idle = self.kv.num_idle(match)
        need = -(-len(tokens) // self.kv.block_size) - len(match.block_ids)
        if not self.free_rows or need > self.kv.num_free_blocks - idle:
            return False
        row = self.free_rows[0]
        self.num_hits += len(match.block_ids)
        copy = self.kv.enter(row, match, self.step)
        for block in match.block_ids.tolist():
            self.model.hold(row, block)
        if copy is not None:
            assert match.tail != NO_BLOCK
            self.model.check_hit([*match.block_ids.tolist(), copy[0]], tokens)
            self.model.take_new(row, copy[1])
            self.model.blocks[copy[0]].fence = max(self.model.blocks[copy[0]].fence, self.step)
        self.tokens[row], self.last_step[row], self.num_written[row] = tokens, -1, 0
        rows = np.array([row])
        self._take(row, self.kv.grow(rows, self.kv.blocks_needed(rows, np.array([len(tokens)])))[1])
        return self._done()

    def _take(self, row: int, blocks: np.ndarray) -> None:
        for block in blocks.tolist():
            self.model.take_new(row, block)

    def run(self, row: int) -> bool:
        """Plan a step that writes all of the row's KV."""
        self.last_step[row] = self.step
        self.num_written[row] = len(self.tokens[row])
        for i, block in enumerate(self.kv.blocks_of(row).tolist()):
            end = (i + 1) * self.kv.block_size
            if end <= len(self.tokens[row]):
                self.model.write(block, self.tokens[row][:end])
        return self._done()

    def extend(self, row: int, token: int) -> bool:
        rows, length = np.array([row]), len(self.tokens[row]) + 1
        need = self.kv.blocks_needed(rows, np.array([length]))
        if need[0] > self.kv.num_free_blocks:
            return False
        self.tokens[row] += (token,)
        self._take(row, self.kv.grow(rows, need)[1])
        return self._done()

    def settle(self) -> bool:
        """The newest step is done; full blocks of the rows that took part become findable."""
        self.kv.settle(self.step)
        self.model.settled = self.step
        for row, last in self.last_step.items():
            if last == self.step:
                self._commit(row)
        self.step += 1
        return self._done()

    def _commit(self, row: int) -> None:
        before = self.kv.blocks_of(row).tolist()
        tokens = self.tokens[row]
        self.kv.commit(row, np.array(tokens, dtype=np.int32), self.num_written[row], self.last_step[row])
        for i, (old, new) in enumerate(zip(before, self.kv.blocks_of(row).tolist())):
            if old != new:
                self.model.check_hit([self.kv.blocks_of(row).tolist()[j] for j in range(i + 1)], tokens)
                self.model.hold(row, new)
                self.model.let_go(row, old, self.last_step[row])

    def finish(self, row: int) -> bool:
        for block in self.kv.blocks_of(row).tolist():
            self.model.let_go(row, block, self.last_step[row])
        self.kv.leave(row, self.last_step[row])
        del self.tokens[row], self.last_step[row], self.num_written[row]
        return self._done()

    def pin(self, row: int) -> bool:
        """A copy of the row's blocks begins; it ends with `unpin`, whatever becomes of the row."""
        self.pinned.append(self.kv.blocks_of(row))
        self.kv.pool.pin(self.pinned[-1])
        for block in self.pinned[-1].tolist():
            self.model.blocks[block].num_pins += 1
        return self._done()

    def unpin(self) -> bool:
        """The oldest copy ends."""
        if not self.pinned:
            return False
        blocks = self.pinned.pop(0)
        for block in blocks.tolist():
            self.model.blocks[block].num_pins -= 1
        self.kv.pool.unpin(blocks)
        return self._done()

    def lease(self, row: int, for_s: float = LEASE_S) -> bool:
        """A transfer will want the row's blocks some time."""
        blocks, deadline = self.kv.blocks_of(row), self.model.now + for_s
        self.leases.append((self.kv.pool.lease(blocks, deadline), blocks))
        for block in blocks.tolist():
            self.model.blocks[block].deadlines.append(deadline)
        return self._done()

    def end_lease(self) -> bool:
        """The oldest transfer needs its blocks no longer; it may be late, and not know that its lease has expired."""
        if not self.leases:
            return False
        lease, blocks = self.leases.pop(0)
        if lease.deadline_s > self.model.now:
            for block in blocks.tolist():
                self.model.blocks[block].deadlines.remove(lease.deadline_s)
        self.kv.pool.end_lease(lease)
        return self._done()

    def pass_time(self, seconds: float = LEASE_S / 2) -> bool:
        self.model.now += seconds
        self.kv.poll(self.model.now)
        return self._done()

    def drop_cached(self) -> bool:
        self.kv.pool.drop_cached()
        return self._done()

    def _done(self) -> bool:
        """The invariants that hold at all times."""
        self.kv.check_integrity()
        held = [len(b.holders) for b in self.model.blocks]
        assert held == self.kv.pool.ref_counts().tolist()
        reusable = sum(self.model.may_be_reused(b) for b in range(self.kv.pool.num_blocks))
        assert self.kv.num_free_blocks <= reusable, "offers a block that is in use"
        return True

    def finish_all(self) -> None:
        """At rest nothing may be missing: every block is available again."""
        for row in list(self.tokens):
            self.finish(row)
        while self.pinned:
            self.unpin()
        self.pass_time(max((lease.deadline_s - self.model.now for lease, _ in self.leases), default=0.0))
        self.settle()
        assert self.kv.num_free_blocks == self.kv.pool.num_blocks
