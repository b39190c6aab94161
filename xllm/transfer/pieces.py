"""What a put is made of: checked before anything is sent, copied in bulk."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from xllm.errors import TransferError
from xllm.kv import failpoints
from xllm.transfer.put_wire import MAX_NOTE_BYTES, MAX_PIECES

PutPiece = tuple[int, memoryview]
# From here on numpy copies, which lets other threads run meanwhile; below, a slice of a memoryview costs less (chosen:
# other threads wait for 0.1 ms at most).
LARGE_BYTES = 262_144


def as_bytes(pieces: Sequence[PutPiece], note: bytes) -> list[PutPiece]:
    """The pieces, each as flat bytes. Raises TransferError for what no put may have."""
    if len(pieces) > MAX_PIECES or len(note) > MAX_NOTE_BYTES:
        raise TransferError(f"a put has {MAX_PIECES} pieces and a note of {MAX_NOTE_BYTES} bytes at most, "
                            f"got {len(pieces)} and {len(note)}")  # fmt: skip
    if all([data.format == "B" and data.ndim == 1 and data.contiguous for _, data in pieces]):  # noqa: C419, is faster
        return list(pieces)
    return [(at, data.cast("B")) for at, data in pieces]


def lengths(pieces: Iterable[PutPiece]) -> list[tuple[int, int]]:
    """(offset, length) of each."""
    return [(at, len(data)) for at, data in pieces]


def checksum(pieces: Iterable[PutPiece]) -> int:
    """CRC-32 of all bytes, one piece after the other."""
    crc = 0
    for _, data in pieces:
        crc = zlib.crc32(data, crc)
    return crc


def copy(memory: memoryview, pieces: Sequence[PutPiece]) -> None:
    """Write each piece at its offset."""
    half = len(pieces) // 2
    _copy(memory, pieces[:half])
    if failpoints.armed is not None:
        failpoints.hit("transfer.put_half")
    _copy(memory, pieces[half:])


def _copy(memory: memoryview, pieces: Sequence[PutPiece]) -> None:
    for at, data in pieces:
        num_bytes = len(data)
        if num_bytes < LARGE_BYTES:
            memory[at : at + num_bytes] = data
        else:
            np.copyto(np.frombuffer(memory, np.uint8, num_bytes, at), np.frombuffer(data, np.uint8))
