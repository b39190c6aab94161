"""The disk store on good files and on damaged, foreign and locked ones."""

import os
import shutil
import stat
import sys
import threading

import numpy as np
import pytest

from tests.kv.disk_helper import (
    FINGERPRINT,
    GEOMETRY,
    NO_PARENT,
    PAYLOAD_BYTES,
    SEGMENT_SLOTS,
    armed,
    capacity_bytes,
    child,
    digest_of,
    holds,
    listed,
    open_store,
    payload_of,
    segments,
    write,
)
from xllm.errors import ConfigError
from xllm.kv.disk import DiskStore
from xllm.kv.disk_format import HEADER_BYTES, HEADER_DTYPE, MAX_SEGMENT_SLOTS, WRITING, classify_headers, make_geometry

NUM_SLOTS = 5


@pytest.fixture
def filled(tmp_path):
    """A folder whose slot i holds block i."""
    store = open_store(tmp_path)
    for slot in range(NUM_SLOTS):
        write(store, slot, slot)
    store.close()
    return tmp_path


def served(store) -> set[int]:
    """The slots that still serve the block of their number."""
    return {slot for slot in range(store.num_slots) if holds(store, slot, slot)}


def flip(path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def assert_usable(folder, num_slots: int = NUM_SLOTS) -> None:
    """Every slot can be written, now and as the next process sees it."""
    store = open_store(folder, num_slots)
    for slot in range(num_slots):
        write(store, slot, 40 + slot)
    store.close()
    store = open_store(folder, num_slots)
    assert listed(store) == {slot: digest_of(40 + slot) for slot in range(num_slots)}
    assert all(holds(store, slot, 40 + slot) for slot in range(num_slots))
    store.close()


# --- good files


def test_blocks_outlive_the_store(filled):
    store = open_store(filled)
    assert listed(store) == {slot: digest_of(slot) for slot in range(NUM_SLOTS)}
    assert served(store) == set(range(NUM_SLOTS))
    counters = store.counters
    assert (counters.num_reads, counters.read_bytes) == (NUM_SLOTS, NUM_SLOTS * PAYLOAD_BYTES)
    assert (counters.num_writes, counters.written_bytes, counters.num_ignored_files) == (0, 0, 0)
    store.close()


def test_a_scan_gives_arrays_in_the_order_of_writing(tmp_path):
    store = open_store(tmp_path)
    assert len(store.scan()) == 0
    for slot in (3, 0, 4, 1):
        write(store, slot, slot)
    write(store, 0, 9)
    entries = store.scan()
    assert entries.slots.tolist() == [3, 4, 1, 0] and entries.slots.dtype == np.int32
    assert entries.digests.shape == entries.parents.shape == (4, 16) and entries.digests.dtype == np.uint8
    assert entries.sequences.dtype == np.int64
    store.close()
    store = open_store(tmp_path)
    write(store, 2, 2)  # a new life counts on
    assert store.scan().slots.tolist() == [3, 4, 1, 0, 2]
    store.close()


def test_an_older_copy_of_a_block_is_not_listed(tmp_path):
    store = open_store(tmp_path)
    for slot, name in ((0, 7), (1, 8), (2, 7)):
        write(store, slot, name)
    entries = store.scan()
    assert entries.slots.tolist() == [1, 2] and entries.num_repeated == 1
    store.close()


def test_erased_and_never_written_slots_are_misses(tmp_path):
    store = open_store(tmp_path)
    store.erase(0)
    assert not holds(store, 0, 0)
    write(store, 0, 0)
    store.erase(0)
    assert not holds(store, 0, 0) and not holds(store, 1, 0) and not holds(store, 4, 0)
    assert store.counters.misses == {"torn": 4, "corrupt": 0, "foreign": 0, "wrong_digest": 0}
    assert len(store.scan()) == 0
    store.close()


def test_another_digest_is_a_miss(filled):
    store = open_store(filled)
    assert not holds(store, 0, 1)
    assert store.counters.misses["wrong_digest"] == 1
    store.close()


def test_numpy_memory_goes_in_and_out(tmp_path):
    payload_LPHD = np.arange(PAYLOAD_BYTES // 4, dtype=np.float32).reshape(2, 5, 15, 10)
    with_store = open_store(tmp_path)
    with_store.write(0, digest_of(0), NO_PARENT, payload_LPHD.data)
    out = np.zeros_like(payload_LPHD)
    assert with_store.read(0, digest_of(0), out.data)
    np.testing.assert_array_equal(out, payload_LPHD)
    with_store.close()


def test_short_writes_and_reads_are_continued(tmp_path, monkeypatch):
    real_write, real_read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real_write(fd, data[:999], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real_read(fd, [buffers[0][:777]], offset))
    store = open_store(tmp_path)
    write(store, 1, 1)
    assert holds(store, 1, 1)
    store.close()


def test_files_are_private(filled):
    folder = segments(filled)[0].parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_space_is_taken_when_a_segment_is_created(tmp_path):
    store = open_store(tmp_path)
    assert segments(tmp_path) == []
    write(store, 0, 0)
    (path,) = segments(tmp_path)
    assert path.stat().st_blocks * 512 >= path.stat().st_size == GEOMETRY.payload_offset(SEGMENT_SLOTS)
    store.close()


def test_a_flush_syncs_what_was_written_and_no_more(tmp_path, monkeypatch):
    synced, real = [], os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    store = open_store(tmp_path)
    for slot in (0, 1, 2):
        write(store, slot, slot)
    assert synced == []
    store.flush()
    assert synced == [str(path) for path in segments(tmp_path)]
    store.flush()
    assert len(synced) == 2
    store.erase(1)
    store.flush()
    write(store, 3, 3)
    store.close()
    assert synced[2:] == [str(path) for path in segments(tmp_path)]


# --- capacity


@pytest.mark.parametrize("payload_bytes", [1, 4096, 4097, 1 << 20, 300 << 20])
def test_all_files_together_fit_the_capacity(payload_bytes):
    geometry = make_geometry(FINGERPRINT, payload_bytes, 256 << 20)
    assert 1 <= geometry.slots_per_segment <= MAX_SEGMENT_SLOTS
    for capacity in (0, 1 << 20, 10 << 30, (10 << 30) + 12345):
        full, rest = divmod(geometry.slots_for(capacity), geometry.slots_per_segment)
        used = full * geometry.payload_offset(geometry.slots_per_segment)
        used += geometry.payload_offset(rest) if rest else 0
        next_slot = geometry.slot_bytes + (0 if rest else geometry.payload_start)
        assert used <= capacity < used + next_slot


def test_a_capacity_below_one_block_is_refused(tmp_path):
    smallest = GEOMETRY.payload_offset(1)
    common = {"fingerprint": FINGERPRINT, "payload_bytes": PAYLOAD_BYTES, "segment_bytes": 2 * 8192}
    with pytest.raises(ConfigError, match=f"holds no block.*{smallest} bytes"):
        DiskStore(tmp_path / "a", capacity_bytes=smallest - 1, **common)
    assert not (tmp_path / "a").exists()
    store = DiskStore(tmp_path / "a", capacity_bytes=smallest, **common)
    assert store.num_slots == 1
    store.close()


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4, 6, 9])
def test_another_capacity_keeps_what_fits(filled, num_slots):
    store = open_store(filled, num_slots)
    assert set(listed(store)) == served(store) == set(range(min(num_slots, NUM_SLOTS)))
    store.close()
    assert sum(path.stat().st_size for path in segments(filled)) <= capacity_bytes(num_slots)
    store = open_store(filled, NUM_SLOTS)
    assert set(listed(store)) == served(store) == set(range(min(num_slots, NUM_SLOTS)))
    store.close()
    assert_usable(filled)


def test_too_many_files_for_the_process_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="open files"):
        DiskStore(tmp_path, fingerprint=FINGERPRINT, payload_bytes=1, capacity_bytes=1 << 60)


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
    assert store.counters.misses == {"torn": 0, "corrupt": 1, "foreign": 0, "wrong_digest": 0}
    store.close()


@pytest.mark.parametrize("offset", [0, 1, 2999, PAYLOAD_BYTES - 1])
def test_a_flipped_payload_is_a_miss(filled, offset):
    flip(segments(filled)[0], GEOMETRY.payload_offset(1) + offset)
    store = open_store(filled)
    assert len(store.scan()) == NUM_SLOTS
    assert served(store) == {0, 2, 3, 4}
    assert store.counters.misses == {"torn": 0, "corrupt": 1, "foreign": 0, "wrong_digest": 0}
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
    assert store.counters.misses == {"torn": 1, "corrupt": 0, "foreign": 1, "wrong_digest": 0}
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


# --- one writer


def test_a_second_writer_is_refused_and_told_who_has_it(tmp_path):
    process = child("hold", str(tmp_path))
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"{tmp_path}.* in use by process {process.pid}"):
        open_store(tmp_path)
    next(tmp_path.glob("*/writer.pid")).unlink()
    with pytest.raises(ConfigError, match="in use by process unknown"):
        open_store(tmp_path)
    process.kill()
    process.communicate()
    store = open_store(tmp_path)  # the kernel let go of the lock
    assert holds(store, 0, 0)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        open_store(tmp_path)
    store.close()
    store.close()
    assert_usable(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught:
        open_store(tmp_path / "file")
    assert type(caught.value).__name__ == "DiskError" and "file" in str(caught.value)


# --- threads


@pytest.fixture
def threads_change_often():
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("threads_change_often")
def test_readers_beside_the_writer(tmp_path):
    """One thread rewrites slots, two read others; pins keep them apart, as the index does."""
    num_slots, num_writes = 12, 1500
    store = open_store(tmp_path, num_slots)
    held, pins, lock, failures = [None] * num_slots, [0] * num_slots, threading.Lock(), []
    stop = threading.Event()

    def run(work, rng):
        try:
            work(rng)
        except BaseException as error:
            failures.append(error)
        finally:
            stop.set()

    def write_all(rng):
        for i in range(num_writes):
            slot = int(rng.integers(num_slots))
            with lock:
                if pins[slot]:
                    continue
                held[slot] = None
            name = i % 100
            write(store, slot, name) if i % 10 else store.erase(slot)
            with lock:
                held[slot] = name if i % 10 else None

    def read_on(rng):
        while not stop.is_set() or num_read[0] < 500:
            slot = int(rng.integers(num_slots))
            with lock:
                name = held[slot]
                pins[slot] += name is not None
            if name is not None:
                assert holds(store, slot, name)
                with lock:
                    pins[slot] -= 1
                    num_read[0] += 1

    num_read = [0]
    jobs = [(write_all, 0), (read_on, 1), (read_on, 2)]
    threads = [threading.Thread(target=run, args=(work, np.random.default_rng(seed))) for work, seed in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert store.counters.num_reads == num_read[0] >= 500
    assert sum(store.counters.misses.values()) == 0 and store.counters.num_writes > num_writes // 3
    store.close()


def test_no_lock_is_held_across_a_write(tmp_path):
    """A reader gets through while the writer stands in the middle of a payload."""
    store = open_store(tmp_path)
    write(store, 0, 0)
    inside, go_on = threading.Event(), threading.Event()

    def stand_still():
        inside.set()
        assert go_on.wait(30)

    with armed("disk.payload_half", stand_still):
        writer = threading.Thread(target=write, args=(store, 1, 1))
        writer.start()
        assert inside.wait(30)
        assert holds(store, 0, 0) and not holds(store, 1, 1)
        go_on.set()
        writer.join()
    assert holds(store, 1, 1)
    store.close()


# --- the format


def test_headers_in_every_state_are_told_apart():
    table = np.zeros(4, dtype=HEADER_DTYPE)
    table["magic"][1] = int.from_bytes(WRITING, "little")
    table["payload_crc"][2] = 1
    table["sequence"][3] = -1
    assert classify_headers(table, GEOMETRY, 0).tolist() == [0, 2, 3, 3]


def test_payloads_of_the_helper_differ():
    assert len({payload_of(name) for name in range(100)}) == 100
