"""A shared store as one engine sees it, without a thread: it looks when it is told to."""

from pathlib import Path

from xllm.kv.disk_format import make_geometry
from xllm.kv.shared_store import SharedStore

FINGERPRINT = bytes(32)


class HeldView:
    """A `StoreView` of what this process itself has listed; `look` reads what is new."""

    trouble = None

    def __init__(self, shared: SharedStore):
        self._shared = shared
        self.has, self.note, self.forget, self.look = shared.has, shared.note, shared.forget, shared.refresh
        self.is_closed = False

    def __len__(self) -> int:
        return len(self._shared)

    def close(self) -> None:
        self.is_closed = True


OPENED: list[SharedStore] = []  # closed after each test (`conftest.py`)


def open_shared_store(folder: Path, block_size: int, num_blocks: int) -> SharedStore:
    """Of blocks of 8 bytes a token, two of them a segment: one process's."""
    geometry = make_geometry(FINGERPRINT, block_size * 8, 2 * 4096)
    size = num_blocks // 2 * geometry.payload_offset(2)
    store = SharedStore(folder, fingerprint=FINGERPRINT, payload_bytes=block_size * 8, capacity_bytes=size)
    if store._writer is not None:
        store._writer.geometry = geometry
    OPENED.append(store)
    return store
