"""The disk store on damaged files, and on files that are not its own."""

import os
import shutil

import pytest

from tests.kv.disk_helper import (
    FINGERPRINT,
    GEOMETRY,
    NO_PARENT,
    NUM_SLOTS,
    PAYLOAD_BYTES,
    assert_usable,
    digest_of,
    flip,
    holds,
    listed,
    open_store,
    segments,
    served,
    write,
)
from xllm.kv.disk import DiskStore
from xllm.kv.disk_format import HEADER_BYTES

# --- damage



@pytest.mark.parametrize("offset", [0, 8, 12, 16, 47, 48, 56, 64, 72, 75])
def test_a_flipped_superblock_is_left_alone(filled, offset):
    first = segments(filled)[0]
    flip(first, offset)
    damaged = first.read_bytes()
    store = open_store(filled)
    assert served(store) == {2, 3, 4} == set(listed(store))
    assert store.counters.num_ignored_files == 1
    store.close()
    assert_usable(filled)
    assert first.read_bytes() == damaged


@pytest.mark.parametrize("offset", range(HEADER_BYTES))
def test_a_flipped_header_is_a_miss(filled, offset):
    flip(segments(filled)[0], GEOMETRY.header_offset(1) + offset)
    store = open_store(filled)
    entries = store.scan()
    assert (entries.num_corrupt, entries.num_torn, entries.num_foreign) == (1, 0, 0)
    assert set(listed(store)) == served(store) == {0, 2, 3, 4}
    assert store.counters.misses == {"torn": 0, "corrupt": 1, "foreign": 0, "wrong_digest": 0, "forged": 0}
    store.close()


@pytest.mark.parametrize("offset", [0, 1, 2999, PAYLOAD_BYTES - 1])
def test_a_flipped_payload_is_a_miss(filled, offset):
    flip(segments(filled)[0], GEOMETRY.payload_offset(1) + offset)
    store = open_store(filled)
    assert len(store.scan()) == NUM_SLOTS
    assert served(store) == {0, 2, 3, 4}
    assert store.counters.misses == {"torn": 0, "corrupt": 1, "foreign": 0, "wrong_digest": 0, "forged": 0}
    store.close()
    assert_usable(filled)


LENGTHS = {  # bytes: the slots of the first segment that remain
    0: set(), 100: set(), 4095: set(), 4096: set(), 4096 + 64: set(), 4096 + 200: set(), 8191: set(), 8192: set(),
    8192 + 5000: set(), 16384: {0}, 16384 + 5999: {0}, 24576: {0, 1},
}  # fmt: skip


@pytest.mark.parametrize("length", LENGTHS)
def test_a_truncated_segment_serves_what_is_left(filled, length):
    os.truncate(segments(filled)[0], length)
    store = open_store(filled)
    remaining = LENGTHS[length] | {2, 3, 4}
    assert served(store) == remaining == set(listed(store))
    assert store.counters.misses["torn"] == NUM_SLOTS - len(remaining)
    assert store.counters.num_ignored_files == (length < 4096)
    for slot in sorted({0, 1} - remaining)[:1]:  # writing makes it whole again, and brings back no old header
        write(store, slot, 30)
        remaining = remaining | {slot}
    assert set(listed(store)) == remaining
    store.close()
    store = open_store(filled)
    assert set(listed(store)) == remaining
    store.close()
    assert_usable(filled)


def test_a_segment_truncated_under_an_open_store_is_a_miss(filled):
    store = open_store(filled)
    os.truncate(segments(filled)[0], 9000)
    assert served(store) == {2, 3, 4}
    store.close()


def copy_bytes(source, start: int, target, offset: int, size: int) -> None:
    data = source.read_bytes()[start : start + size]
    with open(target, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_swapped_payloads_are_misses(filled):
    first, second, _ = segments(filled)
    here, there = GEOMETRY.payload_offset(0), GEOMETRY.payload_offset(1)
    copy = shutil.copy(first, filled / "copy")
    copy_bytes(second, there, first, here, 8192)
    copy_bytes(filled / "copy", here, second, there, 8192)
    assert copy.exists()
    store = open_store(filled)
    assert served(store) == {1, 2, 4}
    assert store.counters.misses["corrupt"] == 2
    store.close()


def test_a_block_copied_to_another_slot_is_foreign(filled):
    first = segments(filled)[0]
    copy_bytes(first, GEOMETRY.header_offset(0), first, GEOMETRY.header_offset(1), HEADER_BYTES)
    copy_bytes(first, GEOMETRY.payload_offset(0), first, GEOMETRY.payload_offset(1), 8192)
    store = open_store(filled)
    assert not holds(store, 1, 0)
    assert store.counters.misses["foreign"] == 1 and store.scan().num_foreign == 1
    assert set(listed(store)) == {0, 2, 3, 4}
    store.close()


# --- foreign files


def test_two_fingerprints_share_a_folder(filled):
    other = open_store(filled, fingerprint=bytes(32))
    assert listed(other) == {}
    write(other, 0, 60)
    other.close()
    store = open_store(filled)
    assert served(store) == set(range(NUM_SLOTS))
    store.close()


def test_a_segment_of_another_fingerprint_is_left_alone(filled):
    similar = FINGERPRINT[:8] + bytes(24)  # it has the same folder name, and so the same folder
    store = open_store(filled, fingerprint=similar)
    assert listed(store) == {} and store.counters.num_ignored_files == 3
    write(store, 0, 60)
    assert holds(store, 0, 60)
    store.close()
    store = open_store(filled)
    assert served(store) == set(range(NUM_SLOTS)) and store.counters.num_ignored_files == 1
    store.close()


def test_a_header_table_of_another_fingerprint_is_foreign(filled):
    other = open_store(filled / "other", fingerprint=bytes(32))
    write(other, 0, 0)
    other.close()
    (path,) = (filled / "other").rglob("*.kv")
    copy_bytes(path, 4096, segments(filled)[0], 4096, 4096)
    store = open_store(filled)
    assert store.scan().num_foreign == 1
    assert served(store) == {2, 3, 4}
    assert store.counters.misses == {"torn": 1, "corrupt": 0, "foreign": 1, "wrong_digest": 0, "forged": 0}
    store.close()


@pytest.mark.parametrize("payload_bytes", [4096, 6001, 20_000])
def test_segments_of_another_geometry_are_left_alone(filled, payload_bytes):
    store = DiskStore(filled, fingerprint=FINGERPRINT, payload_bytes=payload_bytes, capacity_bytes=4 << 20)
    assert len(store.scan()) == 0 and store.counters.num_ignored_files == 3
    store.write(0, digest_of(0), NO_PARENT, bytes(payload_bytes))
    store.close()
    store = open_store(filled)
    assert served(store) == set(range(NUM_SLOTS))
    store.close()


def test_a_copy_of_a_segment_is_left_alone(filled):
    first = segments(filled)[0]
    shutil.copy(first, first.with_name("zz.kv"))
    store = open_store(filled)
    assert served(store) == set(range(NUM_SLOTS)) and store.counters.num_ignored_files == 1
    store.close()


def test_a_segment_under_another_name_is_found_by_its_number(filled):
    first = segments(filled)[0]
    first.rename(first.with_name("moved.kv"))
    store = open_store(filled)
    assert served(store) == set(range(NUM_SLOTS)) and store.counters.num_ignored_files == 0
    store.close()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)],
                         ids=["folder", "fifo", "link"])  # fmt: skip
@pytest.mark.parametrize("name", ["000000.kv", "000000.kv.tmp"])
def test_something_else_where_a_segment_should_be(tmp_path, make, name):
    open_store(tmp_path).close()
    (folder,) = tmp_path.iterdir()
    make(folder / name)
    assert_usable(tmp_path)
    assert os.path.lexists(folder / name)


def test_what_a_crash_left_under_a_temporary_name_is_removed(filled):
    leftover = segments(filled)[0].with_name("000007.kv.tmp")
    leftover.write_bytes(bytes(100))
    open_store(filled).close()
    assert not leftover.exists()
