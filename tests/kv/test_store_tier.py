"""The shared store below host memory: what one engine has computed another finds, and nothing waits for a store that is
away."""

from __future__ import annotations

import shutil
import threading
import time

import numpy as np
import pytest

from tests.kv.desk import BLOCK, Desk, later, open_disk, open_shared, talk
from tests.kv.disk_helper import armed, flip
from xllm.kv import lanes, shared_follower
from xllm.kv.block import block_digests
from xllm.kv.moves import FETCH, PUT, READ, STORE_LANES, Move
from xllm.kv.store_tier import MAX_HELD_SHARE, RETRY_S, STUCK_S


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shared").mkdir(mode=0o700)
    return tmp_path / "shared"


def desk(folder, **settings) -> Desk:
    return Desk(shared=open_shared(folder), **settings)


def files(folder):
    return sorted(folder.glob("*/*/*.kv"))


def test_another_engine_finds_what_one_has_computed(folder):
    one, other = desk(folder), desk(folder)
    history = talk(1)
    one.turn(history)
    assert other.num_promoted_of(history) == 6
    other.turn(later(history, 1))
    assert other.num_found == 12
    assert one.tiers.store.num_written == 6 == other.tiers.stager.num_staged and other.tiers.store.num_written == 0


def test_what_is_there_is_not_added_again(folder):
    one, other = desk(folder), desk(folder)
    history = talk(1)
    one.turn(history)
    one.turn(history)
    other.view.look()
    other.turn(history)
    longer = later(history, 4)
    other.turn(longer)
    assert (one.tiers.store.num_written, other.tiers.store.num_written) == (6, 2)
    one.forget_device()
    one.forget_host()
    assert one.num_promoted_of(longer) == 8


@pytest.mark.parametrize("num_on_disk", [0, 4, 6, 8])
def test_a_path_over_host_memory_disk_and_store(tmp_path, folder, num_on_disk):
    """Host memory has two blocks of it, disk more or none, the store all."""
    history = talk(2, 16)
    writer = desk(folder)
    writer.turn(history)
    with_disk = {"disk": open_disk(tmp_path / "disk")} if num_on_disk else {}
    reader = Desk(**with_disk, shared=open_shared(folder))
    if num_on_disk:
        reader.turn(history.prefix(num_on_disk * BLOCK))
        reader.forget_device()
        reader.forget_host()
    reader.turn(history.prefix(2 * BLOCK))
    reader.forget_device()
    reader.view.look()
    match = reader.kv.lookup(later(history, 1).array, "")
    extension = reader.tiers.extend(match, later(history, 1).array)
    assert len(extension.host_path) == 2 and extension.num_blocks == 8
    assert len(extension.disk_path) == (num_on_disk if num_on_disk > 2 else 0)
    assert reader.num_promoted_of(history) == 8
    moved = {lane: reader.moves.stats[lane].num_bytes // reader.moves.payload_bytes for lane in (READ, FETCH)}
    assert moved == {READ: max(0, num_on_disk - 2), FETCH: 8 - max(2, num_on_disk)}
    reader.turn(later(history, 1))  # the bytes are checked


def test_what_is_only_on_the_device_comes_from_the_store_too(folder):
    history = talk(3)
    writer, reader = desk(folder), desk(folder)
    writer.turn(history)
    row = reader.begin(history.prefix(3 * BLOCK))  # it runs, so nothing of it is in host memory yet
    assert not len(reader.tiers.host)
    assert reader.num_promoted_of(history) == 6
    reader.kv.leave(row, reader.step - 1)
    reader.settle()


def test_without_the_beginning_in_the_store_nothing_is_found(folder):
    history = talk(3)
    writer, reader = desk(folder), desk(folder)
    writer.turn(history)
    files(folder)[0].unlink()  # the first two blocks
    assert reader.num_promoted_of(history) == 0
    reader.turn(history.prefix(2 * BLOCK))
    assert reader.num_promoted_of(history) == 6  # it has the beginning itself now
    writer.view.look()
    writer.forget_device()
    writer.turn(history)  # host memory had it, and the store has it again
    third = desk(folder)
    assert third.num_promoted_of(history) == 6


def test_a_path_that_host_memory_does_not_hold_is_lifted(folder):
    history = talk(4, 40)
    writer = desk(folder, num_host_slots=64)
    writer.turn(history)
    reader = desk(folder, num_host_slots=6)
    reader.view.look()
    longer = later(history, 1)
    match = reader.kv.lookup(longer.array, "")
    lift = reader.tiers.lift(match.block_ids, reader.tiers.extend(match, longer.array), 0)
    reader.settle()
    assert lift.is_done and (lift.num_fetched, lift.num_read) == (20, 0)
    assert len(reader.kv.lookup(longer.array, "").block_ids) == 20
    reader.turn(longer)


def test_a_broken_block_ends_what_is_found(folder):
    history = talk(5)
    writer, reader = desk(folder), desk(folder)
    writer.turn(history)
    reader.view.look()
    flip(files(folder)[1], writer.shared._writer.geometry.payload_offset(1) + 3)  # the fourth block
    assert reader.num_promoted_of(history) == 3
    assert reader.tiers.stats({}).kv_tiers["store"].unsaved_total == 0
    assert reader.shared.counters.misses["corrupt"] == 1 and not reader.said
    reader.turn(history)
    assert reader.tiers.store.num_written == 1  # the broken one, anew
    third = desk(folder)
    third.view.look()
    third.shared.refresh()
    found = [third.view.has(digest) for digest in block_digests(history.array, BLOCK)]
    assert all(found)


def test_salts_share_nothing(folder):
    writer, reader = desk(folder), desk(folder)
    history = talk(6)
    writer.turn(history)
    assert reader.num_promoted_of(talk(6, salt="other")) == 0 and reader.num_promoted_of(history) == 6


def test_a_store_that_refuses_is_tried_again_later(folder):
    one = desk(folder)
    with armed("disk.write", "ENOSPC"):
        one.turn(talk(1))
        one.turn(talk(2))
    assert len(one.said) == 1 and "takes no blocks" in one.said[0] and "No space" in one.said[0]
    assert one.tiers.store.num_cut == 12 and not one.tiers.store.is_up
    assert one.tiers.host.num_held == 0 and not one.disk_errors
    one.turn(talk(3))
    assert one.tiers.store.num_cut == 18
    one.advance_to(RETRY_S)
    one.turn(talk(3))
    assert one.tiers.store.num_written == 6 and one.tiers.store.is_up
    assert one.said[1:] == ["the shared KV store takes blocks again"]


def test_a_read_that_hangs_makes_the_store_count_as_away(folder):
    writer, reader = desk(folder), desk(folder)
    first, second = talk(1), talk(2)
    writer.turn(first)
    writer.turn(second)
    reader.view.look()
    match = reader.kv.lookup(later(first, 1).array, "")
    reader.tiers.stage(reader.tiers.extend(match, later(first, 1).array), 0)
    reader.advance_to(1.0)
    reader.advance_to(0.5 + STUCK_S)
    assert reader.tiers.can_stage and reader.tiers.stats({}).kv_store_up
    reader.advance_to(1.1 + STUCK_S)
    assert not reader.tiers.can_stage and not reader.tiers.stats({}).kv_store_up and len(reader.said) == 1
    other = later(second, 1).array
    assert reader.tiers.extend(reader.kv.lookup(other, ""), other).num_blocks == 0
    reader.lanes.drain(reader.moves)  # it was slow
    reader.advance_to(2.0 + STUCK_S)
    assert reader.tiers.can_stage and reader.said[1] == "the shared KV store is back"
    assert reader.num_promoted_of(first) == reader.num_promoted_of(second) == 6


def test_a_store_that_is_away(folder):
    writer, reader = desk(folder), desk(folder)
    writer.turn(talk(1))
    reader.view.look()
    reader.view.trouble = "Stale file handle"
    reader.advance_to(1.0)
    assert reader.num_promoted_of(talk(1)) == 0 and "Stale file handle" in reader.said[0]
    reader.turn(talk(2))
    assert reader.tiers.store.num_written == 0 and reader.tiers.store.num_cut == 6
    reader.view.trouble = None
    reader.advance_to(2.0)
    assert reader.num_promoted_of(talk(1)) == 6 and len(reader.said) == 2


def test_a_folder_that_is_removed(folder):
    one = desk(folder)
    one.turn(talk(1))
    shutil.rmtree(folder)
    one.forget_device()
    one.forget_host()
    extension = one.tiers.extend(one.kv.lookup(talk(1, 13).array, ""), talk(1, 13).array)
    assert extension.num_blocks == 6  # it has not looked since
    one.tiers.stage(extension, 0)
    one.settle()
    assert not len(one.tiers.host) and not any(one.shared.counters.misses.values())
    one.turn(talk(1))
    assert one.tiers.store.num_written == 12
    assert desk(folder).num_promoted_of(talk(1)) == 6


def test_copies_that_hang_hold_half_of_host_memory_at_most(folder):
    one = desk(folder, num_host_slots=20)
    for number in range(4):
        one.begin(talk(number, 16))
        one.kv.leave(0, one.step - 1)
        for lane in one.lanes._queues:
            while lane != PUT and one.lanes.run_one(lane):
                one.moves.poll()
    assert one.tiers.store._num_held <= MAX_HELD_SHARE * 20 and one.tiers.host.num_available >= 10
    assert one.tiers.store.num_cut > 0
    one.settle()
    assert one.tiers.host.num_held == 0 and one.tiers.store.is_idle and not one.tiers.store._coming


@pytest.mark.parametrize("lane", STORE_LANES)
def test_the_end_does_not_wait_for_a_move_that_hangs(folder, monkeypatch, lane):
    one = desk(folder)
    one.turn(talk(1))
    monkeypatch.setattr(lanes, "STORE_CLOSE_S", 0.05)
    hangs, goes_on, done = threading.Event(), threading.Event(), []
    threads = lanes.ThreadLanes(one.lanes.performer, done.append)
    slots, digests = np.arange(2, dtype=np.int32), block_digests(talk(9, 4).array, BLOCK)
    if lane == FETCH:
        digests = block_digests(talk(1).array, BLOCK)[:2]
    with armed("store.payloads_written" if lane == PUT else "store.list",
               lambda: (hangs.set(), goes_on.wait(20.0))):
        threads.send(Move(number=1, lane=lane, priority=1, num_bytes=32, sources=slots, targets=slots.copy(),
                          digests=tuple(digests), parents=(bytes(16), digests[0])))
        assert hangs.wait(20.0)
        threads.close()
        assert not done
    goes_on.set()
    [thread] = [thread for thread in threading.enumerate() if thread.name == f"xllm-kv-{lane}"]
    thread.join(20.0)
    assert not thread.is_alive() and done[0].num_done == 2, "it came back, and nothing is broken"


def test_a_look_that_hangs_stops_nobody(folder, monkeypatch):
    writer = desk(folder)
    writer.turn(talk(1))
    digest = block_digests(talk(1).array, BLOCK)[0]
    follower = shared_follower.SharedFollower(open_shared(folder), refresh_s=0.001)
    assert follower.has(digest) and len(follower) == 6 and follower.trouble is None
    hangs, goes_on = threading.Event(), threading.Event()
    with armed("store.list", lambda: (hangs.set(), goes_on.wait(20.0))):
        assert hangs.wait(20.0)
        assert follower.has(digest) and follower.trouble is None
        monkeypatch.setattr(shared_follower, "STALE_S", 0.0)
        assert "has not answered for" in follower.trouble
    goes_on.set()
    follower.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "xllm-kv-store-follow"]


def test_a_look_that_fails_is_told_until_one_does_not(folder):
    with armed("store.list", "EIO"):
        follower = shared_follower.SharedFollower(open_shared(folder), refresh_s=0.001)
        assert "Input/output error" in follower.trouble and not len(follower)
    looked = time.monotonic() + 20.0
    while follower.trouble is not None and time.monotonic() < looked:
        time.sleep(0.001)
    assert follower.trouble is None
    follower.close()


def test_one_that_only_reads_adds_nothing(folder):
    writer = desk(folder)
    writer.turn(talk(1))
    reader = Desk(shared=open_shared(folder, num_blocks=0))
    assert reader.num_promoted_of(talk(1)) == 6
    reader.turn(talk(2))
    assert reader.moves.stats[PUT].num_moves == 0 and reader.tiers.store.num_cut == 0


def test_the_end_flushes_what_is_on_the_device(folder):
    one = desk(folder)
    row = one.begin(talk(1))
    one.kv.leave(row, one.step - 1)
    one.kv.close(5.0)
    assert one.view.is_closed and desk(folder).num_promoted_of(talk(1)) == 6


@pytest.mark.parametrize("seed", range(4))
def test_engines_that_share_a_store_agree(tmp_path, folder, seed):
    """Three engines, one of them with a disk, at random: what is loaded is always what was computed (`Desk.begin`
    checks every value), and nothing stays held."""
    draw = np.random.default_rng(seed)
    desks = [desk(folder, num_blocks=24, num_host_slots=12), desk(folder),
             Desk(num_host_slots=16, disk=open_disk(tmp_path / "disk", 24), shared=open_shared(folder, 40))]
    for _ in range(60):
        one, history = desks[draw.integers(3)], talk(int(draw.integers(5)), 2 * int(draw.integers(2, 12)))
        what = draw.integers(6)
        if what == 0:
            one.forget_device()
        elif what == 1:
            one.forget_host()
        elif what == 2 and (found := files(folder)):
            flip(found[draw.integers(len(found))], int(draw.integers(9000, 12000)))
        else:
            if what > 3:
                one.num_promoted_of(history)
            one.turn(history)
    for one in desks:
        one.settle()
        assert one.tiers.host.num_held == 0 and one.tiers.store.is_idle
    assert sum(one.tiers.stager.num_staged for one in desks) > 20
