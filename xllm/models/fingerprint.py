"""A digest of everything that a stored KV block depends on, so that one model's blocks are never read by another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

# Weights up to this size are hashed whole. Chosen: a second or two of reading; larger ones are sampled.
FULL_READ_BYTES = 2 << 30
SAMPLE_BYTES = 64 << 10  # of each piece of a larger file. Chosen: a read of a disk costs as much for less
PIECES = 256  # of a larger file. Chosen: 16 MiB of reading a file
# Where no time of change tells that a file is another one. Chosen: of a file of 5 GiB no change of 1.3 MiB in one piece
# is missed, which is less than any matrix of a model of that size.
PORTABLE_PIECES = 4096
CONFIG_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
                "model.safetensors.index.json")


def fingerprint(folder: Path, portable: bool = False, /, **settings: object) -> bytes:
    """BLAKE2b-256 of a checkpoint and of the settings that shape its KV (dtype, layout, block size, quantisation).

    Larger checkpoints than `FULL_READ_BYTES` are sampled: every file's size, time of change, header, and pieces all
    over it. portable: the same for every copy of the checkpoint, on any machine: without the times, and with more
    pieces.
    """
    state = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=32,
                            person=b"xllm-kv-store")
    for name in CONFIG_FILES:
        path = folder / name
        if path.exists():
            state.update(name.encode())
            state.update(hashlib.blake2b(path.read_bytes()).digest())
    weights = sorted(folder.glob("*.safetensors"))
    whole = sum(path.stat().st_size for path in weights) <= FULL_READ_BYTES
    for path in weights:
        status = path.stat()
        state.update(f"{path.name}:{status.st_size}:{0 if whole or portable else status.st_mtime_ns}".encode())
        for piece in _pieces(path, status.st_size, 0 if whole else PORTABLE_PIECES if portable else PIECES):
            state.update(piece)
    return state.digest()


def _pieces(path: Path, size: int, num_pieces: int) -> Iterator[bytes]:
    """Pieces that lie evenly over a file; 0: all of it."""
    with path.open("rb") as file:
        if not num_pieces:
            while piece := file.read(1 << 20):
                yield piece
            return
        for part in range(num_pieces):
            file.seek(part * size // num_pieces)
            yield file.read(SAMPLE_BYTES)
