"""`Mover`: copies the bytes of KV blocks for the KV tiers. Implemented by `runner/host_mover.py`, and by tests."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Mover(Protocol):
    """Copies whole KV blocks between the device and the slots of host memory.

    Called from worker threads, at most one per direction; every method blocks until its bytes are there. Blocks and
    slots are int32 or int64 arrays of equal length without repeats. The caller guarantees that nothing writes a source
    or touches a target meanwhile.
    """

    num_layers: int
    num_host_slots: int
    payload_bytes: int  # of one block, all layers, in the stored format

    def save(self, block_ids: np.ndarray, slots: np.ndarray) -> None:
        """Copy device blocks to host slots, all layers."""
        ...

    def load_layer(self, slots: np.ndarray, block_ids: np.ndarray, layer: int) -> None:
        """Copy one layer of host slots to device blocks."""
        ...

    def payload(self, slot: int) -> memoryview:
        """The bytes of a host slot, writable, as they go to disk."""
        ...
