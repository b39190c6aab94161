"""One file of a shared store: written once by one process, read by any number of others, on this machine or another.

The file has the disk tier's format (`disk_format.py`), but nothing in it is ever overwritten: slots are filled in their
order, a batch's payloads first, then its headers, and the file is deleted as a whole. So at any place there is either
nothing or the one block that will ever be there, and a reader that caches pages (NFS) never mixes two blocks.

Payloads and headers are written through two opens of the file. NFS sends what was written to the server when the file
is closed, and a reader asks for it when it opens: so whoever sees the header sees the payload (close-to-open). No mmap,
no lock, no append.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xllm.kv import failpoints
from xllm.kv.disk_format import (
    BLANK,
    GOOD,
    HEADER_BYTES,
    HEADER_DTYPE,
    PAGE_BYTES,
    TORN,
    Geometry,
    classify_headers,
    pack_superblock,
    read_superblock,
)
from xllm.kv.disk_seal import Seal
from xllm.kv.disk_segment import SUFFIX, TEMPORARY_SUFFIX, read_into, temporary_path, write_all
from xllm.private_files import is_own_file

__all__ = ["SUFFIX", "TEMPORARY_SUFFIX", "SharedSegment", "create_file", "fill", "open_file", "read_segment"]
# What an operation on a file fails with that was deleted here, and on another machine while this one had it open (NFS).
GONE = (errno.ENOENT, errno.ESTALE)
_PIECE_SLOTS = 512  # headers that are read at a time, 64 KiB: chosen; a reader that is up to date reads one piece


class SharedSegment:
    """A segment as a reader knows it. Changed by the thread that refreshes the index only.

    num_known: of its slots from the first on, how many have been looked at. digests: of its good blocks.
    """

    __slots__ = ("digests", "first_slot", "geometry", "num_known", "path")

    def __init__(self, path: Path, number: int, geometry: Geometry):
        self.path, self.geometry = path, geometry
        self.first_slot = number * geometry.slots_per_segment
        self.num_known = 0
        self.digests: list[bytes] = []

    @property
    def is_full(self) -> bool:
        return self.num_known == self.geometry.slots_per_segment

    def read_news(self, seal: Seal, *, is_last: bool) -> tuple[list[tuple[int, bytes]], dict[int, int]]:
        """The blocks that were added since the last call, as (index in the segment, digest), and how many headers were
        bad, by kind (`disk_format.TORN` ...). is_last: its writer may still be filling it; torn headers at its end
        are then looked at again next time. Raises OSError."""
        table, num_stored = self._read_table()
        kinds = classify_headers(table, self.geometry, seal, self.first_slot + self.num_known)
        beyond = kinds[max(0, num_stored - self.num_known) :]
        beyond[beyond == GOOD] = TORN  # the file is truncated
        good = np.flatnonzero(kinds == GOOD)
        known = np.flatnonzero((kinds != TORN) & (kinds != BLANK))
        num = (int(known[-1]) + 1 if len(known) else 0) if is_last else len(table)
        news = [(self.num_known + i, table["digest"][i].tobytes()) for i in good.tolist()]
        bad = kinds[:num][(kinds[:num] != GOOD) & (kinds[:num] != BLANK)]
        self.num_known += num
        self.digests += [digest for _, digest in news]
        return news, {int(kind): int(count) for kind, count in zip(*np.unique(bad, return_counts=True))}

    def _read_table(self) -> tuple[np.ndarray, int]:
        """(the headers after the known ones, up to a piece that ends in a blank one: HEADER_DTYPE [N], how many slots
        lie wholly within the file)."""
        pieces = []
        fd = open_file(self.path)
        try:
            at, num_stored = self.num_known, self.geometry.payloads_in(os.fstat(fd).st_size)
            while at < self.geometry.slots_per_segment:
                piece = np.zeros(min(_PIECE_SLOTS, self.geometry.slots_per_segment - at), dtype=HEADER_DTYPE)
                read_into(fd, piece.view(np.uint8).data, self.geometry.header_offset(at))
                pieces.append(piece)
                at += len(piece)
                if not piece[-1:].view(np.uint8).any():
                    break
        finally:
            os.close(fd)
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=HEADER_DTYPE), num_stored


def open_file(path: Path) -> int:
    """A descriptor to read a segment. Raises OSError, PermissionError if it is no file of this user alone."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not is_own_file(os.fstat(fd)):
        os.close(fd)
        raise PermissionError(f"{path} is a link, another user's, or writable by others")
    return fd


def read_segment(path: Path, fingerprint: bytes, payload_bytes: int) -> SharedSegment | None:
    """The segment in a file; None if it is not one of this store. Raises OSError."""
    fd = open_file(path)
    try:
        page = bytearray(PAGE_BYTES)
        count = read_into(fd, memoryview(page), 0)
    finally:
        os.close(fd)
    found = read_superblock(bytes(page[:count]))
    if found is None or (found[1].fingerprint, found[1].payload_bytes) != (fingerprint, payload_bytes):
        return None
    return SharedSegment(path, *found)


def create_file(path: Path, number: int, geometry: Geometry) -> None:
    """An empty segment, which appears under `path` when its first page is complete. Raises OSError."""
    temporary = temporary_path(path)
    fd = os.open(temporary, os.O_WRONLY | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        write_all(fd, memoryview(pack_superblock(geometry, number)), 0)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    _pass("store.segment_created")


def fill(path: Path, geometry: Geometry, first: int, headers: bytes, payloads: Sequence[memoryview]) -> None:
    """Write blocks into the slots from `first` on: complete for readers when this returns. Raises OSError; readers then
    find each of them whole or not at all, and the slots must not be used again."""
    fd = _open_to_write(path)
    try:
        for index, payload in enumerate(payloads, first):
            write_all(fd, payload, geometry.payload_offset(index))
    finally:
        os.close(fd)
    _pass("store.payloads_written")
    fd = _open_to_write(path)
    try:
        half = HEADER_BYTES // 2 if failpoints.armed is not None else 0
        write_all(fd, memoryview(headers)[: len(headers) - half], geometry.header_offset(first))
        _pass("store.headers_half")
        write_all(fd, memoryview(headers)[len(headers) - half :], geometry.header_offset(first) + len(headers) - half)
    finally:
        os.close(fd)
    _pass("store.headers_written")


def _open_to_write(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)


def _pass(point: str) -> None:
    if failpoints.armed is not None:
        failpoints.hit(point)
