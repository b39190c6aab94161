"""`DiskStore`: blocks of a fixed size in numbered slots on a local disk; they outlive the process, even one killed.

The store moves bytes; which slot holds which block, and which is evicted, `TierIndex` decides. A slot is written in
three steps: its header is invalidated, then the payload is written, then the new header (`disk_format.py`). A block
whose header or checksum does not fit is a miss, so:

- Killed at any point, a restart finds exactly the blocks whose `write` got as far as the header.
- After a power loss, what the kernel had not yet written back may be missing or old. The block's own checksums make
  that a miss. Blocks are not synced one by one: a lost block costs one recomputation, a sync would cost every write.
  `flush` syncs what is written so far, and `close` does it too.

Each fingerprint (weights, dtype, layout, block size, tokenizer: the caller hashes them) has a folder of its own,
so that models may share a disk. Files in it that are not ours, or damaged, are left alone and counted.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from xllm.errors import ConfigError, DiskError
from xllm.kv.block import DIGEST_BYTES
from xllm.kv.disk_folder import DiskFolder
from xllm.kv.disk_format import (
    BLANK_HEADER,
    CORRUPT,
    FINGERPRINT_BYTES,
    FOREIGN,
    GOOD,
    HEADER_DTYPE,
    TORN,
    classify_headers,
    make_geometry,
    pack_header,
    unpack_good_header,
)
from xllm.kv.disk_seal import Seal
from xllm.kv.disk_segment import DiskSegment

# Of one file. Chosen: larger files need fewer descriptors (each stays open), smaller ones waste less of a capacity.
SEGMENT_BYTES = 256 << 20

# torn: nothing complete is there (never written, cut short, truncated); corrupt: a checksum says so;
# foreign: a header of another store, slot or key, or one that was planted; wrong_digest: a good block, but another one;
# forged: a good header, and a payload that was made to fit its checksum.
MISS_KINDS = ("torn", "corrupt", "foreign", "wrong_digest", "forged")
_KIND_NAMES = {TORN: "torn", CORRUPT: "corrupt", FOREIGN: "foreign"}


@dataclass(slots=True)
class DiskCounters:
    """Totals since the store was opened. Bytes are payload bytes; `misses`: reads that found no good block, by kind."""

    num_writes: int = 0
    written_bytes: int = 0
    num_reads: int = 0  # that gave the block
    read_bytes: int = 0
    num_errors: int = 0  # DiskErrors raised
    num_ignored_files: int = 0  # in the store's folder, and not segments of this store
    misses: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MISS_KINDS, 0))


@dataclass(frozen=True)
class DiskEntries:
    """What a scan found complete, the oldest first; the scan reads headers only. No digest is listed twice."""

    slots: np.ndarray  # int32 [N]
    digests: np.ndarray  # uint8 [N, 16]
    parents: np.ndarray  # uint8 [N, 16]; zeros: a root
    sequences: np.ndarray  # int64 [N], ascending: the order of writing
    num_torn: int
    num_corrupt: int
    num_foreign: int
    num_repeated: int  # older copies of a listed digest

    def __len__(self) -> int:
        return len(self.slots)


class DiskStore:
    """Slots `0 .. num_slots - 1` of `payload_bytes` each.

    One thread calls `write`, `erase`, `scan`, `flush`; any number of threads call `read`, for slots that are
    not being written (the index pins them). No lock is held across I/O. `close` comes after all of them.

    seal: with a key, blocks that were not written with it are misses.

    Raises ConfigError if the capacity holds no block, the folder has a writer already or others may write to it, and
    DiskError if the folder cannot be used. Folders are created with mode 0700 and files with 0600: they hold users'
    text.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fingerprint: bytes,
        payload_bytes: int,
        capacity_bytes: int,
        segment_bytes: int = SEGMENT_BYTES,
        seal: Seal | None = None,
    ):
        assert len(fingerprint) == FINGERPRINT_BYTES and payload_bytes > 0
        self._geometry = make_geometry(fingerprint, payload_bytes, segment_bytes)
        self._seal = seal or Seal()
        self.payload_bytes = payload_bytes
        self.num_slots = self._geometry.slots_for(capacity_bytes)
        if not self.num_slots:
            raise ConfigError(f"a KV disk capacity of {capacity_bytes} bytes holds no block: "
                              f"the smallest that does is {self._geometry.payload_offset(1)} bytes")  # fmt: skip
        self.counters = DiskCounters()
        self._counting = threading.Lock()
        self._next_sequence: int | None = None  # unknown until the headers are scanned
        self._path = folder / fingerprint.hex()[:16]
        with self._disk_errors():
            self._folder = DiskFolder(self._path)
            try:
                self._segments = self._folder.open_segments(self._geometry, self.num_slots)
            except BaseException:
                self._folder.close()
                raise
        self.counters.num_ignored_files = self._folder.num_ignored_files

    # --- blocks

    def write(self, slot: int, digest: bytes, parent: bytes, payload: memoryview) -> None:
        """Replace what the slot holds. `parent`: the digest of the block before this one, zeros for a root.

        Raises DiskError (ENOSPC, EIO, ...): the slot then holds what it held, or nothing; others are unharmed.
        """
        assert len(digest) == len(parent) == DIGEST_BYTES
        data = memoryview(payload).cast("B")
        assert len(data) == self.payload_bytes
        if self._next_sequence is None:
            self.scan()
        assert self._next_sequence is not None
        header = pack_header(self._geometry, self._seal, slot, self._next_sequence, digest, parent, data)
        self._next_sequence += 1
        with self._disk_errors():
            segment, index = self._segment_to_write(slot)
            segment.write(index, header, data)
        with self._counting:
            self.counters.num_writes += 1
            self.counters.written_bytes += self.payload_bytes

    def erase(self, slot: int) -> None:
        """Empty the slot. Raises DiskError; the slot may then still hold its block."""
        segment, index = self._locate(slot)
        if segment is not None:
            with self._disk_errors():
                segment.erase(index)

    def read(self, slot: int, digest: bytes, out: memoryview) -> bool:
        """Copy the block `digest` from `slot` into `out` (writable, `payload_bytes` long); returns whether it is good.

        False: the slot does not hold that block whole. The miss is counted by its kind, and `out` holds garbage.
        Raises DiskError.
        """
        data = memoryview(out).cast("B")
        assert len(data) == self.payload_bytes
        with self._disk_errors():
            miss = self._read(slot, digest, data)
        with self._counting:
            if miss is None:
                self.counters.num_reads += 1
                self.counters.read_bytes += self.payload_bytes
            else:
                self.counters.misses[miss] += 1
        return miss is None

    def _read(self, slot: int, digest: bytes, data: memoryview) -> str | None:
        """What kind of miss it is, None for a hit."""
        segment, index = self._locate(slot)
        if segment is None:
            return "torn"
        header = segment.read_header(index)
        found = unpack_good_header(header, self._geometry, self._seal, slot)
        if found is None:
            table = np.frombuffer(header.ljust(len(BLANK_HEADER), b"\0"), HEADER_DTYPE)
            return _KIND_NAMES.get(int(classify_headers(table, self._geometry, self._seal, slot)[0]), "torn")
        if found.digest != digest:
            return "wrong_digest"
        if not segment.read_payload(index, data):
            return "torn"
        if self._seal.has_key and self._seal.fits_payload(data, found.payload_tag):
            return None
        if zlib.crc32(data) != found.payload_crc:
            return "corrupt"
        return "forged" if self._seal.has_key else None

    def _locate(self, slot: int) -> tuple[DiskSegment | None, int]:
        assert 0 <= slot < self.num_slots
        number, index = divmod(slot, self._geometry.slots_per_segment)
        return self._segments[number], index

    def _segment_to_write(self, slot: int) -> tuple[DiskSegment, int]:
        assert self._folder.is_open, "write to a closed store"
        segment, index = self._locate(slot)
        if segment is None:
            number = slot // self._geometry.slots_per_segment
            segment = self._folder.create_segment(number, self._geometry, self.num_slots)
            self._segments[number] = segment
        return segment, index

    # --- the whole store

    def scan(self) -> DiskEntries:
        """Read every header and list the complete blocks; later writes get sequence numbers above theirs. Raises
        DiskError."""
        with self._disk_errors():
            segments = [segment for segment in self._segments if segment is not None]
            tables = [segment.read_table() for segment in segments]
        kinds = [self._classify(segment, table) for segment, table in zip(segments, tables)]
        slots = [np.arange(segment.first_slot, segment.first_slot + segment.num_slots) for segment in segments]
        entries = _entries(_joined(tables, HEADER_DTYPE), _joined(slots, np.int32), _joined(kinds, np.int8))
        newest = int(entries.sequences[-1]) if len(entries) else -1
        self._next_sequence = max(newest + 1, self._next_sequence or 0)
        return entries

    def _classify(self, segment: DiskSegment, table: np.ndarray) -> np.ndarray:
        kinds = classify_headers(table, self._geometry, self._seal, segment.first_slot)
        beyond = kinds[segment.num_stored :]
        beyond[beyond == GOOD] = TORN  # the file is truncated
        return kinds

    def flush(self) -> None:
        """Sync everything written so far: it outlives a power loss once this returns. Raises DiskError."""
        with self._disk_errors():
            for segment in filter(None, self._segments):
                segment.sync()
            self._folder.sync()

    def close(self) -> None:
        """Flush and give the folder back; a second call does nothing. Raises DiskError if the flush fails;
        the store is closed all the same."""
        if self._folder.is_open:
            try:
                self.flush()
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Close the files and release the folder without a flush, for a disk that fails. A power loss soon after may
        lose blocks; nothing else does."""
        segments, self._segments = self._segments, [None] * len(self._segments)
        for segment in filter(None, segments):
            segment.close()
        self._folder.close()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with self._counting:
                self.counters.num_errors += 1
            raise DiskError(error.errno, error.strerror, error.filename or str(self._path)) from error


def _entries(table: np.ndarray, slots: np.ndarray, kinds: np.ndarray) -> DiskEntries:
    good = np.flatnonzero(kinds == GOOD)
    newest_first = good[np.argsort(table["sequence"][good], kind="stable")[::-1]]
    digests = np.ascontiguousarray(table["digest"][newest_first]).view(f"V{DIGEST_BYTES}").ravel()
    _, firsts = np.unique(digests, return_index=True)
    listed = newest_first[np.sort(firsts)[::-1]]
    return DiskEntries(
        slots=slots[listed],
        digests=table["digest"][listed],
        parents=table["parent"][listed],
        sequences=table["sequence"][listed],
        num_torn=int(np.count_nonzero(kinds == TORN)),
        num_corrupt=int(np.count_nonzero(kinds == CORRUPT)),
        num_foreign=int(np.count_nonzero(kinds == FOREIGN)),
        num_repeated=len(good) - len(listed),
    )


def _joined(arrays: list[np.ndarray], dtype: np.dtype | type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype=dtype)
