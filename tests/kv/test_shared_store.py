"""The shared store: many writers and readers of one folder, and what is damaged, planted or deleted under them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kv.disk_helper import (
    FINGERPRINT,
    NO_PARENT,
    PAYLOAD_BYTES,
    ROOT,
    armed,
    crash,
    digest_of,
    flip,
    give_away,
    payload_of,
)
from tests.kv.disk_helper import Crash as Died
from tests.kv.held_view import OPENED
from xllm.errors import ConfigError, DiskError
from xllm.kv.disk_format import HEADER_BYTES, make_geometry
from xllm.kv.disk_seal import Seal
from xllm.kv.shared_store import MISS_KINDS, SharedStore
from xllm.kv.shared_writer import ALIVE, GONE_S, BlockToStore

GEOMETRY = make_geometry(FINGERPRINT, PAYLOAD_BYTES, 2 * 8192)  # two blocks a segment
SEGMENT = GEOMETRY.payload_offset(2)
CAPACITY = 4 * SEGMENT


def open_shared(folder: Path, capacity_bytes: int = CAPACITY, fingerprint: bytes = FINGERPRINT,
                seal: Seal | None = None) -> SharedStore:
    store = SharedStore(folder, fingerprint=fingerprint, payload_bytes=PAYLOAD_BYTES, capacity_bytes=capacity_bytes,
                        seal=seal)
    if store._writer is not None:
        store._writer.geometry = make_geometry(fingerprint, PAYLOAD_BYTES, 2 * 8192)
    OPENED.append(store)
    return store


def put(store: SharedStore, *names: int) -> int:
    return store.write([BlockToStore(digest_of(name), digest_of(name - 1) if name else NO_PARENT,
                                     memoryview(payload_of(name))) for name in names])


def found(store: SharedStore, names=range(30)) -> set[int]:
    """Which blocks a store reads now; each bit by bit what was put."""
    store.refresh()
    good = set()
    for name in names:
        out = bytearray(PAYLOAD_BYTES)
        if store.read(digest_of(name), memoryview(out)):
            assert out == payload_of(name), f"other bytes for block {name}"
            good.add(name)
    return good


def misses(store: SharedStore) -> dict[str, int]:
    return {kind: num for kind, num in store.counters.misses.items() if num}


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.kv"))


def test_everybody_finds_what_anybody_added(tmp_path):
    with_two = [open_shared(tmp_path), open_shared(tmp_path)]
    assert put(with_two[0], 0, 1, 2) == 3 and put(with_two[1], 10) == 1
    reader = open_shared(tmp_path, 0)
    for store in (*with_two, reader):
        assert found(store) == {0, 1, 2, 10}
    assert put(with_two[1], 2, 3) == 1  # block 2 is there
    assert found(reader) == {0, 1, 2, 3, 10} and found(with_two[0]) == {0, 1, 2, 3, 10}
    assert not misses(reader) and reader.counters.num_reads == 9
    with pytest.raises(AssertionError):
        put(reader, 5)
    for path in tmp_path.rglob("*"):
        assert not path.stat().st_mode & 0o077


def test_a_lookup_reads_no_file(tmp_path):
    writer, reader = open_shared(tmp_path), open_shared(tmp_path, 0)
    put(writer, 0)
    assert writer.has(digest_of(0)) and not reader.has(digest_of(0))
    with armed("store.list", crash):
        assert not reader.has(digest_of(0))
    reader.refresh()
    with armed("store.list", crash), armed("disk.read", crash):
        assert reader.has(digest_of(0)) and not reader.has(digest_of(1))
        reader.refresh(max_age_s=60.0)


def test_the_same_block_of_two_writers_outlives_either(tmp_path):
    one, other, reader = open_shared(tmp_path), open_shared(tmp_path), open_shared(tmp_path, 0)
    put(one, 0, 1)
    put(other, 1, 0)  # it has not looked yet
    assert found(reader) == {0, 1} and len(files(tmp_path)) == 2
    reader._index.find(digest_of(0))[0].path.unlink()
    assert found(reader) == {0, 1} and not misses(reader)
    files(tmp_path)[0].unlink()
    assert found(reader) == set()


@pytest.mark.parametrize("point", ["store.segment_created", "store.payloads_written", "store.headers_half",
                                   "disk.write"])
def test_a_writer_that_dies_leaves_whole_blocks(tmp_path, point):
    for num_passes in range(1, 9):
        folder = tmp_path / str(num_passes)
        writer, done = open_shared(folder), 0
        try:
            with armed(point, crash, num_passes):
                for name in range(6):
                    put(writer, name)
                    done += 1
        except Died:
            pass
        reader = open_shared(folder, 0)
        assert set(range(done)) <= found(reader) <= set(range(done + 1))
        assert not reader.counters.misses["corrupt"] and not reader.counters.misses["wrong_digest"]
        again = open_shared(folder)
        again.refresh()
        num_there = len(found(reader))
        assert put(again, *range(6)) == 6 - num_there
        assert found(reader) == set(range(6))


def test_a_batch_that_fails_is_not_written_over(tmp_path):
    writer = open_shared(tmp_path)
    put(writer, 0)
    with armed("disk.write", "ENOSPC", 2), pytest.raises(DiskError, match="No space"):
        put(writer, 1, 2)
    assert found(writer) == {0}
    put(writer, 1, 2)
    assert found(writer) == {0, 1, 2} and not misses(writer)
    assert len({path.parent for path in files(tmp_path)}) == 1


@pytest.mark.parametrize(("damage", "kinds", "left"), [
    (lambda path: flip(path, GEOMETRY.payload_offset(0) + 3000), {"corrupt": 1}, {1, 2, 3}),
    (lambda path: flip(path, GEOMETRY.header_offset(0) + 30), {"corrupt": 1}, {1, 2, 3}),
    (lambda path: os.truncate(path, GEOMETRY.payload_offset(1) + 100), {"torn": 1}, {0, 2, 3}),
    (lambda path: os.truncate(path, GEOMETRY.header_offset(1) + 64), {"torn": 2}, {2, 3}),
    (lambda path: os.truncate(path, 100), {"foreign": 1}, {2, 3}),
    (lambda path: os.truncate(path, 0), {"foreign": 1}, {2, 3}),
    (lambda path: path.write_bytes(os.urandom(SEGMENT)), {"foreign": 1}, {2, 3}),
    (lambda path: flip(path, 20), {"foreign": 1}, {2, 3}),
    (lambda path: path.chmod(0o622), {"foreign": 1}, {2, 3}),
    (lambda path: os.link(path, path.with_name("900000.kv")), {"foreign": 2}, {2, 3}),
    (lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), {"unreadable": 1}, {2, 3}),
    (lambda path: (path.unlink(), os.mkfifo(path)), {"foreign": 1}, {2, 3}),
    (lambda path: path.unlink(), {}, {2, 3}),
], ids=["payload", "header", "cut payload", "cut header", "cut superblock", "empty", "noise", "fingerprint", "writable",
        "linked", "link", "pipe", "deleted"])
def test_damage_is_a_miss(tmp_path, damage, kinds, left):
    """Before a reader has looked, and after: then a block that it has listed is found bad at the read."""
    writer = open_shared(tmp_path)
    put(writer, 0, 1, 2, 3)
    early, late = open_shared(tmp_path, 0), open_shared(tmp_path, 0)
    early.refresh()
    damage(files(tmp_path)[0])
    assert found(late) == left
    assert misses(late) == kinds
    assert left <= found(early) <= {0, 1, 2, 3}  # whatever was listed, what is read is what was put
    late_writer = open_shared(tmp_path)
    found(late_writer)
    put(late_writer, 0, 1, 2, 3)
    assert found(late_writer) == found(late) == {0, 1, 2, 3}  # what was found bad is added again


def test_a_block_of_another_model_is_not_found(tmp_path):
    other = bytes(32)
    theirs, ours = open_shared(tmp_path, fingerprint=other), open_shared(tmp_path)
    put(theirs, 0, 1)
    assert found(ours) == set() and found(theirs) == {0, 1}
    put(ours, 5)
    [mine], [foreign] = ours._path.glob("*/*.kv"), theirs._path.glob("*/*.kv")
    shutil.copy(foreign, mine.with_name("000777.kv"))
    reader = open_shared(tmp_path, 0)
    assert found(reader) == {5} and misses(reader) == {"foreign": 1}


def test_a_key(tmp_path):
    key, other = Seal(bytes(32), b"store"), Seal(bytes(31) + b"1", b"store")
    writer = open_shared(tmp_path, seal=key)
    put(writer, 0, 1)
    assert found(open_shared(tmp_path, 0, seal=key)) == {0, 1}
    for seal in (other, None):
        reader = open_shared(tmp_path, 0, seal=seal)
        assert found(reader) == set() and misses(reader) == {"foreign": 2}
    early = open_shared(tmp_path, 0, seal=key)
    early.refresh()
    path = files(tmp_path)[0]
    planted = open_shared(tmp_path / "elsewhere")
    put(planted, 0, 1)
    path.write_bytes(files(tmp_path / "elsewhere")[0].read_bytes())
    assert found(early) == set() and misses(early) == {"foreign": 2}


def test_a_writer_bounds_what_it_added(tmp_path):
    writer, reader = open_shared(tmp_path), open_shared(tmp_path, 0)
    for name in range(24):
        put(writer, name)
        assert sum(path.stat().st_size for path in files(tmp_path)) <= CAPACITY
        reader.refresh()
    assert found(writer) == found(reader) == set(range(16, 24))  # the oldest went first, two at a time
    assert not misses(reader) and put(writer, 0) == 1


def test_a_segment_deleted_under_a_reader(tmp_path):
    writer, reader = open_shared(tmp_path), open_shared(tmp_path, 0)
    put(writer, 0, 1)
    reader.refresh()
    files(tmp_path)[0].unlink()
    assert not reader.read(digest_of(0), memoryview(bytearray(PAYLOAD_BYTES)))
    assert misses(reader) == {"gone": 1} and not reader.has(digest_of(0))


def test_what_a_writer_left_goes_only_when_it_is_gone(tmp_path):
    first, second = open_shared(tmp_path), open_shared(tmp_path)
    put(first, 0, 1, 2, 3)
    put(second, *range(10, 22))
    assert found(second) == {0, 1, 2, 3, *range(14, 22)}  # each has its own capacity
    past_s = (first._writer.path / ALIVE).stat().st_mtime - GONE_S - 60
    for path in first._writer.path.iterdir():
        os.utime(path, (past_s, past_s))
    put(second, 22, 23)  # for it three segments must go: both of the writer that is gone, and one of its own
    assert found(second) == set(range(16, 24))
    put(second, 24, 25)
    assert not first._writer.path.exists()  # empty, and swept away
    assert found(first) == set(range(18, 26))
    put(first, 0, 1)  # it was only asleep
    assert {0, 1} <= found(second)


def test_the_folder_is_removed_under_a_writer(tmp_path):
    writer, reader = open_shared(tmp_path / "kv"), open_shared(tmp_path / "kv", 0)
    put(writer, 0)
    assert found(reader) == {0}
    subprocess.run(["rm", "-r", str(tmp_path / "kv")], check=True)
    assert found(reader) == set() and found(writer) == set()
    put(writer, 0, 1)
    assert found(reader) == {0, 1}


def test_a_full_disk_is_an_error_and_no_more(tmp_path):
    writer = open_shared(tmp_path)
    with armed("disk.write", "ENOSPC"):
        for name in range(3):
            with pytest.raises(DiskError):
                put(writer, name)
    assert put(writer, 0, 1, 2) == 3 and found(writer) == {0, 1, 2}


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="holds no block"):
        open_shared(tmp_path, 100)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="every user"):
        open_shared(tmp_path / "open")
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        open_shared(tmp_path / "file")
    (tmp_path / "theirs").mkdir()
    give_away(tmp_path / "theirs", monkeypatch)
    with pytest.raises(ConfigError):
        open_shared(tmp_path / "theirs")


WRITER = """
import sys
from pathlib import Path
from tests.kv.test_shared_store import open_shared, put
store = open_shared(Path(sys.argv[1]), 1 << 30)
for name in range(int(sys.argv[2]), int(sys.argv[3])):
    put(store, name)
    print(name, flush=True)
sys.stdin.read()
"""


def test_processes_that_write_at_once_and_are_killed(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    children = [subprocess.Popen([*command, str(first), str(first + 40)], cwd=ROOT, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, text=True) for first in (0, 20)]
    reader = open_shared(tmp_path, 0)
    said = [{int(child.stdout.readline()) for _ in range(25)} for child in children]
    assert set.union(*said) <= found(reader, range(60))
    for child in children:
        child.send_signal(signal.SIGKILL)
    rest = [{int(line) for line in child.stdout.read().split("\n")[:-1]} for child in children]
    for child in children:
        child.wait()
        child.stdin.close()
        child.stdout.close()
    there = found(reader, range(60))
    assert set.union(*said, *rest) <= there
    assert set(misses(reader)) <= {"torn"} and set(MISS_KINDS) >= set(misses(reader))


def test_headers_are_found_one_by_one_as_they_are_read(tmp_path):
    """A header that is not there whole yet is looked at again: a file server may show a write in pieces."""
    writer, reader = open_shared(tmp_path), open_shared(tmp_path, 0)
    put(writer, 0, 1)
    [path] = files(tmp_path)
    whole = path.read_bytes()
    end = GEOMETRY.header_offset(1) + HEADER_BYTES
    for hidden_bytes in (HEADER_BYTES + 10, HEADER_BYTES, 60, 0):
        path.write_bytes(whole[: end - hidden_bytes] + bytes(hidden_bytes) + whole[end:])
        reader.refresh()
        assert [reader.has(digest_of(name)) for name in (0, 1)] == [hidden_bytes <= HEADER_BYTES, not hidden_bytes]
    assert not misses(reader)
