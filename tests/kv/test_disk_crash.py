"""The disk store after a death at every point of its life: real children killed, and every pass of every failpoint."""

import errno
import json
import signal
import subprocess

import pytest

from tests.kv.disk_helper import (
    LIFE,
    Crash,
    Life,
    armed,
    check_after_crash,
    child,
    contents_after,
    crash,
    digest_of,
    holds,
    listed,
    open_store,
    write,
)
from xllm.kv import failpoints
from xllm.kv.disk import MISS_KINDS

POINTS = sorted(name for name in failpoints.NAMES if name.startswith("disk."))
# What an overwritten slot holds after a death there.
OVERWRITTEN = {
    "disk.header_invalidated": None,
    "disk.payload_half": None,
    "disk.payload_written": None,
    "disk.header_half": None,
    "disk.header_written": "new",
}


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    """{point: how often the life passes it}"""
    counts = dict.fromkeys(POINTS, 0)

    def counter(name):
        def count():
            counts[name] += 1

        return count

    for name in POINTS:
        failpoints.arm(name, counter(name))
    life = Life(tmp_path_factory.mktemp("life"))
    life.run(LIFE)
    life.abandon()
    failpoints.disarm()
    return counts


def test_the_life_passes_every_point(passes):
    assert min(passes.values()) >= 1, passes


@pytest.mark.parametrize("point", POINTS)
def test_killed(tmp_path, passes, point):
    turn = (passes[point] + 1) // 2
    process = child("live", str(tmp_path), failpoints=f"{point}=kill:{turn}")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    check_after_crash(tmp_path, LIFE, len(output.split()))


@pytest.mark.parametrize("point", POINTS)
def test_every_pass(tmp_path, passes, point):
    for turn in range(1, passes[point] + 1):
        folder = tmp_path / str(turn)
        life = Life(folder)
        with armed(point, crash, turn), pytest.raises(Crash):
            life.run(LIFE)
        life.abandon()
        check_after_crash(folder, LIFE, life.num_done)


@pytest.mark.parametrize("point", OVERWRITTEN)
def test_an_overwritten_slot_is_old_or_new_or_nothing(tmp_path, point):
    life = Life(tmp_path)
    life.run([("open", 5), ("write", 0, 0), ("write", 1, 1)])
    with armed(point, crash), pytest.raises(Crash):
        write(life.store, 1, 2)
    life.abandon()
    store = open_store(tmp_path)
    entries = store.scan()
    assert listed(store) == {0: digest_of(0)} | ({1: digest_of(2)} if OVERWRITTEN[point] else {})
    assert (entries.num_torn, entries.num_corrupt) == (0 if OVERWRITTEN[point] else 1, 0)
    assert not holds(store, 1, 1)
    assert holds(store, 1, 2) == (OVERWRITTEN[point] == "new")
    expected = {"wrong_digest": 1} if OVERWRITTEN[point] else {"torn": 2}
    assert store.counters.misses == {**dict.fromkeys(MISS_KINDS, 0), **expected}
    store.close()


@pytest.mark.parametrize("num_lines", [1, 7, 60, 333])
def test_killed_from_outside_while_writing(tmp_path, num_lines):
    process = child("write_for_ever", str(tmp_path))
    with process:
        done = [int(process.stdout.readline()) for _ in range(num_lines)]
        process.kill()
        done += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    assert process.returncode == -signal.SIGKILL
    assert done == list(range(len(done)))
    last = done[-1]
    certain = {i % 5: i % 100 for i in done if i > last - 4}  # the fifth-last one's slot is being written
    store = open_store(tmp_path)
    found = listed(store)
    for slot, name in certain.items():
        assert found[slot] == digest_of(name)
        assert holds(store, slot, name)
    unsure = (last + 1) % 5
    assert found.get(unsure) in {None, digest_of((last + 1) % 100), digest_of((last - 4) % 100)}
    for name in ((last + 1) % 100, (last - 4) % 100):
        assert holds(store, unsure, name) == (found.get(unsure) == digest_of(name))
    store.close()


@pytest.mark.parametrize("point", ["disk.write", "disk.allocate", "disk.sync"])
@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EROFS", "EDQUOT"])
def test_a_failing_disk(tmp_path, point, name):
    """The failing operation says so, what was complete stays readable, and the store recovers with the disk."""
    life = Life(tmp_path)
    life.run(LIFE[:6])
    with armed(point, name):
        if point == "disk.sync":
            with pytest.raises(OSError) as caught:
                life.store.flush()
        else:
            slot = 1 if point == "disk.write" else 5
            life.store = life.store if slot == 1 else reopened(life, 7)
            with pytest.raises(OSError) as caught:
                write(life.store, slot, 50)
    assert type(caught.value).__name__ == "DiskError"
    assert caught.value.errno == getattr(errno, name)
    assert str(tmp_path) in str(caught.value)
    assert life.store.counters.num_errors == 1
    assert all(holds(life.store, slot, block) for slot, block in contents_after(LIFE[:6])[1].items())
    write(life.store, 1, 51)
    assert holds(life.store, 1, 51)
    life.store.close()


def reopened(life, num_slots):
    life.do("open", num_slots)
    return life.store


def test_a_write_that_fails_half_way_leaves_a_miss(tmp_path):
    store = open_store(tmp_path)
    write(store, 0, 0)
    with armed("disk.payload_half", "EIO"), pytest.raises(OSError):
        write(store, 0, 1)
    assert not holds(store, 0, 0) and not holds(store, 0, 1)
    assert listed(store) == {}
    store.close()


def test_a_read_error_is_no_miss(tmp_path):
    store = open_store(tmp_path)
    write(store, 0, 0)
    with armed("disk.read", "EIO"), pytest.raises(OSError) as caught:
        holds(store, 0, 0)
    assert caught.value.errno == errno.EIO
    assert holds(store, 0, 0)
    assert sum(store.counters.misses.values()) == 0 and store.counters.num_errors == 1
    store.close()


def test_a_failing_flush_closes_the_store_all_the_same(tmp_path):
    store = open_store(tmp_path)
    write(store, 0, 0)
    with armed("disk.sync", "EIO"), pytest.raises(OSError):
        store.close()
    store = open_store(tmp_path)  # the lock is free
    assert holds(store, 0, 0)
    store.close()


def mount_is_possible(folder) -> bool:
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def test_a_full_disk(tmp_path):
    """A real one of 64 KiB where the system lets us mount it; elsewhere the allocation fails by failpoint."""
    if mount_is_possible(tmp_path):
        prefix = ("unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=64k t {tmp_path} && exec "$@"', "sh")
        process = child("fill", str(tmp_path), prefix=prefix)
    else:
        process = child("fill", str(tmp_path), failpoints="disk.allocate=ENOSPC:3")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(output) == {"written": 4, "errno": errno.ENOSPC, "temporary": []}


def test_the_limit_on_open_files_is_raised_where_segments_need_it(tmp_path):
    process = child("fill", str(tmp_path), prefix=("sh", "-c", 'ulimit -S -n 40 && exec "$@"', "sh"))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(output) == {"written": 100, "errno": None, "temporary": []}


@pytest.mark.parametrize(("limit_bytes", "num_written"), [(20_000, 0), (24_576, 100)])
def test_a_limit_on_the_size_of_files(tmp_path, limit_bytes, num_written):
    """RLIMIT_FSIZE: the kernel refuses the allocation (EFBIG). A segment of two slots takes 24,576 bytes."""
    prefix = ("sh", "-c", 'ulimit -f "$1" && shift && exec "$@"', "sh", str(limit_bytes // 512))
    process = child("fill", str(tmp_path), prefix=prefix)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    expected = {"written": num_written, "errno": None if num_written else errno.EFBIG, "temporary": []}
    assert json.loads(output) == expected
