"""The audit of the store machine: contents, holders, leases and links, counted anew from what is under way."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tests.kv.store_life import Life
from tests.kv.store_world import Contents, paths
from xllm.kv.moves import FETCH, LANES, LOAD, PUT, READ, SAVE, WRITE
from xllm.kv.prefetch import MAX_SHARE
from xllm.kv.shared_store import SharedStore
from xllm.kv.store_tier import MAX_HELD_SHARE
from xllm.kv.tier_index import DOOMED, FREE, NO_SLOT, RESIDENT, WRITING, TierIndex

NO_PARENT = bytes(16)


def check(life: Life) -> None:
    """All that holds after every operation."""
    life.kv.check_integrity()
    life.events.check()
    _check_device(life)
    _check_rows(life)
    _check_tier(life, life.tiers.host)
    _check_tier(life, life.tiers.disk)
    _check_host_contents(life)
    _check_holders(life)
    _check_leases(life)
    _check_counts(life)


def _check_device(life: Life) -> None:
    """A findable block that is not on its way holds what its digest says, and its parent is the right one."""
    index, contents = life.kv._index, life.contents
    findable = index.contains(np.arange(life.shape.num_blocks))
    blocks = np.flatnonzero(findable)
    digests = [index.digest_of(block) for block in blocks.tolist()]
    for block, digest in zip(blocks.tolist(), digests):
        parent = index._parent_of[block]
        above = index.digest_of(parent) if parent >= 0 else NO_PARENT
        assert above == contents.parent_of[digest], f"block {block} follows the wrong one"
    ready = life.tiers.loader.ticket_of[blocks] == 0
    wanted = b"".join(contents.bytes_of[d] for d, there in zip(digests, ready.tolist()) if there)
    assert life.memory.device[blocks[ready]].tobytes() == wanted, "a findable block holds something else"


def _check_rows(life: Life) -> None:
    """Whoever runs finds what its settled steps have written, in its own block table."""
    for row in life.rows.values():
        blocks = life.kv.blocks_of(row.row)
        values = life.memory.device.ravel()[life.memory.flat(blocks)[: row.settled]]
        ready = np.repeat(life.tiers.loader.ticket_of[blocks] == 0, life.shape.block_size)[: row.settled]
        wanted = np.array(row.history.values[: row.settled], dtype=np.uint64)
        assert np.array_equal(values[ready], wanted[ready]), f"row {row.row} lost KV"


def _check_tier(life: Life, tier: TierIndex) -> None:
    """No block without its parent, and the parent is the one that the digest was computed behind."""
    for digest, slot in tier._slot_of.items():
        parent = int(tier.parent_of[slot])
        above = NO_PARENT if parent == NO_SLOT else tier.digest_of(parent)
        assert above == life.contents.parent_of[digest], f"slot {slot} follows the wrong one"


def _check_host_contents(life: Life) -> None:
    slots = life.tiers.host._slot_of
    places = np.fromiter(slots.values(), dtype=np.int64, count=len(slots))
    wanted = b"".join(life.contents.bytes_of[digest] for digest in slots)
    assert life.memory.host[places].tobytes() == wanted, "a host slot holds something else"


def check_disk_contents(life: Life) -> None:
    """What disk gives is right; while nobody damaged it, it gives all that is resident."""
    store, out = life.store, bytearray(life.memory.payload_bytes)
    for digest, slot in life.tiers.disk._slot_of.items():
        found = store.read(slot, digest, memoryview(out))
        assert found or life.machine.damaged, f"disk slot {slot} lost its block"
        assert not found or bytes(out) == life.contents.bytes_of[digest], f"disk slot {slot} gave something else"


def _check_holders(life: Life) -> None:
    """Host slots and disk slots are held by exactly those who read or write them."""
    tiers = life.tiers
    host, disk = Counter(), Counter()
    if tiers.saver._active is not None:
        host.update(tiers.saver._active.slots[: tiers.saver._active.done].tolist())
    for path in paths(tiers.writer):
        host.update(path.items.tolist())
    if tiers.writer._active is not None:
        disk.update(tiers.writer._active.slots[: tiers.writer._active.done].tolist())
    for rest in tiers.passage.open_rests:
        disk.update([] if rest.slots is None else rest.slots.tolist())
    for lift in tiers.lifter.open_lifts:
        disk.update(lift.disk_path.tolist())
    for stage in tiers.stager._staging.values():
        host.update(stage.host_slots[: stage.done].tolist())
        disk.update(stage.disk_path.tolist())
    for load in tiers.loader.open_loads:
        host.update(load.host_path.tolist())
    for offer in () if tiers.store is None else tiers.store._queue:
        host.update(offer.slots.tolist())
    for tier, held in ((tiers.host, host), (tiers.disk, disk)):
        counts = np.zeros(tier.num_slots, dtype=int)
        for slot, count in held.items():
            counts[slot] = count
        assert np.array_equal(tier._holders, counts), "holders differ from what is under way"


def _check_leases(life: Life) -> None:
    """Pinned are the blocks of copies under way, and leased those of swapped rows until they are copied, but not after
    the deadline."""
    pool, guards = life.kv.pool, Counter()
    for move in life.lanes.not_received(SAVE):
        guards.update(move.sources.tolist())
    swaps = {path.lease for path in [*paths(life.tiers.saver), *(rest.path for rest in life.tiers.passage.open_rests)]}
    swaps.discard(None)
    assert set(pool._leases) <= swaps, "a lease that nobody will end"
    for lease in swaps - set(pool._leases):
        assert lease.deadline_s <= life.now, "a swap lost its blocks before its time"
    for lease in pool._leases:
        guards.update(lease.block_ids.tolist())
    wanted = np.bincount(list(guards.elements()), minlength=pool.num_blocks)
    assert np.array_equal(pool._num_guards, wanted), "guards differ from what is under way"


def _check_counts(life: Life) -> None:
    tiers, under_way = life.tiers, {lane: life.lanes.not_received(lane) for lane in LANES}
    loads = {load.ticket: load for load in tiers.loader.open_loads}
    passing = tiers.loader._passing
    assert len(loads) + len(passing) == tiers.loader.num_open
    assert {move.ticket for move in under_way[LOAD]} == {*loads, *passing}
    assert {move.ticket for move in life.lanes.queued(LOAD)} == set(life.board._tickets), "a step waits for nothing"
    lifted = [slot for lift in tiers.lifter.open_lifts for slot in lift.host_slots.tolist()]
    for move in under_way[LOAD]:
        if move.ticket in passing:
            assert np.array_equal(move.targets, passing[move.ticket]) and set(move.sources.tolist()) <= set(lifted)
            continue
        load = loads[move.ticket]
        assert np.array_equal(move.targets, load.new)
        assert np.array_equal(move.sources, load.host_path[-len(load.new) :])
    assert len(tiers.moves) == sum(map(len, under_way.values()))
    for lane, moves in under_way.items():
        assert tiers.moves.stats[lane].queued == len(moves)
    through = {slot for rest in tiers.passage.open_rests for slot in rest.host_slots.tolist()}
    num_through = 0
    for lane, demoter, places in ((SAVE, tiers.saver, "targets"), (WRITE, tiers.writer, "sources")):
        own = [move for move in under_way[lane] if through.isdisjoint(getattr(move, places).tolist())]
        num_through += len(under_way[lane]) - len(own)
        assert len(own) == demoter._in_flight <= 2
    assert num_through == bool(through), "one chunk at a time passes through host memory"
    saved, written, read, fetched = ([slot for move in under_way[lane] for slot in move.targets.tolist()]
                                     for lane in (SAVE, WRITE, READ, FETCH))
    filling = [*{*saved, *through}, *{*read, *fetched, *lifted}]
    assert sorted(filling) == np.flatnonzero(tiers.host._state == WRITING).tolist()
    assert sorted(written) == np.flatnonzero(tiers.disk._state == WRITING).tolist()
    assert not np.any(tiers.host._state == DOOMED)
    if tiers.store is not None:
        _check_store(life)
    prefetcher = tiers.prefetcher
    if prefetcher is not None:
        unused = sum(talk.fetched_blocks for talk in prefetcher._by_tail.values())
        assert unused == prefetcher._unused_blocks <= MAX_SHARE * life.shape.num_blocks
        assert 0.0 <= prefetcher._accuracy <= 1.0


def _check_store(life: Life) -> None:
    """What is offered to the shared store is held, and counted once."""
    store, moves = life.tiers.store, life.lanes.not_received(PUT)
    assert len(moves) == store._in_flight <= 2
    assert store._num_held == sum(len(offer.slots) for offer in store._queue)
    assert store._num_held <= MAX_HELD_SHARE * life.shape.num_host_slots
    coming = [offer.digests[i] for offer in store._queue for i in offer.lacking]
    done = sum(offer.num_ended for offer in store._queue)
    assert len(set(coming)) == len(coming) == len(store._coming) + done and store._coming <= set(coming)


def check_shared_contents(contents: Contents, store: SharedStore) -> int:
    """What a shared store gives is right; returns how many blocks it gives."""
    out, num = bytearray(store.payload_bytes), 0
    store.refresh()
    for digest, wanted in contents.bytes_of.items():
        if store.read(digest, memoryview(out)):
            assert bytes(out) == wanted, "the shared store gave something else"
            num += 1
    return num


def check_at_rest(life: Life) -> None:
    """Nobody runs, waits or moves anything: all is free."""
    tiers, pool = life.tiers, life.kv.pool
    assert pool.num_available == pool.num_blocks and pool.num_held == pool.num_pending == 0
    assert not pool._leases and not pool._num_guards.any() and not pool._is_doomed.any() and not life.kv.held_keys
    assert tiers.host.num_held == 0 and tiers.disk.num_held == 0
    assert tiers.saver.is_idle and tiers.writer.is_idle and tiers.passage.is_idle and not tiers.lifter.open_lifts
    assert tiers.loader.num_open == tiers.stager.num_open == len(tiers.moves) == 0
    assert not len(life.board)
    assert tiers.store is None or (tiers.store.is_idle and not tiers.store._coming and not tiers.store._num_held)
    for tier in (tiers.host, tiers.disk):
        assert np.all((tier._state == RESIDENT) | (tier._state == FREE))
