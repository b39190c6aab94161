"""One file of the disk tier: it is created under a temporary name, sized, read and written through pread and pwrite.

No mmap: a file truncated under a mapping is a SIGBUS, under pread a short read.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

from xllm.kv import failpoints
from xllm.kv.disk_format import (
    BLANK_HEADER,
    HEADER_BYTES,
    HEADER_DTYPE,
    PAGE_BYTES,
    WRITING_HEADER,
    Geometry,
    pack_superblock,
    unpack_superblock,
)
from xllm.private_files import is_own_file

SUFFIX = ".kv"
TEMPORARY_SUFFIX = ".tmp"
_OPEN_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class DiskSegment:
    """The slots `first_slot .. first_slot + num_slots - 1`. All methods raise OSError.

    One thread may change it; others may read slots that it does not change at the time.
    """

    def __init__(self, fd: int, path: Path, number: int, geometry: Geometry, num_store_slots: int):
        self.path = path
        self.number = number
        self.first_slot = number * geometry.slots_per_segment
        self.num_slots = max(0, min(num_store_slots - self.first_slot, geometry.slots_per_segment))
        self.is_dirty = False  # written to since the last sync
        self._fd = fd
        self._geometry = geometry
        self._size_bytes = os.fstat(fd).st_size

    # --- one slot; `index` counts from the segment's first

    def write(self, index: int, header: bytes, payload: memoryview) -> None:
        """Replace a slot's block. Until all of it is written, the slot's header says that a write is under way."""
        self.resize()
        self.is_dirty = True
        self._put_header(index, WRITING_HEADER, "disk.header_invalidated")
        half = len(payload) // 2 if failpoints.armed is not None else 0
        offset = self._geometry.payload_offset(index)
        if half:
            write_all(self._fd, payload[:half], offset)
            failpoints.hit("disk.payload_half")
        write_all(self._fd, payload[half:], offset + half)
        _pass("disk.payload_written")
        if failpoints.armed is not None:
            half = HEADER_BYTES // 2
            write_all(self._fd, memoryview(header)[:half], self._geometry.header_offset(index))
            failpoints.hit("disk.header_half")
        self._put_header(index, header, "disk.header_written")

    def erase(self, index: int) -> None:
        """Zero the slot's header: it holds nothing."""
        self.is_dirty = True
        self._put_header(index, BLANK_HEADER, "disk.erased")

    def read_header(self, index: int) -> bytes:
        """The header as it stands: HEADER_BYTES, fewer from a truncated file."""
        header = bytearray(HEADER_BYTES)
        count = read_into(self._fd, memoryview(header), self._geometry.header_offset(index))
        return bytes(header[:count])

    def read_payload(self, index: int, out: memoryview) -> bool:
        """Read the slot's payload into `out`; returns False if the file ends before the payload does."""
        return read_into(self._fd, out, self._geometry.payload_offset(index)) == len(out)

    def _put_header(self, index: int, header: bytes, point: str) -> None:
        write_all(self._fd, memoryview(header), self._geometry.header_offset(index))
        _pass(point)

    # --- the whole file

    def read_table(self) -> np.ndarray:
        """The headers of its slots: HEADER_DTYPE [num_slots]; blank where the file is truncated."""
        table = np.zeros(self.num_slots, dtype=HEADER_DTYPE)
        read_into(self._fd, table.view(np.uint8).data, self._geometry.header_offset(0))
        return table

    @property
    def num_stored(self) -> int:
        """How many of its slots lie wholly within the file."""
        return min(self._geometry.slots_in(self._size_bytes), self.num_slots)

    @property
    def wanted_bytes(self) -> int:
        """How long the file must be to hold all its slots."""
        return self._geometry.payload_offset(self.num_slots)

    @property
    def is_too_large(self) -> bool:
        return self._size_bytes > self.wanted_bytes

    def resize(self) -> None:
        """Make the file as long as its slots need, if it is not. A slot whose payload the file did not hold loses its
        header first: else the header would be trusted once the file is long enough again."""
        if self._size_bytes == self.wanted_bytes:
            return
        self.is_dirty = True
        self._drop_headers(self.num_stored)
        _pass("disk.headers_dropped")
        if self.is_too_large:
            os.ftruncate(self._fd, self.wanted_bytes)
        else:
            allocate(self._fd, self.wanted_bytes)
        self._size_bytes = self.wanted_bytes
        _pass("disk.segment_resized")

    def shrink(self) -> None:
        """Cut the file after its last slot, if it is longer."""
        if self.is_too_large:
            self.resize()

    def delete(self) -> None:
        """Close it and remove the file."""
        self.close()
        self.path.unlink()
        _pass("disk.segment_deleted")

    def sync(self) -> None:
        """Sync what was written since the last sync (fdatasync): it is on the disk once this returns."""
        if self.is_dirty:
            self.is_dirty = False
            _pass("disk.sync")
            os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def _drop_headers(self, first_index: int) -> None:
        start, stop = self._geometry.header_offset(first_index), min(self._geometry.payload_start, self._size_bytes)
        if stop > start:
            write_all(self._fd, memoryview(bytes(stop - start)), start)


def create_segment(path: Path, number: int, geometry: Geometry, num_store_slots: int) -> DiskSegment:
    """Segment `number` of a store of `num_store_slots`: a file with all its space allocated, which appears
    under `path` only when it is complete."""
    temporary = temporary_path(path)
    fd = os.open(temporary, _OPEN_FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        superblock = memoryview(pack_superblock(geometry, number))
        write_all(fd, superblock[: PAGE_BYTES // 2], 0)
        _pass("disk.superblock_half")
        write_all(fd, superblock[PAGE_BYTES // 2 :], PAGE_BYTES // 2)
        segment = DiskSegment(fd, path, number, geometry, num_store_slots)
        segment.resize()
        os.fsync(fd)
        _pass("disk.segment_created")
        os.rename(temporary, path)
        _pass("disk.segment_renamed")
    except OSError:
        os.close(fd)
        temporary.unlink(missing_ok=True)
        raise
    return segment


def temporary_path(path: Path) -> Path:
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def open_segment(path: Path, geometry: Geometry, num_store_slots: int) -> DiskSegment | None:
    """None if this is not a segment of this geometry and fingerprint, or no file of this user alone (`is_own_file`)."""
    if not is_own_file(path.lstat()):
        return None
    fd = os.open(path, _OPEN_FLAGS)
    number = None
    try:
        if not is_own_file(os.fstat(fd)):  # another one by now
            return None
        page = bytearray(PAGE_BYTES)
        count = read_into(fd, memoryview(page), 0)
        number = unpack_superblock(bytes(page[:count]), geometry)
    finally:
        if number is None:
            os.close(fd)
    return None if number is None else DiskSegment(fd, path, number, geometry, num_store_slots)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """pwrite until all of it is written."""
    while len(data):
        _pass("disk.write")
        count = os.pwrite(fd, data, offset)
        if not count:
            raise OSError(errno.EIO, "nothing written")
        data, offset = data[count:], offset + count


def read_into(fd: int, out: memoryview, offset: int) -> int:
    """pread until `out` is full or the file ends; returns how many bytes."""
    done = 0
    while done < len(out):
        _pass("disk.read")
        count = os.preadv(fd, [out[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def allocate(fd: int, size_bytes: int) -> None:
    """Take the space now, so that a full disk is an error here and not in the middle of a block."""
    _pass("disk.allocate")
    os.posix_fallocate(fd, 0, size_bytes)


def _pass(point: str) -> None:
    if failpoints.armed is not None:
        failpoints.hit(point)
