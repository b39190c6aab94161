"""A KV manager over every tier that computes one request at a time, for tests that need to know what comes when."""

import random
from dataclasses import replace

import numpy as np

from tests.kv.held_view import HeldView, open_shared_store
from tests.kv.manual_lanes import ManualLanes
from tests.kv.store_life import open_store
from tests.kv.store_world import History, Memory, random_shape
from xllm.kv.eviction import make_policy
from xllm.kv.manager import KVManager
from xllm.kv.moves import LOAD
from xllm.kv.performer import MovePerformer
from xllm.kv.prefetch import Prefetcher
from xllm.kv.store_tier import StoreTier
from xllm.kv.tickets import TicketBoard
from xllm.kv.tiers import TieredStore

BLOCK = 2


class Desk:
    """One request at a time, computed at once; `now` is the time. Moves run only when told to."""

    def __init__(self, num_blocks=64, num_host_slots=64, disk=None, shared=None):
        self.memory = Memory(num_blocks, BLOCK, num_host_slots)
        self.kv = KVManager(num_blocks=num_blocks, block_size=BLOCK, num_rows=1, max_tokens_per_row=num_blocks * BLOCK)
        self.disk_errors, self.store, self.shared, self.said = [], disk, shared, []
        performer = MovePerformer(self.memory, disk, TicketBoard(), shared)
        self.lanes = ManualLanes(performer, random.Random(0), eagerness=0.0)
        facts = self.lanes.performer.facts()
        self.tiers = self.kv.attach(lambda index, pool: TieredStore(
            index, pool, facts, self.lanes, lambda n: make_policy("lru", n), self.disk_errors.append,
            make_store=None if shared is None else self._make_store))
        self.moves = self.tiers.moves
        self.prefetcher = self.tiers.prefetcher = Prefetcher(self.tiers)
        self.now = 0.0
        self.step = 0

    def _make_store(self, host, moves) -> StoreTier:
        self.view = HeldView(self.shared)
        return StoreTier(self.view, host, moves, self.said.append, self.shared.num_own_blocks)

    def begin(self, history, session=None) -> int:
        """A request gets in and is computed at once; returns its row. `num_found`: its tokens found on the device."""
        tokens, row = history.array, np.array([0])
        match = self.kv.lookup(tokens, history.salt)
        found = self.num_found = self.kv.num_cached_tokens(match)
        copy = self.kv.enter(0, match, self.step)
        self.kv.turn_began(session, match.block_ids, lambda: self.now)
        self.kv.grow(row, self.kv.blocks_needed(row, np.array([len(tokens)])))
        places = self.memory.flat(self.kv.blocks_of(0))[: len(tokens)]
        if self.kv.open_tickets(self.kv.blocks_of(0)):
            self.lanes.run_lane(LOAD)
        if copy is not None:
            self.memory.device[copy[1]] = self.memory.device[copy[0]]
        held = self.memory.device.ravel()[places[:found]]
        assert held.tolist() == history.values[:found], "a prefetch brought something else"
        self.memory.device.ravel()[places] = history.values
        self.kv.settle(self.step)
        self.kv.commit(0, tokens, len(tokens), self.step)
        self.step += 1
        return 0

    def turn(self, history, session=None, *, ends_well=True, drain=True) -> int:
        """A whole turn; returns how many of its tokens were found on the device. drain: and all moves end."""
        row = self.begin(history, session)
        if ends_well:
            self.kv.turn_ended(session, row, lambda: self.now)
        self.kv.leave(row, self.step - 1)
        if drain:
            self.lanes.drain(self.moves)
        self.kv.check_integrity()
        return self.num_found

    def forget_device(self) -> None:
        self.kv.pool.drop_cached()
        assert not len(self.kv._index)

    def forget_host(self) -> None:
        self.tiers.host.clear()
        assert not len(self.tiers.host)

    def advance_to(self, now: float) -> None:
        """Time passes; moves that poll begins are left waiting."""
        self.now = now
        self.kv.poll(now)
        self.kv.check_integrity()

    def settle(self) -> None:
        self.lanes.drain(self.moves)
        self.kv.check_integrity()

    def num_promoted(self, history) -> int:
        """Bring up what host memory and disk have, as far as host memory has room; the device's blocks of it."""
        match = self.kv.lookup(history.array, history.salt)
        extension = self.tiers.extend(match, history.array)
        if extension.is_below_host:
            self.tiers.stage(extension, 0)
            self.settle()
            extension = self.tiers.extend(match, history.array)
        if extension.on_host(len(match.block_ids)):
            self.tiers.load(match.block_ids, extension, 0)
            self.settle()
        return len(self.kv.lookup(history.array, history.salt).block_ids)

    def num_promoted_of(self, history) -> int:
        """The same after another look at the shared store, and with the last block, which is left to compute else."""
        self.view.look()
        return self.num_promoted(later(history, 1))

    def num_fetched(self) -> int:
        return self.tiers.loader.num_loaded + sum(len(load.path) for load in self.tiers.loader.open_loads)


def talk(number: int, length: int = 12, salt: str = "") -> History:
    rng = random.Random(number)
    return History(salt, [rng.randrange(1000) for _ in range(length)])


def later(history: History, num_tokens: int = 4) -> History:
    longer = history.prefix(len(history))
    longer.extend(list(range(num_tokens)))
    return longer


def open_shared(folder, num_blocks=256):
    return open_shared_store(folder, BLOCK, num_blocks)


def open_disk(folder, num_slots=64):
    shape = random_shape(random.Random(0), ("lru",))
    return open_store(folder, replace(shape, block_size=BLOCK), num_slots)
