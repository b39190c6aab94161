"""A sequence of any length beside host memory of any size: all of it reaches the disk, and the next life finds it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kv.desk import BLOCK, Desk, open_disk, talk
from xllm.kv import failpoints
from xllm.kv import lift as lift_module
from xllm.kv.moves import LOAD, READ, SAVE, WRITE

RATIOS = [0.3, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0]
HOSTS = [1, 2, 7, 20]
DISK = 1500


def blocks(ratio: float, num_host_slots: int) -> int:
    return max(1, round(ratio * num_host_slots))


@pytest.fixture
def open_desk(tmp_path):
    """Desks on one disk, one after the other."""
    opened = []

    def make(num_host_slots: int, num_blocks: int = 600) -> Desk:
        if opened:
            opened[-1].store.close()
        opened.append(Desk(num_blocks, num_host_slots, open_disk(tmp_path, DISK)))
        return opened[-1]

    yield make
    opened[-1].store.close()


def on_disk(desk: Desk, history) -> int:
    """How many of its blocks a life that has nothing but the disk would find, and that they are right."""
    match = desk.kv.lookup(history.array, history.salt)
    assert not len(match.block_ids)
    path = desk.tiers.extend(match, np.append(history.array, 0)).disk_path
    out = bytearray(desk.memory.payload_bytes)
    for number, slot in enumerate(path.tolist()):
        assert desk.store.read(slot, desk.tiers.disk.digest_of(slot), memoryview(out))
        values = np.frombuffer(bytes(out), dtype=np.uint64).tolist()
        assert values == history.values[number * BLOCK : (number + 1) * BLOCK]
    return len(path)


def check_at_rest(desk: Desk) -> None:
    tiers = desk.tiers
    assert tiers.host.num_held == tiers.disk.num_held == 0 and not len(tiers.moves)
    assert tiers.saver.is_idle and tiers.writer.is_idle and tiers.passage.is_idle
    assert not desk.kv.pool._leases and not desk.kv.pool._num_guards.any()
    desk.kv.check_integrity()


@pytest.mark.parametrize("num_host_slots", HOSTS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_all_of_it_is_on_disk_and_found_again(open_desk, ratio, num_host_slots):
    num = blocks(ratio, num_host_slots)
    history = talk(1, num * BLOCK)
    desk = open_desk(num_host_slots)
    desk.turn(history)
    check_at_rest(desk)
    assert len(desk.tiers.disk) == num
    tiers = desk.tiers.stats({}).kv_tiers
    assert tiers["host"].unsaved_total == tiers["device"].unsaved_total == 0
    assert len(desk.tiers.host) == min(num, num_host_slots) or num > num_host_slots
    desk.turn(history)
    assert desk.moves.stats[WRITE].num_bytes == num * desk.memory.payload_bytes, "written once"
    assert on_disk(open_desk(num_host_slots), history) == num


@pytest.mark.parametrize("num_host_slots", HOSTS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_next_life_brings_all_of_it_to_the_device(open_desk, ratio, num_host_slots):
    """What host memory has room for by way of it, the rest past it."""
    num = blocks(ratio, num_host_slots)
    history, longer = talk(1, num * BLOCK), talk(1, num * BLOCK)
    longer.extend([5, 6, 7])
    open_desk(num_host_slots).turn(history)
    desk = open_desk(num_host_slots)
    assert desk.num_promoted(longer) == min(num, num_host_slots)
    if num > num_host_slots:
        match = desk.kv.lookup(longer.array, "")
        lift = desk.tiers.lift(match.block_ids, desk.tiers.extend(match, longer.array), 0)
        desk.settle()
        assert lift.is_done and lift.num_read == num - num_host_slots
    check_at_rest(desk)
    assert desk.turn(longer) == num * BLOCK, "found on the device, and right"
    check_at_rest(desk)


def test_what_a_lift_needs_is_computed_or_damaged_meanwhile(open_desk):
    """It goes on behind what is there, and ends where the disk is broken."""
    history = talk(1, 60 * BLOCK)
    open_desk(5).turn(history)
    for what in ("computed", "damaged", "no room"):
        desk = open_desk(5, num_blocks=100 if what != "no room" else 20)
        assert desk.num_promoted(history.prefix(61 * BLOCK)) == 5
        match = desk.kv.lookup(history.array, "")
        extension = desk.tiers.extend(match, np.append(history.array, 0))
        lift = desk.tiers.lift(match.block_ids, extension, 0)
        for _ in range(2):
            desk.lanes.run_lane(READ)
            desk.advance_to(desk.now)
            desk.lanes.run_lane(LOAD)
            desk.advance_to(desk.now)
        assert 5 < len(lift.path) < 60
        if what == "computed":
            desk.turn(history.prefix(30 * BLOCK), drain=False)
        elif what == "damaged":
            desk.tiers.disk.drop(int(extension.disk_path[40]))
            desk.store.erase(int(extension.disk_path[40]))
        desk.settle()
        assert lift.is_done and len(lift.path) == {"computed": 60, "damaged": 40, "no room": 20}[what]
        check_at_rest(desk)
        found = desk.kv.lookup(np.append(history.array, 0), "").block_ids
        assert found.tolist() == lift.path.tolist()
        values = desk.memory.device[found].ravel().tolist()
        assert values == history.values[: len(values)]


def test_what_a_lift_brought_and_others_took_is_not_kept(open_desk):
    """It has let go of its blocks; until somebody holds them they may be given to others, with other contents."""
    history, other = talk(1, 12 * BLOCK), talk(2, 8 * BLOCK)
    open_desk(2).turn(history)
    desk = open_desk(2, num_blocks=16)
    assert desk.num_promoted(history.prefix(12 * BLOCK + 1)) == 2
    match = desk.kv.lookup(history.array, "")
    lift = desk.tiers.lift(match.block_ids, desk.tiers.extend(match, np.append(history.array, 0)), 0)
    desk.settle()
    assert lift.is_done and desk.kv.lifted(lift).tolist() == lift.path.tolist()
    desk.turn(other)  # takes the last of them
    kept = desk.kv.lifted(lift)
    assert 0 < len(kept) < len(lift.path)
    assert kept.tolist() == desk.kv.lookup(np.append(history.array, 0), "").block_ids.tolist()
    desk.kv.hold(7, kept)
    desk.kv.let_go(7)
    check_at_rest(desk)


def test_blocks_that_are_still_loading_are_not_copied_down(open_desk, monkeypatch):
    """They are findable before their contents have come: a copy waits for these."""
    history = talk(1, 60 * BLOCK)
    open_desk(5).turn(history)
    monkeypatch.setattr(lift_module, "CHUNK_BLOCKS", 2)
    desk = open_desk(5)
    match = desk.kv.lookup(history.array, "")
    lift = desk.tiers.lift(match.block_ids, desk.tiers.extend(match, np.append(history.array, 0)), 0)
    desk.lanes.run_lane(READ)
    desk.advance_to(desk.now)
    assert len(lift.path) == 2 and desk.tiers.open_tickets(lift.path)
    desk.tiers.begin_flush()
    desk.lanes.run_lane(SAVE)
    desk.advance_to(desk.now)
    for digest, slot in desk.tiers.host._slot_of.items():
        number = [desk.kv._index.digest_of(block) for block in lift.path.tolist()].index(digest)
        assert desk.memory.host[slot].tolist() == history.values[number * BLOCK : (number + 1) * BLOCK]
    desk.settle()
    check_at_rest(desk)
    assert lift.is_done and len(lift.path) == 60
    assert desk.tiers.saver.num_cut == desk.tiers.passage.num_cut == 0


@pytest.mark.parametrize("num_host_slots", HOSTS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_several_at_once(open_desk, ratio, num_host_slots):
    """They end while nothing has been copied yet, one of them with the beginning of another."""
    num = blocks(ratio, num_host_slots)
    histories = [talk(number, num * BLOCK) for number in range(4)]
    longer = histories[0].prefix(num * BLOCK)
    longer.extend([7] * (3 * BLOCK))
    desk = open_desk(num_host_slots)
    for history in [*histories, longer]:
        desk.turn(history, drain=False)
    desk.settle()
    check_at_rest(desk)
    assert len(desk.tiers.disk) == 4 * num + 3
    desk = open_desk(num_host_slots)
    assert [on_disk(desk, history) for history in [*histories, longer]] == [num] * 4 + [num + 3]


@pytest.mark.parametrize("num_host_slots", HOSTS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_a_swap_among_others(open_desk, ratio, num_host_slots):
    num = blocks(ratio, num_host_slots)
    first, swapped = talk(1, num * BLOCK), talk(2, num * BLOCK)
    desk = open_desk(num_host_slots)
    desk.turn(first, drain=False)
    desk.lanes.run_one(SAVE)
    desk.kv.leave(desk.begin(swapped), desk.step - 1, used=False, swap=True)
    desk.settle()
    check_at_rest(desk)
    assert len(desk.tiers.disk) == 2 * num
    desk = open_desk(num_host_slots)
    assert on_disk(desk, first) == on_disk(desk, swapped) == num


@pytest.mark.parametrize("num_host_slots", HOSTS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("way", ["idle", "close"])
def test_what_the_device_has_goes_down_later(open_desk, ratio, num_host_slots, way):
    """Host memory and disk have lost it, or never had it: idle demotion and the end of a life bring it down."""
    num = blocks(ratio, num_host_slots)
    histories = [talk(number, num * BLOCK) for number in range(3)]
    desk = open_desk(num_host_slots)
    released, desk.tiers.released = desk.tiers.released, lambda path, *, swap: None
    for history in histories:
        desk.turn(history)
    desk.tiers.released = released
    assert len(desk.tiers.disk) == 0
    if way == "idle":
        desk.tiers.begin_flush()
        desk.settle()
        check_at_rest(desk)
    else:
        desk.tiers.close(60.0)
    desk = open_desk(num_host_slots)
    assert [on_disk(desk, history) for history in histories] == [num] * 3


@pytest.mark.parametrize("num_disk_slots", [1, 5, 12, 30])
@pytest.mark.parametrize("num_blocks", [3, 15, 40])
def test_a_disk_that_is_smaller(tmp_path, num_blocks, num_disk_slots):
    """It holds a beginning, as long as there is room."""
    history, store = talk(1, num_blocks * BLOCK), open_disk(tmp_path, num_disk_slots)
    desk = Desk(100, 10, store)
    desk.turn(history)
    check_at_rest(desk)
    desk.forget_device()
    desk.forget_host()
    assert on_disk(desk, history) == min(num_blocks, num_disk_slots)
    store.close()


@pytest.mark.parametrize("point", ["tier.write_before", "disk.write", "tier.written"])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_disk_that_fails_on_the_way(open_desk, point, number):
    """Host memory serves on, and nothing stays held."""
    desk = open_desk(7)
    history = talk(1, 35 * BLOCK)
    failpoints.arm(point, "EIO", number)
    try:
        desk.turn(history)
    finally:
        failpoints.disarm()
    check_at_rest(desk)
    assert desk.tiers.writer.disabled and len(desk.disk_errors) == 1
    desk.turn(talk(2, 35 * BLOCK))
    check_at_rest(desk)
    assert len(desk.tiers.host) == 7


def test_blocks_that_the_device_gives_up_on_the_way(open_desk):
    """What follows them is not written either, and is counted."""
    desk = open_desk(7)
    desk.turn(talk(1, 35 * BLOCK), drain=False)
    while len(desk.tiers.disk) < 10:
        for lane in (SAVE, WRITE):
            desk.lanes.run_one(lane)
        desk.advance_to(desk.now)
    assert not desk.tiers.passage.is_idle
    desk.kv.pool.drop_cached()
    desk.settle()
    check_at_rest(desk)
    written = len(desk.tiers.disk)
    assert 10 <= written < 35 and desk.tiers.passage.num_cut == 35 - written


def test_host_memory_goes_first_where_disk_is_too_slow(open_desk):
    """While disk takes nothing, sequences go on to reach host memory once the device has much that waits."""
    desk = open_desk(20, num_blocks=60)
    for number in range(6):
        desk.turn(talk(number, 10 * BLOCK), drain=False)
        for _ in range(20):
            desk.lanes.run_lane(SAVE)
            desk.advance_to(desk.now)
    assert desk.moves.stats[WRITE].num_moves == 0
    assert desk.moves.stats[SAVE].num_bytes >= 20 * desk.memory.payload_bytes
    desk.settle()
    check_at_rest(desk)
