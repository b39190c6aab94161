"""`SharedStore`: KV blocks by digest in a folder that many processes, on many machines, write and read at once.

    DIR/<fingerprint>/<writer>/000000.kv ...     segments (`shared_segment.py`), written by that writer alone

Each process that writes has a folder of its own (`shared_writer.py`), and reads all of them (`shared_index.py`).
Nothing is locked, and nothing but this is asked of the file system: a rename is atomic, and a file that was closed is
seen by who opens it afterwards. A block that is torn, damaged, deleted meanwhile, of another store or key is a miss,
counted by its kind; that two writers add the same block does no harm.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from xllm.errors import DiskError
from xllm.kv import failpoints
from xllm.kv.disk_format import (
    CORRUPT,
    FINGERPRINT_BYTES,
    FOREIGN,
    HEADER_BYTES,
    HEADER_DTYPE,
    TORN,
    classify_headers,
    unpack_good_header,
)
from xllm.kv.disk_seal import Seal
from xllm.kv.disk_segment import read_into
from xllm.kv.shared_index import SharedIndex
from xllm.kv.shared_segment import GONE, SharedSegment, open_file
from xllm.kv.shared_writer import BlockToStore, SharedWriter
from xllm.private_files import open_private_folder

# Why a block or a file was not taken. As of the disk tier (`disk.MISS_KINDS`), and: gone: its segment was deleted
# meanwhile; unreadable: an error of the file system.
MISS_KINDS = ("torn", "corrupt", "foreign", "wrong_digest", "forged", "gone", "unreadable")
_KIND_NAMES = {TORN: "torn", CORRUPT: "corrupt", FOREIGN: "foreign"}


@dataclass(slots=True)
class SharedCounters:
    """Totals since the store was opened, of this process. Bytes are payload bytes. misses: blocks and files that were
    not good, by kind."""

    num_writes: int = 0
    written_bytes: int = 0
    num_reads: int = 0  # that gave the block
    read_bytes: int = 0
    misses: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MISS_KINDS, 0))


class SharedStore:
    """Blocks of `payload_bytes` each. Thread-safe; writes wait for each other, refreshes too, reads for nothing.

    capacity_bytes: of what this process adds (see `shared_writer.py`); 0: it only reads. seal: with a key, blocks that
    were not written with it are misses.

    Raises ConfigError if the capacity holds no block or others may write to the folder, and DiskError if it cannot be
    used. Folders are made with mode 0700 and files with 0600: they hold users' text.
    """

    def __init__(self, folder: Path, *, fingerprint: bytes, payload_bytes: int, capacity_bytes: int = 0,
                 seal: Seal | None = None):
        assert len(fingerprint) == FINGERPRINT_BYTES and payload_bytes > 0
        self.payload_bytes, self.folder, self.fingerprint = payload_bytes, folder, fingerprint
        self.counters = SharedCounters()
        self._seal = seal or Seal()
        self._path = folder / fingerprint.hex()[:16]
        self._counting, self._writing = threading.Lock(), threading.Lock()
        self._refreshed_s = float("-inf")
        with self._disk_errors():
            os.close(open_private_folder(folder))
            os.close(open_private_folder(self._path))
        self._index = SharedIndex(self._path, fingerprint, payload_bytes, self._seal, self._count_miss)
        self._writer: SharedWriter | None = None
        if capacity_bytes:
            self._writer = SharedWriter(self._path, fingerprint, payload_bytes, self._seal,
                                        capacity_bytes=capacity_bytes)
        self._own: set[bytes] = set()  # added by or for this process since the last refresh

    @property
    def num_own_blocks(self) -> int:
        """How many blocks this process may have added at a time."""
        return 0 if self._writer is None else self._writer.num_blocks

    # --- what is there

    def has(self, digest: bytes) -> bool:
        """Whether the store had this block at the last `refresh`, or this process has added it since."""
        return self._index.find(digest) is not None or digest in self._own

    def can_read(self, digest: bytes) -> bool:
        """Whether `read` knows where this block is: one that was just added it finds after a `refresh`."""
        return self._index.find(digest) is not None

    def __len__(self) -> int:
        """How many blocks are listed; one that was just added may count twice."""
        return len(self._index) + len(self._own)

    def note(self, digests: Iterable[bytes]) -> None:
        """List blocks that another process has added for this one, until the next `refresh` finds them itself."""
        self._own.update(digests)

    def forget(self, digest: bytes) -> None:
        """List a block no more, wherever it lies."""
        self._own.discard(digest)
        while (place := self._index.find(digest)) is not None:
            self._index.forget(digest, place)

    def refresh(self, max_age_s: float = 0.0) -> None:
        """Take in what all writers have added and deleted, unless that was done less than `max_age_s` ago. Raises
        DiskError."""
        if time.monotonic() - self._refreshed_s < max_age_s:
            return
        began_s = time.monotonic()
        with self._disk_errors():
            written = set(self._own)
            self._index.refresh()
            self._own -= written
        self._refreshed_s = began_s

    # --- blocks

    def write(self, blocks: Sequence[BlockToStore]) -> int:
        """Add the blocks that were not there at the last `refresh`; returns how many. Raises DiskError (ENOSPC, EIO,
        ...): some of them may be added all the same, whole."""
        assert self._writer is not None, "this store only reads"
        assert all(memoryview(block.payload).nbytes == self.payload_bytes for block in blocks)
        with self._writing:
            new = list({block.digest: block for block in blocks if not self.has(block.digest)}.values())
            if not new:
                return 0
            with self._disk_errors():
                self._writer.write(new)
            self._own.update(block.digest for block in new)
        with self._counting:
            self.counters.num_writes += len(new)
            self.counters.written_bytes += len(new) * self.payload_bytes
        return len(new)

    def read(self, digest: bytes, out: memoryview) -> bool:
        """Copy a block into `out` (writable, `payload_bytes` long); returns whether it is there, as of the last
        `refresh`, and good. If not, `out` holds garbage; a block that was listed is counted as a miss and listed no
        more."""
        data = memoryview(out).cast("B")
        assert len(data) == self.payload_bytes
        while (place := self._index.find(digest)) is not None:
            miss = self._read(*place, digest, data)
            if miss is None:
                with self._counting:
                    self.counters.num_reads += 1
                    self.counters.read_bytes += self.payload_bytes
                return True
            self._count_miss(miss, 1)
            self._own.discard(digest)
            self._index.forget(digest, place)
        return False

    def _read(self, segment: SharedSegment, index: int, digest: bytes, data: memoryview) -> str | None:
        """What kind of miss it is, None for a hit."""
        try:
            return self._checked(segment, index, digest, data)
        except OSError as error:
            return "gone" if error.errno in GONE else "unreadable"

    def _checked(self, segment: SharedSegment, index: int, digest: bytes, data: memoryview) -> str | None:
        """As `_read`. Raises OSError."""
        if failpoints.armed is not None:
            failpoints.hit("store.read")
        geometry, slot = segment.geometry, segment.first_slot + index
        header = bytearray(HEADER_BYTES)
        fd = open_file(segment.path)
        try:
            read_into(fd, memoryview(header), geometry.header_offset(index))
            count = read_into(fd, data, geometry.payload_offset(index))
        finally:
            os.close(fd)
        found = unpack_good_header(bytes(header), geometry, self._seal, slot)
        if found is None:
            table = np.frombuffer(header, HEADER_DTYPE)
            return _KIND_NAMES.get(int(classify_headers(table, geometry, self._seal, slot)[0]), "torn")
        if found.digest != digest:
            return "wrong_digest"
        if count < len(data):
            return "torn"
        if self._seal.has_key and self._seal.fits_payload(data, found.payload_tag):
            return None
        if zlib.crc32(data) != found.payload_crc:
            return "corrupt"
        return "forged" if self._seal.has_key else None

    def close(self) -> None:
        """Stop the writer's signs of life; a second call does nothing. What was added stays."""
        if self._writer is not None:
            self._writer.close()

    # --- counting

    def _count_miss(self, kind: str, num: int) -> None:
        with self._counting:
            self.counters.misses[kind] += num

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(error.errno, error.strerror, error.filename or str(self._path)) from error
