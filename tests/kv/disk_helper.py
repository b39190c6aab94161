"""Blocks whose bytes follow from their digest, a scripted life of a disk store, and what may be left of it."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from xllm.errors import DiskError
from xllm.kv import failpoints
from xllm.kv.disk import DiskStore
from xllm.kv.disk_format import make_geometry
from xllm.kv.disk_seal import Seal

ROOT = Path(__file__).parent.parent.parent
FINGERPRINT = bytes(range(100, 132))
NO_PARENT = bytes(16)
PAYLOAD_BYTES = 6000  # two pages, the second not full
SEGMENT_SLOTS = 2
NUM_SLOTS = 5
GEOMETRY = make_geometry(FINGERPRINT, PAYLOAD_BYTES, SEGMENT_SLOTS * 8192)


class Crash(BaseException):
    """The process dies here; nothing of ours runs after it."""


def crash():
    raise Crash


def capacity_bytes(num_slots: int) -> int:
    full, rest = divmod(num_slots, SEGMENT_SLOTS)
    size = full * GEOMETRY.payload_offset(SEGMENT_SLOTS) + (GEOMETRY.payload_offset(rest) if rest else 0)
    assert GEOMETRY.slots_for(size) == num_slots
    return size


def open_store(folder: Path, num_slots: int = NUM_SLOTS, fingerprint: bytes = FINGERPRINT,
               seal: Seal | None = None) -> DiskStore:  # fmt: skip
    return DiskStore(folder, fingerprint=fingerprint, payload_bytes=PAYLOAD_BYTES, seal=seal,
                     capacity_bytes=capacity_bytes(num_slots), segment_bytes=SEGMENT_SLOTS * 8192)  # fmt: skip


def digest_of(name: int) -> bytes:
    return hashlib.blake2b(f"block {name}".encode(), digest_size=16).digest()


def payload_of(name: int) -> bytes:
    seed = digest_of(name)
    return b"".join(hashlib.blake2b(seed, salt=i.to_bytes(2, "big")).digest() for i in range(94))[:PAYLOAD_BYTES]


def write(store: DiskStore, slot: int, name: int) -> None:
    store.write(slot, digest_of(name), digest_of(name - 1) if name else NO_PARENT, payload_of(name))


def holds(store: DiskStore, slot: int, name: int) -> bool:
    """Whether the store serves this block, bit by bit, from this slot."""
    out = bytearray(PAYLOAD_BYTES)
    if not store.read(slot, digest_of(name), memoryview(out)):
        return False
    assert out == payload_of(name), f"slot {slot} gave other bytes for block {name}"
    return True


def listed(store: DiskStore) -> dict[int, bytes]:
    """{slot: digest} as a scan finds them; its order and parents are checked on the way."""
    entries = store.scan()
    assert list(entries.sequences) == sorted(set(entries.sequences.tolist()))
    digests = [row.tobytes() for row in entries.digests]
    parent_of = {digest_of(name): digest_of(name - 1) if name else NO_PARENT for name in range(200)}
    assert [row.tobytes() for row in entries.parents] == [parent_of[digest] for digest in digests]
    return dict(zip(entries.slots.tolist(), digests))


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{FINGERPRINT.hex()[:16]}/*.kv"))


def served(store: DiskStore) -> set[int]:
    """The slots that still serve the block of their number."""
    return {slot for slot in range(store.num_slots) if holds(store, slot, slot)}


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def give_away(path: Path, monkeypatch) -> int:
    """Another user owns the file or folder from now on, whose id is returned: really so where root runs the test."""
    if os.geteuid() == 0:
        os.chown(path, 4242, -1, follow_symlinks=False)
        return 4242
    owner = path.lstat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    return owner


def assert_usable(folder: Path, num_slots: int = NUM_SLOTS) -> None:
    """Every slot can be written, now and as the next process sees it."""
    store = open_store(folder, num_slots)
    for slot in range(num_slots):
        write(store, slot, 40 + slot)
    store.close()
    store = open_store(folder, num_slots)
    assert listed(store) == {slot: digest_of(40 + slot) for slot in range(num_slots)}
    assert all(holds(store, slot, 40 + slot) for slot in range(num_slots))
    store.close()


@contextlib.contextmanager
def armed(name: str, action, first_pass: int = 1):
    failpoints.arm(name, action, first_pass)
    try:
        yield
    finally:
        failpoints.disarm(name)


# A life that passes every failpoint: ("open", num_slots), ("write", slot, name), ("erase", slot), ("read", slot, name).
LIFE = [
    ("open", 5), *(("write", slot, slot) for slot in range(5)), ("read", 1, 1), ("write", 1, 11), ("write", 3, 13),
    ("erase", 0), ("write", 0, 10), ("flush",), ("open", 7), ("write", 5, 5), ("write", 6, 6), ("write", 2, 12),
    ("open", 3), ("write", 0, 20), ("open", 6), ("write", 3, 23), ("write", 5, 25), ("erase", 2), ("flush",),
]  # fmt: skip


class Life:
    """Runs the operations of a life; `num_done` are complete."""

    def __init__(self, folder: Path, seal: Seal | None = None):
        self.folder = folder
        self.seal = seal
        self.store = None
        self.num_done = 0

    def run(self, operations, report=lambda done: None):
        for operation in operations:
            self.do(*operation)
            self.num_done += 1
            report(self.num_done)

    def do(self, verb, *arguments):
        if verb == "open":
            self.abandon()
            self.store = open_store(self.folder, *arguments, seal=self.seal)
        elif verb == "write":
            write(self.store, *arguments)
        elif verb == "erase":
            self.store.erase(*arguments)
        elif verb == "flush":
            self.store.flush()
        else:
            assert holds(self.store, *arguments)

    def abandon(self):
        if self.store is not None:
            self.store.abandon()


def contents_after(operations) -> tuple[int, dict[int, int]]:
    """(number of slots, {slot: block}) after these operations."""
    num_slots, blocks = 5, {}
    for verb, *arguments in operations:
        if verb == "open":
            num_slots = arguments[0]
            blocks = {slot: name for slot, name in blocks.items() if slot < num_slots}
        elif verb == "write":
            blocks[arguments[0]] = arguments[1]
        elif verb == "erase":
            blocks.pop(arguments[0], None)
    return num_slots, blocks


def check_after_crash(folder: Path, operations, num_done: int) -> None:
    """What is complete is served, what was in flight is whole or missing, and a second life writes on."""
    num_slots, before = contents_after(operations[:num_done])
    _, after = contents_after(operations[: num_done + 1])
    in_flight = operations[num_done] if num_done < len(operations) else ("none",)
    num_slots = in_flight[1] if in_flight[0] == "open" else num_slots
    store = open_store(folder, num_slots)
    found = listed(store)
    for slot in range(num_slots):
        choices = {before.get(slot), after.get(slot)}
        if in_flight[0] == "write" and in_flight[1] == slot:
            choices.add(None)
        assert found.get(slot) in {None if name is None else digest_of(name) for name in choices}, (slot, in_flight)
        for name in choices - {None}:
            assert holds(store, slot, name) == (found.get(slot) == digest_of(name))
    for slot in range(num_slots):
        write(store, slot, 100 + slot)
    store.close()
    store = open_store(folder, num_slots)
    assert listed(store) == {slot: digest_of(100 + slot) for slot in range(num_slots)}
    assert all(holds(store, slot, 100 + slot) for slot in range(num_slots))
    store.close()
    files = {path.name for path in segments(folder)[0].parent.iterdir()} - {"writer.pid"}
    assert len(files) == -(-num_slots // SEGMENT_SLOTS), f"left behind: {files}"


# --- children


def child(*arguments: str, failpoints: str = "", prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    """A process that runs one of the functions below."""
    environment = {**os.environ, "XLLM_FAILPOINTS": failpoints}
    return subprocess.Popen([*prefix, sys.executable, "-m", "tests.kv.disk_helper", *arguments], cwd=ROOT, text=True,
                            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip


def live(folder: str) -> None:
    Life(Path(folder)).run(LIFE, lambda done: print(done, flush=True))


def hold(folder: str) -> None:
    """Hold the folder until the parent closes the pipe."""
    with contextlib.closing(open_store(Path(folder))) as store:
        write(store, 0, 0)
        print("held", flush=True)
        sys.stdin.read()


def write_for_ever(folder: str) -> None:
    """Overwrite five slots in turn: block i in slot i % 5, blocks counting round from 0 to 99."""
    store = open_store(Path(folder))
    i = 0
    while True:
        write(store, i % 5, i % 100)
        print(i, flush=True)
        i += 1


def fill(folder: str) -> None:
    """Write until the disk is full: say how far that went, and that what was written is still served."""
    store = open_store(Path(folder), num_slots=100)
    written, error = 0, None
    while written < 100:
        try:
            write(store, written, written)
        except DiskError as caught:
            error = caught
            break
        written += 1
    assert all(holds(store, slot, slot) for slot in range(written))
    left = sorted(path.name for path in Path(folder).rglob("*.tmp"))
    print(json.dumps({"written": written, "errno": error and error.errno, "temporary": left}))
    store.abandon()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
