"""Marks of a checkpoint's files: whether ranks read the same ones, and whether they change meanwhile."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from xllm.errors import ModelError
from xllm.parallel.groups import Group

# Of each file. Chosen: a millisecond of reading, and other weights differ all over.
NUM_SAMPLES, SAMPLE_BYTES = 16, 4096
MARK_BYTES = 8  # chosen: two checkpoints have the same mark once in 2^64


def contents_mark(folder: Path) -> bytes:
    """A digest of the names, sizes and samples of the files of weights, their headers among them, and of the config:
    the same on every machine that has the same files."""
    state = hashlib.blake2b(digest_size=MARK_BYTES)
    for path in _files(folder):
        size = path.stat().st_size
        state.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for part in range(NUM_SAMPLES):
                file.seek(part * size // NUM_SAMPLES)
                state.update(file.read(SAMPLE_BYTES))
    return state.digest()


def change_mark(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """(name, size, time of change, inode) of those files: another value once one was written or replaced."""
    found = ((path, path.stat()) for path in _files(folder))
    return tuple((path.name, status.st_size, status.st_mtime_ns, status.st_ino) for path, status in found)


def check_same_contents(folder: Path, group: Group, device: torch.device) -> None:
    """Raise ModelError on all ranks of the group if they find different checkpoints. All call it at the same time;
    device: of the group's exchanges."""
    if group.size == 1:
        return
    mark = torch.frombuffer(bytearray(contents_mark(folder)), dtype=torch.uint8).to(device, torch.int32)
    marks_NB = group.all_gather(mark).view(group.size, MARK_BYTES)
    others = [rank for rank in range(group.size) if not torch.equal(marks_NB[rank], marks_NB[0])]
    if others:
        raise ModelError(f"worker rank {', '.join(map(str, others))} finds another checkpoint in {folder} than rank 0: "
                         "its files were changed, or are not the same on all machines")


def _files(folder: Path) -> list[Path]:
    return sorted((path for path in (folder / "config.json", *folder.glob("*.safetensors")) if path.is_file()),
                  key=lambda path: path.name)
