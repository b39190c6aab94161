"""What a put is made of: checked before anything is sent, copied in bulk."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from xllm.errors import TransferError
from xllm.kv import failpoints
from xllm.transfer.put_wire import MAX_NOTE_BYTES, MAX_PIECES

Piece = tuple[int, memoryview]
# From here on numpy copies, which lets other threads run meanwhile; below, its call costs more than the copy (measured:
# 4 KiB take it twice as long as a slice of a memoryview does).
LARGE_BYTES = 65_536


def as_bytes(pieces: Sequence[Piece], note: bytes) -> list[Piece]:
    """The pieces, each as flat bytes. Raises TransferError for what no put may have."""
    if len(pieces) > MAX_PIECES or len(note) > MAX_NOTE_BYTES:
        raise TransferError(f"a put has {MAX_PIECES} pieces and a note of {MAX_NOTE_BYTES} bytes at most, "
                            f"got {len(pieces)} and {len(note)}")  # fmt: skip
    return [(at, data if data.format == "B" and data.ndim == 1 and data.contiguous else data.cast("B"))
            for at, data in pieces]  # fmt: skip


def lengths(pieces: Iterable[Piece]) -> list[tuple[int, int]]:
    """(offset, length) of each."""
    return [(at, len(data)) for at, data in pieces]


def checksum(pieces: Iterable[Piece]) -> int:
    """CRC-32 of all bytes, one piece after the other."""
    crc = 0
    for _, data in pieces:
        crc = zlib.crc32(data, crc)
    return crc


def copy(memory: memoryview, pieces: Sequence[Piece]) -> None:
    """Write each piece at its offset."""
    half = len(pieces) // 2
    for index, (at, data) in enumerate(pieces):
        if index == half and failpoints.armed is not None:
            failpoints.hit("transfer.put_half")
        num_bytes = len(data)
        if num_bytes < LARGE_BYTES:
            memory[at : at + num_bytes] = data
        else:
            np.copyto(np.frombuffer(memory, np.uint8, num_bytes, at), np.frombuffer(data, np.uint8))
