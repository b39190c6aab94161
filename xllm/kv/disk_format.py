"""The bytes of the disk tier: what a segment file holds, and how a damaged part of it is told from a good one.

    segment    superblock | table of slot headers | payloads
               4 KiB        128 bytes a slot        one slot each, its size rounded up to 4 KiB

All numbers are little-endian. A header is 128 bytes on a multiple of 128, so it never straddles a sector.
It is in one of three states:

    blank      all zero: the slot holds nothing
    writing    the magic WRITING, then zeros: a payload is on its way
    complete   the magic COMPLETE, all fields, the tags of the store's key, and a checksum over them

A complete header names its own slot and the store's fingerprint, so that neither a header nor a file that
was copied elsewhere is believed. Checksums are CRC-32 (zlib): it releases the GIL on payloads, finds every
error burst of up to 32 bits, and passes 1 in 2^32 of all other damage. They protect from accidents; from what others
write, tags do (`disk_seal.py`). Without a key the tags are zeros.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from xllm.kv.block import DIGEST_BYTES
from xllm.kv.disk_seal import HEADER_TAG_BYTES, PAYLOAD_TAG_BYTES, Seal

VERSION = 1  # of this format; files of another version are left alone
PAGE_BYTES = 4096  # payloads begin on multiples of it: the page of Linux on x86-64, and the sector of most disks
HEADER_BYTES = 128  # the fields below, exactly; a power of two, so that no header straddles a sector of 512 bytes
FINGERPRINT_BYTES = 32  # a 256-bit digest (`models/fingerprint.py`)
SUPERBLOCK_MAGIC = b"xLLM-KVS"
COMPLETE = b"xLLM-KVB"
WRITING = b"xLLM-KVw"
MAX_SEQUENCE = 1 << 62  # far beyond what a store writes in its life, and safe to add to in an int64
# Chosen: bounds the table of headers to 2 MiB, and with it the smallest capacity, where blocks are small.
MAX_SEGMENT_SLOTS = 16384

# magic, version, segment number, fingerprint, payload bytes, slot bytes, slots per segment; then the checksum
_SUPERBLOCK = struct.Struct("<8sII32sQQQ")
_CHECKSUM = struct.Struct("<I")
# magic, sequence number, digest, parent, fingerprint, payload bytes, slot, payload's checksum, payload's tag, the
# header's tag over all of it; checksum
_HEADER = struct.Struct(f"<8sq16s16s32sQII{PAYLOAD_TAG_BYTES}s{HEADER_TAG_BYTES}sI")
_CHECKED_BYTES = HEADER_BYTES - _CHECKSUM.size
_SEALED_BYTES = _CHECKED_BYTES - HEADER_TAG_BYTES
HEADER_DTYPE = np.dtype([
    ("magic", "<u8"), ("sequence", "<i8"), ("digest", "u1", DIGEST_BYTES), ("parent", "u1", DIGEST_BYTES),
    ("fingerprint", "u1", FINGERPRINT_BYTES), ("payload_bytes", "<u8"), ("slot", "<u4"), ("payload_crc", "<u4"),
    ("payload_tag", "u1", PAYLOAD_TAG_BYTES), ("tag", "u1", HEADER_TAG_BYTES), ("crc", "<u4"),
])  # fmt: skip
assert HEADER_DTYPE.itemsize == _HEADER.size == HEADER_BYTES

# What a header is found to be. All but BLANK and GOOD are misses, and counted under these names.
BLANK, GOOD, TORN, CORRUPT, FOREIGN = range(5)
WRITING_HEADER = WRITING.ljust(HEADER_BYTES, b"\0")
BLANK_HEADER = bytes(HEADER_BYTES)


@dataclass(frozen=True)
class Geometry:
    """Sizes that every segment of a store shares. They do not depend on the store's capacity, so that it may change."""

    fingerprint: bytes
    payload_bytes: int
    slots_per_segment: int

    @cached_property
    def slot_bytes(self) -> int:
        return _round_up(self.payload_bytes)

    @cached_property
    def payload_start(self) -> int:
        return PAGE_BYTES + _round_up(self.slots_per_segment * HEADER_BYTES)

    def header_offset(self, index: int) -> int:
        """Where the header of the segment's `index`-th slot begins."""
        return PAGE_BYTES + index * HEADER_BYTES

    def payload_offset(self, index: int) -> int:
        return self.payload_start + index * self.slot_bytes

    def slots_in(self, size_bytes: int) -> int:
        """How many payloads lie wholly in a segment file of this size."""
        return min(max(0, size_bytes - self.payload_start) // self.slot_bytes, self.slots_per_segment)

    def payloads_in(self, size_bytes: int) -> int:
        """The same of a file that ends with its last payload, and not with that one's slot."""
        return self.slots_in(size_bytes + self.slot_bytes - self.payload_bytes)

    def slots_for(self, capacity_bytes: int) -> int:
        """How many slots a store of this capacity has, superblocks and tables included."""
        full, rest_bytes = divmod(capacity_bytes, self.payload_offset(self.slots_per_segment))
        return full * self.slots_per_segment + self.slots_in(rest_bytes)


def make_geometry(fingerprint: bytes, payload_bytes: int, segment_bytes: int) -> Geometry:
    """Segments of about `segment_bytes`, at least one slot each."""
    num_slots = segment_bytes // _round_up(payload_bytes)
    return Geometry(fingerprint, payload_bytes, max(1, min(num_slots, MAX_SEGMENT_SLOTS)))


def pack_superblock(geometry: Geometry, segment: int) -> bytes:
    """The first page of segment number `segment`: bytes [PAGE_BYTES]."""
    fields = _SUPERBLOCK.pack(SUPERBLOCK_MAGIC, VERSION, segment, geometry.fingerprint, geometry.payload_bytes,
                              geometry.slot_bytes, geometry.slots_per_segment)  # fmt: skip
    return (fields + _CHECKSUM.pack(zlib.crc32(fields))).ljust(PAGE_BYTES, b"\0")


def unpack_superblock(page: bytes, geometry: Geometry) -> int | None:
    """The segment's number, or None if this is not a superblock of this very geometry and fingerprint."""
    if len(page) != PAGE_BYTES:
        return None
    segment = _SUPERBLOCK.unpack_from(page)[2]
    used_bytes = _SUPERBLOCK.size + _CHECKSUM.size
    return segment if page[:used_bytes] == pack_superblock(geometry, segment)[:used_bytes] else None


def read_superblock(page: bytes) -> tuple[int, Geometry] | None:
    """(the segment's number, its geometry) of any store's superblock; None if it is none, or damaged."""
    if len(page) != PAGE_BYTES:
        return None
    _, _, segment, fingerprint, payload_bytes, _, num_slots = _SUPERBLOCK.unpack_from(page)
    if not 0 < num_slots <= MAX_SEGMENT_SLOTS or not payload_bytes:
        return None
    geometry = Geometry(fingerprint, payload_bytes, num_slots)
    return None if unpack_superblock(page, geometry) is None else (segment, geometry)


def pack_header(geometry: Geometry, seal: Seal, slot: int, sequence: int, digest: bytes, parent: bytes,
                payload: memoryview) -> bytes:
    """A complete header: bytes [HEADER_BYTES]."""
    packed = _HEADER.pack(COMPLETE, sequence, digest, parent, geometry.fingerprint, geometry.payload_bytes,
                          slot, zlib.crc32(payload), seal.payload_tag(payload), b"", 0)  # fmt: skip
    checked = packed[:_SEALED_BYTES] + seal.header_tag(packed[:_SEALED_BYTES])
    return checked + _CHECKSUM.pack(_header_crc(checked))


@dataclass(frozen=True)
class GoodHeader:
    """What a header that is GOOD says about its payload."""

    digest: bytes
    payload_crc: int
    payload_tag: bytes


def unpack_good_header(header: bytes, geometry: Geometry, seal: Seal, slot: int) -> GoodHeader | None:
    """None if the header is not GOOD for this slot."""
    if len(header) != HEADER_BYTES:
        return None
    (magic, sequence, digest, _, fingerprint, payload_bytes, own_slot, payload_crc, payload_tag, tag,
     crc) = _HEADER.unpack(header)  # fmt: skip
    if magic != COMPLETE or crc != _header_crc(header):
        return None
    if (fingerprint, payload_bytes, own_slot) != (geometry.fingerprint, geometry.payload_bytes, slot):
        return None
    if not 0 <= sequence < MAX_SEQUENCE or not seal.fits_header(header[:_SEALED_BYTES], tag):
        return None
    return GoodHeader(digest, payload_crc, payload_tag)


def classify_headers(table: np.ndarray, geometry: Geometry, seal: Seal, first_slot: int) -> np.ndarray:
    """What each header of a table is (HEADER_DTYPE [N] -> int8 [N] of BLANK, GOOD, ...).

    The i-th is expected to be that of slot `first_slot + i`. A header of which only the first part was
    written has zeros where its checksum belongs: TORN, not CORRUPT.
    """
    kinds = np.full(len(table), CORRUPT, dtype=np.int8)
    magic, crc = table["magic"], table["crc"]
    unfinished = (magic == _as_int(WRITING)) | ((magic == _as_int(COMPLETE)) & (crc == 0))
    kinds[unfinished] = TORN
    kinds[~table.view(np.uint8).reshape(len(table), HEADER_BYTES).any(axis=1)] = BLANK
    complete = np.flatnonzero((magic == _as_int(COMPLETE)) & (crc != 0))
    raw = table.view(np.uint8).data
    headers = [raw[i * HEADER_BYTES : (i + 1) * HEADER_BYTES] for i in range(len(table))]
    sums = [_header_crc(headers[i]) for i in complete.tolist()]
    intact = complete[np.array(sums, dtype=np.uint32) == crc[complete]]
    own = table["slot"][intact] == first_slot + intact
    own &= table["payload_bytes"][intact] == geometry.payload_bytes
    own &= (table["fingerprint"][intact] == np.frombuffer(geometry.fingerprint, np.uint8)).all(axis=1)
    own &= (table["sequence"][intact] >= 0) & (table["sequence"][intact] < MAX_SEQUENCE)
    sealed = [seal.fits_header(headers[i][:_SEALED_BYTES], table["tag"][i].tobytes()) for i in intact.tolist()]
    kinds[intact] = np.where(own & np.array(sealed, dtype=bool), GOOD, FOREIGN)
    return kinds


def _header_crc(header: bytes | memoryview) -> int:
    return zlib.crc32(header[:_CHECKED_BYTES]) or 1  # zero means: not written yet


def _as_int(magic: bytes) -> int:
    return int.from_bytes(magic, "little")


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
