"""The disk store: what it keeps, how much of it, one writer, many readers. Damage: test_disk_damage.py."""

import os
import stat
import sys
import threading

import numpy as np
import pytest

from tests.kv.disk_helper import (
    FINGERPRINT,
    GEOMETRY,
    NO_PARENT,
    NUM_SLOTS,
    PAYLOAD_BYTES,
    SEGMENT_SLOTS,
    armed,
    assert_usable,
    capacity_bytes,
    child,
    digest_of,
    holds,
    listed,
    open_store,
    payload_of,
    segments,
    served,
    write,
)
from xllm.errors import ConfigError
from xllm.kv.disk import DiskStore
from xllm.kv.disk_format import HEADER_DTYPE, MAX_SEGMENT_SLOTS, WRITING, classify_headers, make_geometry
from xllm.kv.disk_seal import Seal

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
    assert store.counters.misses == {"torn": 4, "corrupt": 0, "foreign": 0, "wrong_digest": 0, "forged": 0}
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
    assert classify_headers(table, GEOMETRY, Seal(), 0).tolist() == [0, 2, 3, 3]


def test_payloads_of_the_helper_differ():
    assert len({payload_of(name) for name in range(100)}) == 100
