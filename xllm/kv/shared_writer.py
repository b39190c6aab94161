"""`SharedWriter`: what one process adds to a shared store: segments in a folder of its own, within a size.

Nobody else writes into that folder. The writer bounds what it has added itself and, with it, what writers left that are
gone: when both together reach the capacity, the oldest segments go first, whole. So a store takes at most the capacity
times the number of living writers. A writer lives while it touches its file `alive`; gone is one that has not for
`GONE_S`. Ages are compared among the files' own times, which are the file server's clock where there is one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xllm.errors import ConfigError
from xllm.kv.disk_format import Geometry, make_geometry, pack_header
from xllm.kv.disk_seal import Seal
from xllm.kv.shared_segment import GONE, SUFFIX, TEMPORARY_SUFFIX, create_file, fill
from xllm.private_files import open_private_folder

# Of one file. Chosen: what is deleted at a time, and what a reader opens once; a quarter of the disk tier's, whose
# segments are never deleted.
SEGMENT_BYTES = 64 << 20
MIN_SEGMENTS = 4  # in the capacity; chosen: at most a quarter of what was added is deleted at once
ALIVE = "alive"
BEAT_S = 30.0  # between two signs of life. Chosen: twenty of them are missed before a writer counts as gone
# Without a sign of life, after which a writer counts as gone. Chosen: longer than a file server's restart takes.
GONE_S = 600.0


@dataclass(frozen=True, slots=True)
class BlockToStore:
    """A block on its way into a shared store. parent: the digest of the block before it, zeros for a first one."""

    digest: bytes
    parent: bytes
    payload: memoryview


class SharedWriter:
    """Adds blocks under `folder`. Not thread-safe, but for the signs of life, which a thread of its own gives from the
    first write on. Every method raises OSError."""

    def __init__(self, folder: Path, fingerprint: bytes, payload_bytes: int, seal: Seal, *, capacity_bytes: int):
        """Touches nothing yet. Raises ConfigError if the capacity holds no block."""
        self._folder, self._seal, self._capacity_bytes = folder, seal, capacity_bytes
        self.geometry = _geometry(fingerprint, payload_bytes, capacity_bytes)
        self.path: Path | None = None  # the writer's own folder
        self._segment: Path | None = None  # that is being filled
        self._number = -1  # of the last segment
        self._num_filled = 0  # its slots
        self._sequence = 0
        self._stopping = threading.Event()
        self._beat: threading.Thread | None = None

    @property
    def num_blocks(self) -> int:
        """How many blocks the capacity holds."""
        num_slots = self.geometry.slots_per_segment
        return self._capacity_bytes // self.geometry.payload_offset(num_slots) * num_slots

    def write(self, blocks: Sequence[BlockToStore]) -> None:
        """Add blocks: complete for readers when this returns. Where the folder was removed, a new one is begun. After
        an error, readers find each of them whole or not at all."""
        try:
            self._write(blocks)
        except OSError as error:
            if error.errno not in GONE:
                raise
            self.path = self._segment = None
            self._write(blocks)

    def _write(self, blocks: Sequence[BlockToStore]) -> None:
        while blocks:
            if self._segment is None or self._num_filled == self.geometry.slots_per_segment:
                self._begin_segment()
            num = min(len(blocks), self.geometry.slots_per_segment - self._num_filled)
            self._fill(blocks[:num])
            blocks = blocks[num:]

    def _fill(self, blocks: Sequence[BlockToStore]) -> None:
        assert self._segment is not None
        path, first = self._segment, self._num_filled
        slot = self._number * self.geometry.slots_per_segment + first
        headers = b"".join(pack_header(self.geometry, self._seal, slot + i, self._sequence + i, block.digest,
                                       block.parent, block.payload) for i, block in enumerate(blocks))
        self._sequence += len(blocks)
        self._segment = None  # should it fail: what is written there by halves is never written again
        fill(path, self.geometry, first, headers, [block.payload for block in blocks])
        self._segment, self._num_filled = path, first + len(blocks)

    def _begin_segment(self) -> None:
        if self.path is None:
            self._begin_folder()
        assert self.path is not None
        self._make_room()
        self._number += 1
        path = self.path / f"{self._number:06d}{SUFFIX}"
        create_file(path, self._number, self.geometry)
        self._segment, self._num_filled = path, 0

    def _begin_folder(self) -> None:
        path = self._folder / os.urandom(8).hex()
        os.close(open_private_folder(path))
        _touch(path / ALIVE)
        self.path = path
        if self._beat is None:
            self._beat = threading.Thread(target=self._live, name="xllm-kv-store-alive", daemon=True)
            self._beat.start()

    def _live(self) -> None:
        while not self._stopping.wait(BEAT_S):
            path = self.path
            if path is not None:
                with contextlib.suppress(OSError):  # the folder was removed, or the server is away
                    _touch(path / ALIVE)

    # --- room

    def _make_room(self) -> None:
        """Delete the oldest segments of this writer and of those that are gone until one more segment fits."""
        wanted_bytes = self.geometry.payload_offset(self.geometry.slots_per_segment)
        files = sorted(self._deletable())
        used_bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if used_bytes + wanted_bytes <= self._capacity_bytes:
                break
            path.unlink(missing_ok=True)
            used_bytes -= size

    def _deletable(self) -> list[tuple[int, int, Path]]:
        """(time of the last change in ns, bytes, path) of the segments that this writer may delete."""
        assert self.path is not None
        _touch(self.path / ALIVE)
        now_s = (self.path / ALIVE).stat().st_mtime
        found = []
        for name in os.listdir(self._folder):
            folder = self._folder / name
            if folder == self.path or _is_gone(folder, now_s):
                files = _files(folder)
                found += files
                if not files and folder != self.path:
                    shutil.rmtree(folder, ignore_errors=True)
        return found

    def close(self) -> None:
        """Stop the signs of life. What was added stays, and is there for every reader."""
        self._stopping.set()
        if self._beat is not None:
            self._beat.join(timeout=1.0)  # it may hang in a file system that is away
            self._beat = None


def _geometry(fingerprint: bytes, payload_bytes: int, capacity_bytes: int) -> Geometry:
    geometry = make_geometry(fingerprint, payload_bytes, min(SEGMENT_BYTES, capacity_bytes // MIN_SEGMENTS))
    if geometry.payload_offset(geometry.slots_per_segment) > capacity_bytes:
        raise ConfigError(f"a shared KV store of {capacity_bytes} bytes holds no block: the smallest that does is "
                          f"{geometry.payload_offset(1)} bytes")  # fmt: skip
    return geometry


def _is_gone(folder: Path, now_s: float) -> bool:
    """Whether a writer's folder, and nothing else, has had no sign of life for long."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return False
        alive = folder / ALIVE
        return now_s - (alive if alive.exists() else folder).stat().st_mtime > GONE_S
    except OSError:
        return False


def _files(folder: Path) -> list[tuple[int, int, Path]]:
    found = []
    for path in folder.iterdir():
        if path.name.endswith((SUFFIX, SUFFIX + TEMPORARY_SUFFIX)):
            with contextlib.suppress(FileNotFoundError):  # another writer is deleting them, too
                status = path.lstat()
                found.append((status.st_mtime_ns, status.st_size, path))
    return found


def _touch(path: Path) -> None:
    """Set a file's time to the file server's; make the file if it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
