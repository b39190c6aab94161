"""One life of the store, from start-up to a crash or a shutdown, as a scheduler would drive it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from typing import Protocol

import numpy as np

from tests.kv.held_view import HeldView
from tests.kv.manual_lanes import ManualLanes
from tests.kv.replay import Replay
from tests.kv.store_world import Contents, History, Memory, Row, Shape, Step, Waiter, Work, paths
from xllm.errors import DiskError
from xllm.kv.disk import DiskStore
from xllm.kv.disk_format import PAGE_BYTES, make_geometry
from xllm.kv.eviction import make_policy
from xllm.kv.manager import KVManager
from xllm.kv.moves import LANES, LOAD, OpenMoves
from xllm.kv.performer import MovePerformer
from xllm.kv.prefetch import Prefetcher
from xllm.kv.shared_store import SharedStore
from xllm.kv.store_tier import StoreTier
from xllm.kv.tickets import TicketBoard
from xllm.kv.tier_index import TierIndex
from xllm.kv.tiers import TieredStore

FINGERPRINT = bytes(range(32))
SEGMENT_SLOTS = 4


def open_store(folder: Path, shape: Shape, num_slots: int) -> DiskStore:
    """With exactly so many slots."""
    payload_bytes, segment_bytes = shape.block_size * 8, SEGMENT_SLOTS * PAGE_BYTES
    geometry = make_geometry(FINGERPRINT, payload_bytes, segment_bytes)
    full, rest = divmod(num_slots, SEGMENT_SLOTS)
    capacity_bytes = full * geometry.payload_offset(SEGMENT_SLOTS) + (geometry.payload_offset(rest) if rest else 0)
    store = DiskStore(folder, fingerprint=FINGERPRINT, payload_bytes=payload_bytes, capacity_bytes=capacity_bytes,
                      segment_bytes=segment_bytes)
    assert store.num_slots == num_slots
    return store


class Episode(Protocol):
    """What outlives a life, and whether somebody has changed bytes on disk."""

    shape: Shape
    rng: Random
    contents: Contents
    talks: list[History]
    counts: Counter
    damaged: bool

    def new_id(self) -> int: ...


class Life:
    """`talks`: the conversations, which outlive it. Every method is one operation; those that do not apply do nothing.

    Steps are planned at most two ahead, run late, and settle in order. A step writes the KV of its rows, and first
    finds out whether all that it reads is what it should be.
    """

    def __init__(self, machine: Episode, store: DiskStore, shared: SharedStore | None = None):
        self.machine, self.shape, self.rng = machine, machine.shape, machine.rng
        self.contents, self.talks, self.counts = machine.contents, machine.talks, machine.counts
        shape = self.shape
        self.memory = Memory(shape.num_blocks, shape.block_size, shape.num_host_slots)
        self.kv = KVManager(num_blocks=shape.num_blocks, block_size=shape.block_size, num_rows=shape.num_rows,
                            max_tokens_per_row=shape.max_tokens, policy=self._policy(shape.num_blocks))
        self.events = Replay(self.kv._index)
        self.kv.listen(self.events)
        self.store, self.board = store, TicketBoard()
        self.shared, self.view = shared, None if shared is None else HeldView(shared)
        self.lanes = ManualLanes(MovePerformer(self.memory, store, self.board, shared), self.rng, shape.eagerness)
        facts = self.lanes.performer.facts()
        self.disk_errors: list[str] = []
        self.tiers = self.kv.attach(lambda index, pool: TieredStore(
            index, pool, facts, self.lanes, self._policy, self.disk_errors.append,
            make_store=None if shared is None else self._make_store))
        if self.tiers.store is not None:
            self.tiers.store._chunk = shape.chunk
        self.tiers.saver._chunk = self.tiers.writer._chunk = self.tiers.passage._chunk = shape.chunk
        if shape.prefetch:
            self.tiers.prefetcher = Prefetcher(self.tiers)
        self.now = 0.0
        self.rows: dict[int, Row] = {}
        self.waiters: list[Waiter] = []
        self.steps: list[Step] = []
        self.next_step = 0
        self._copies: list[tuple[int, int]] = []
        self._tickets: set[int] = set()

    def _make_store(self, host: TierIndex, moves: OpenMoves) -> StoreTier:
        return StoreTier(self.view, host, moves, lambda said: None, self.shared.num_own_blocks)

    def _policy(self, num_places: int):
        return make_policy(self.shape.policy, num_places, l1_share=self.shape.l1_share)

    @property
    def is_idle(self) -> bool:
        return not (self.rows or self.waiters or self.steps or self._copies)

    # --- requests come

    def pick_prompt(self) -> tuple[int, History]:
        """A conversation as it stands, or an earlier point of it (a fork), or with another word at its end."""
        talk = self.rng.randrange(len(self.talks))
        history = self.talks[talk]
        size, dice = self.shape.block_size, self.rng.random()
        if dice < 0.15:
            history = history.prefix(self.rng.randint(1, len(history)))
        elif dice < 0.3 and len(history) > size:
            history = history.prefix(len(history) // size * size)
        else:
            history = history.prefix(len(history))
        if dice > 0.85 and len(history) < self.shape.max_tokens:
            history.extend([self.rng.randrange(3)])
        return talk, history

    def admit(self) -> None:
        """A new request: it waits for stored blocks where there are any, or gets in at once."""
        talk, history = self.pick_prompt()
        if self.rng.random() < 0.6 and self._promote(talk, history):
            return
        self._enter(talk, history)

    def admit_waiter(self) -> None:
        if self.waiters:
            waiter = self.rng.choice(self.waiters)
            if self._enter(waiter.talk, waiter.history):
                self._drop_waiter(waiter)

    def abort_waiter(self) -> None:
        if self.waiters:
            self.counts["aborted_waiters"] += 1
            self._drop_waiter(self.rng.choice(self.waiters))

    def _drop_waiter(self, waiter: Waiter) -> None:
        self.waiters.remove(waiter)
        if self.kv.holds(waiter.key):
            self.kv.let_go(waiter.key)

    def _promote(self, talk: int, history: History) -> bool:
        match = self.kv.lookup(history.array, history.salt)
        extension = self.tiers.extend(match, history.array)
        priority = self.rng.choice([0, 0, 1, 2**31])
        if extension.is_below_host:
            self.counts["staged"] += 1
            self.counts["found in the store"] += len(extension.stored)
            self.tiers.stage(extension, priority)
            extension = self.tiers.extend(match, history.array)
        num_blocks = extension.on_host(len(match.block_ids))
        num_below = extension.num_blocks - len(match.block_ids) if extension.is_below_host else 0
        num_free = self.kv.num_free_blocks - self.kv.num_idle(match)
        if not num_blocks and 0 < num_below <= num_free:
            self.tiers.lift(match.block_ids, extension, priority)
            self.counts["lifts"] += 1
            return True
        if not num_blocks or num_blocks > num_free:
            return False
        path = self.tiers.load(match.block_ids, extension, priority)
        key = self.machine.new_id()
        self.kv.hold(key, path)
        self.waiters.append(Waiter(key, history, talk))
        self.counts["promoted"] += 1
        return True

    def _enter(self, talk: int, history: History) -> bool:
        free = [row for row in range(self.shape.num_rows) if row not in self.rows]
        match = self.kv.lookup(history.array, history.salt)
        need = len(history) // self.shape.block_size + 1 - len(match.block_ids)
        if not free or need > self.kv.num_free_blocks - self.kv.num_idle(match):
            return False
        self.contents.learn(history)
        cached = self.kv.num_cached_tokens(match)
        self._tickets.update(self.kv.open_tickets(self.kv.blocks_read(match)))
        copy = self.kv.enter(free[0], match, self.next_step)
        row = Row(free[0], history, talk, self.machine.new_id(), planned=cached, settled=cached)
        if copy is not None:
            self._copies.append(copy)
            row.last_step = self.next_step
            row.settled = len(match.block_ids) * self.shape.block_size
            self.counts["copies"] += 1
        self.rows[row.row] = row
        self.counts["hits"] += len(match.block_ids)
        self.kv.turn_began(self._session(talk), match.block_ids, lambda: self.now)
        return True

    def _session(self, talk: int) -> str | None:
        return f"{self.talks[talk].salt}:{talk}" if talk % 2 else None

    # --- steps

    def plan(self) -> None:
        """Some rows compute some of what they lack; the step runs later."""
        if len(self.steps) >= 2:
            self.run()
        step = Step(self.next_step, copies=self._copies, tickets=self._tickets)
        for row in self.rng.sample(list(self.rows.values()), len(self.rows)):
            if self.rng.random() < 0.8:
                self._plan_row(step, row)
        self.kv.take_replaced()
        if step.works or step.copies:
            self._copies, self._tickets = [], set()
            self.steps.append(step)
            self.next_step += 1

    def _plan_row(self, step: Step, row: Row) -> None:
        wanted = len(row.history) - row.planned
        if not wanted or row.sampling:
            return
        stop = row.planned + (wanted if self.rng.random() < 0.5 else self.rng.randint(1, wanted))
        rows = np.array([row.row])
        need = self.kv.blocks_needed(rows, np.array([stop]))
        if need[0] > self.kv.num_free_blocks:
            self.counts["stalls"] += 1
            return
        self.kv.grow(rows, need)
        blocks = self.kv.blocks_of(row.row)
        step.works.append(Work(row, blocks, row.planned, stop))
        step.tickets.update(self.kv.open_tickets(blocks))
        row.planned, row.last_step = stop, step.number
        row.sampling = stop == len(row.history)

    def run(self, *, settle: bool = True) -> None:
        """The oldest step runs, and what it did is taken in."""
        if not self.steps:
            return
        step = self.steps.pop(0)
        self._wait_for(step.tickets)
        self._compute(step)
        if settle:
            self._settle(step)

    def _wait_for(self, ticket_ids: set[int]) -> None:
        """As the device does: the blocks that it reads must have come."""
        tickets = self.board.tickets(tuple(ticket_ids))
        if any(t.layers_done < t.num_layers for t in tickets):
            self.counts["waits"] += 1
            self.lanes.run_lane(LOAD)
        assert all(t.layers_done == t.num_layers for t in tickets)

    def _compute(self, step: Step) -> None:
        device = self.memory.device.ravel()
        for source, target in step.copies:
            self.memory.device[target] = self.memory.device[source]
        read, written = [], []
        for work in step.works:
            places = self.memory.flat(work.blocks)
            values = np.array(work.row.history.values[: work.stop], dtype=np.uint64)
            assert np.array_equal(device[places[: work.start]], values[: work.start]), "reads somebody else's KV"
            read.append(places[: work.start])
            written.append(places[work.start : work.stop])
            device[places[work.start : work.stop]] = values[work.start :]
        if written:
            changed = np.concatenate(written)
            assert len(np.unique(changed)) == len(changed), "two rows write one place"
            assert not len(np.intersect1d(changed, np.concatenate(read))), "writes what another row reads"

    def _settle(self, step: Step) -> None:
        self.kv.settle(step.number)
        for work in step.works:
            row = work.row
            if self.rows.get(row.row) is not row:
                continue
            row.settled = work.stop
            self.kv.commit(row.row, row.history.array, row.settled, row.last_step)
            if row.sampling and row.planned == len(row.history) == work.stop:
                row.sampling = False
                if len(row.history) < self.shape.max_tokens:
                    row.history.extend([self.rng.randrange(3)])
                    self.contents.learn(row.history)

    # --- rows go

    def pick_row(self) -> Row | None:
        return self.rng.choice(list(self.rows.values())) if self.rows else None

    def finish(self) -> None:
        """A turn ends well; the user says something new."""
        row = self.pick_row()
        if row is None:
            return
        self.kv.turn_ended(self._session(row.talk), row.row, lambda: self.now)
        self._leave(row)
        history = row.history.prefix(len(row.history))
        history.extend([self.rng.randrange(3) for _ in range(self.rng.randint(1, 3))])
        if len(history) > self.shape.max_tokens - 2:
            history = history.prefix(self.rng.randint(1, max(1, self.shape.max_tokens // 2)))
        self.talks[row.talk] = history

    def abort(self) -> None:
        row = self.pick_row()
        if row is not None:
            self._leave(row)

    def preempt(self) -> None:
        """The row will be back; half of the time its blocks are swapped to host memory."""
        row = self.pick_row()
        if row is not None:
            swap = self.rng.random() < 0.5
            self.counts["swaps"] += swap
            self._leave(row, used=False, swap=swap)
            self.talks[row.talk] = row.history

    def _leave(self, row: Row, *, used: bool = True, swap: bool = False) -> None:
        self.kv.leave(row.row, row.last_step, used=used, swap=swap)
        del self.rows[row.row]

    # --- moves, time and pressure

    def move(self) -> None:
        """Some moves of one lane run; what follows from them comes with a poll."""
        lane = self.rng.choice(LANES)
        for _ in range(self.rng.randint(1, 3)):
            self.lanes.run_one(lane)

    def poll(self) -> None:
        self.now += self.rng.choice([0.0, 0.001, 0.3, 5.0])
        before = set(self.kv.pool._leases)
        self.kv.poll(self.now)
        gone = before - set(self.kv.pool._leases)
        self.counts["leases expired"] += len(gone & {path.lease for path in paths(self.tiers.saver)})

    def look(self) -> None:
        """The engine and its worker look at what is new in the shared store."""
        if self.view is not None:
            try:
                self.view.look()
            except DiskError:
                self.counts["store not seen"] += 1

    def fetch(self) -> None:
        """What the prefetcher does, at a bad time."""
        _, history = self.pick_prompt()
        match = self.kv.lookup(history.array, history.salt)
        extension = self.tiers.extend(match, history.array)
        path, tier = extension.disk_path, self.tiers.disk
        if not len(path):
            path, tier = extension.host_path, self.tiers.host
        if len(path):
            num_blocks, _ = self.tiers.fetch(tier.digest_of(int(path[-1])), self.rng.choice([0, 2, 100]))
            self.counts["fetched"] += num_blocks

    def squeeze(self) -> None:
        """All that is idle in one tier goes."""
        drop = self.kv.pool.drop_cached
        self.rng.choice([drop, drop, drop, self.tiers.host.clear])()

    # --- the end

    def come_to_rest(self) -> None:
        while self.rows:
            self.abort()
        while self.waiters:
            self.abort_waiter()
        while self.steps or self._copies:
            self.plan()
            self.run()
        self.lanes.drain(self.tiers.moves)
