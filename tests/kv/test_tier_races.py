"""Orders of events between the tiers that chance seldom brings about."""

import os

import numpy as np
import pytest

from tests.kv.desk import BLOCK, Desk, open_disk, talk
from tests.kv.store_life import SEGMENT_SLOTS
from xllm.errors import DeviceError, IntegrityError
from xllm.kv import failpoints, promotion
from xllm.kv.disk_format import PAGE_BYTES
from xllm.kv.moves import LOAD, READ, SAVE, WRITE
from xllm.kv.tier_index import NO_SLOT
from xllm.kv.tiers import SWAP_LEASE_S


@pytest.fixture
def disk(tmp_path):
    store = open_disk(tmp_path)
    yield store
    failpoints.disarm()
    store.abandon()


@pytest.fixture
def desk(disk, monkeypatch):
    """Moves go two blocks at a time."""
    monkeypatch.setattr(promotion, "CHUNK_BLOCKS", 2)
    made = Desk(disk=disk)
    made.tiers.saver._chunk = made.tiers.writer._chunk = 2
    return made


def spoil(desk: Desk, slot: int) -> None:
    """Flip a byte of this slot's payload on disk."""
    number, index = divmod(slot, SEGMENT_SLOTS)
    segment = desk.store._segments[number]
    offset = PAGE_BYTES + PAGE_BYTES + index * PAGE_BYTES
    byte = os.pread(segment._fd, 1, offset)
    os.pwrite(segment._fd, bytes([byte[0] ^ 1]), offset)


def extension_of(desk: Desk, history):
    return desk.tiers.extend(desk.kv.lookup(history.array, history.salt), history.array)


def only_on_disk(desk: Desk, num_blocks: int):
    """A conversation that disk alone still has."""
    history = talk(1, num_blocks * BLOCK + 1)
    desk.turn(history)
    desk.forget_device()
    desk.forget_host()
    assert len(desk.tiers.disk) == num_blocks
    return history


def run(desk: Desk, lane: str, num_moves: int = 1) -> None:
    for _ in range(num_moves):
        assert desk.lanes.run_one(lane)
    desk.tiers.poll(desk.now)
    desk.kv.check_integrity()


def test_a_stage_that_goes_on_behind_a_block_that_another_found_broken(desk):
    """What the second one reads is good, but its place on disk is not findable any more: no link may lead there."""
    history = only_on_disk(desk, 10)
    path = desk.tiers.disk.path(desk.tiers.disk._slot_of[extension_tail(desk, history)])
    first = desk.tiers.stage(extension_of(desk, history.prefix(6 * BLOCK + 1)), 0)
    run(desk, READ)
    desk.turn(history.prefix(4 * BLOCK), drain=False)
    while desk.lanes.queued(SAVE):
        run(desk, SAVE)
    assert len(desk.tiers.host) == 4
    second = desk.tiers.stage(extension_of(desk, history), 0)
    spoil(desk, int(path[2]))
    run(desk, READ)
    assert len(desk.tiers.disk) == 2 and desk.tiers.stager.num_broken == 8 and first.is_done
    run(desk, READ)
    assert second.done == 6, "the blocks themselves were good"
    desk.settle()
    assert second.is_done and len(desk.tiers.host) == 10
    linked = desk.tiers.disk_of_slot[desk.tiers.host.path(int(second.host_slots[-1]))]
    assert (linked[:2] != NO_SLOT).all() and (linked[2:] == NO_SLOT).all()
    assert desk.tiers.disk.num_held == 0
    desk.turn(history)
    assert len(desk.tiers.disk) == 10, "written again"
    desk.forget_device()
    desk.forget_host()
    stage = desk.tiers.stage(extension_of(desk, history), 0)
    desk.settle()
    assert stage.num_read == 10


def extension_tail(desk: Desk, history) -> bytes:
    return desk.tiers.disk.digest_of(int(extension_of(desk, history).disk_path[-1]))


def test_a_chunk_that_is_written_behind_one_that_failed_is_not_published(desk):
    """The disk is full for one write only: the next chunk, under way already, has lost its parent."""
    history = talk(1, 8 * BLOCK + 1)
    desk.turn(history, drain=False)
    while desk.lanes.queued(SAVE):
        run(desk, SAVE)
    assert desk.moves.stats[WRITE].queued == 2
    failpoints.arm("tier.write_before", "ENOSPC")
    assert desk.lanes.run_one(WRITE)
    failpoints.disarm()
    run(desk, WRITE)
    desk.settle()
    assert len(desk.tiers.disk) == 0 and desk.tiers.disk.num_held == desk.tiers.host.num_held == 0
    assert desk.tiers.writer.disabled and len(desk.disk_errors) == 1
    assert desk.tiers.writer.num_cut == 8
    desk.turn(talk(2, 8 * BLOCK))
    assert desk.moves.stats[WRITE].num_moves == 2, "nothing more is written"
    desk.forget_device()
    assert extension_of(desk, history).on_host(0) == 8, "host memory serves on"


def test_a_bug_in_a_read_is_not_taken_for_a_broken_disk(desk, monkeypatch):
    history = only_on_disk(desk, 4)
    monkeypatch.setattr(desk.store, "read", lambda *arguments: 1 / 0)
    desk.tiers.stage(extension_of(desk, history), 0)
    assert desk.lanes.run_one(READ)
    with pytest.raises(DeviceError, match="ZeroDivisionError"):
        desk.tiers.poll(0.0)


def test_a_bug_in_a_write_is_not_taken_for_a_broken_disk(desk, monkeypatch):
    monkeypatch.setattr(desk.store, "write", lambda *arguments: 1 / 0)
    with pytest.raises(DeviceError, match="ZeroDivisionError"):
        desk.turn(talk(1, 9))


def lose(*arguments):
    raise RuntimeError("device lost")


def test_a_save_that_fails_is_raised_with_its_reason(desk, monkeypatch):
    monkeypatch.setattr(desk.memory, "save", lose)
    with pytest.raises(DeviceError, match="RuntimeError: device lost"):
        desk.turn(talk(1, 9))


def test_a_load_that_fails_is_raised_and_so_it_is_to_the_step_that_waits_for_it(desk, monkeypatch):
    history = talk(1, 9)
    desk.turn(history)
    desk.forget_device()
    monkeypatch.setattr(desk.memory, "load_layer", lose)
    path = desk.tiers.load(desk.kv.lookup(history.array, "").block_ids, extension_of(desk, history), 0)
    ticket = desk.lanes.performer.board[desk.kv.open_tickets(path)[0]]
    desk.lanes.run_lane(LOAD)
    with pytest.raises(DeviceError):
        ticket.wait(0)
    with pytest.raises(DeviceError, match="RuntimeError: device lost"):
        desk.tiers.poll(0.0)


def test_a_block_that_the_disk_cannot_read_is_broken(desk):
    """It is forgotten with all that follows it, and written anew when somebody has computed it."""
    history = only_on_disk(desk, 6)
    failpoints.arm("disk.read", "EIO", 6)  # two reads a block: the third block
    stage = desk.tiers.stage(extension_of(desk, history), 0)
    desk.settle()
    assert stage.is_done and stage.num_read == 2
    assert len(desk.tiers.host) == len(desk.tiers.disk) == 2
    failpoints.disarm()
    desk.turn(history)
    assert len(desk.tiers.disk) == 6
    desk.forget_device()
    desk.forget_host()
    again = desk.tiers.stage(extension_of(desk, history), 0)
    desk.settle()
    assert again.num_read == 6


def test_a_sync_that_fails_at_the_end_is_told_and_does_not_raise(desk, caplog):
    desk.turn(talk(1, 9))
    failpoints.arm("disk.sync", "EIO")
    desk.tiers.close(1.0)
    assert "could not be synced" in caplog.text and "Input/output error" in caplog.text
    assert desk.lanes.closed and not desk.disk_errors


def test_what_is_flushed_at_the_end_is_on_disk_before_the_store_is_closed(desk):
    """Nothing has moved yet when the engine stops: it all goes down, and only then the lanes and the store close."""
    desk.turn(talk(1, 8 * BLOCK + 1), drain=False)
    order = []
    failpoints.arm("tier.flush", lambda: order.append("flush"))
    failpoints.arm("tier.published", lambda: order.append("published"))
    failpoints.arm("disk.sync", lambda: order.append("closed"))
    desk.tiers.close(30.0)
    assert order[0] == "flush" and set(order) == {"flush", "published", "closed"}
    assert order.index("closed") > max(i for i, what in enumerate(order) if what == "published")
    assert len(desk.tiers.disk) == 8


def test_a_swap_goes_before_what_is_being_saved(desk):
    """Between two chunks; the path that was overtaken is written on afterwards."""
    first = talk(1, 8 * BLOCK)
    desk.turn(first, drain=False)
    other = talk(2, 6 * BLOCK)
    row = desk.begin(other)
    desk.kv.leave(row, desk.step - 1, used=False, swap=True)
    places = {block: place for path in (first, other) for place, block in
              enumerate(desk.kv.lookup(np.append(path.array, 0), "").block_ids.tolist())}
    saved = []
    while desk.lanes.queued(SAVE):
        move = desk.lanes.queued(SAVE)[0]
        saved.append((move.priority, places[int(move.sources[0])]))
        run(desk, SAVE)
    assert saved == [(1, 0), (1, 2), (0, 0), (0, 2), (0, 4), (1, 4), (1, 6)]
    desk.settle()
    assert len(desk.tiers.host) == 14 and not desk.kv.pool._leases


def test_a_swap_whose_lease_expires_keeps_only_what_is_in_flight(desk):
    """The lane is stuck: what is not in flight goes to others, what is stays until its copy is over, and is right."""
    history = talk(1, 6 * BLOCK)
    desk.kv.leave(desk.begin(history), desk.step - 1, used=False, swap=True)
    in_flight = [block for move in desk.lanes.queued(SAVE) for block in move.sources.tolist()]
    assert len(in_flight) == 4, "two moves of two blocks"
    desk.advance_to(SWAP_LEASE_S - 0.1)
    assert desk.kv.num_free_blocks == 64 - 6
    desk.advance_to(SWAP_LEASE_S)
    assert desk.kv.num_free_blocks == 64 - 4 and not desk.kv.pool._leases
    desk.turn(talk(2, 60 * BLOCK), drain=False)
    assert desk.kv.num_free_blocks == 60, "everything but what the copies read was needed, and is free again"
    assert desk.kv.lookup(np.append(history.array, 0), "").block_ids.tolist() == in_flight
    desk.settle()
    assert desk.tiers.saver.num_cut == 2 and len(desk.tiers.host) == 4 + 60
    path = desk.tiers.slot_of_block[in_flight]
    assert desk.memory.host[path].ravel().tolist() == history.values[: 4 * BLOCK]
    assert desk.kv.num_free_blocks == 64


def test_a_load_under_way_is_waited_for_not_repeated(desk):
    history = talk(1, 6 * BLOCK + 1)
    desk.turn(history)
    desk.forget_device()
    match = desk.kv.lookup(history.array, "")
    path = desk.tiers.load(match.block_ids, extension_of(desk, history), 0)
    assert len(desk.kv.lookup(history.array, "").block_ids) == 6, "findable at once"
    assert len(desk.kv.open_tickets(path)) == 1
    assert extension_of(desk, history) is not None and extension_of(desk, history).on_host(6) == 0
    run(desk, LOAD)
    assert desk.kv.open_tickets(path) == ()
    assert desk.turn(history) == 6 * BLOCK


def test_the_audit_finds_a_link_to_other_contents(desk):
    desk.turn(talk(1, 9))
    desk.tiers.disk_of_slot[:2] = desk.tiers.disk_of_slot[:2][::-1].copy()
    with pytest.raises((AssertionError, IntegrityError)):
        desk.tiers.check_integrity()
