"""`PinnedMemory`: host memory that a driver has registered, for as long as a tensor uses it.

A driver keeps a table of the ranges that are registered with it. It refuses one that overlaps another, and goes on
copying from and to the physical pages of a range that has been unmapped; so each range consists of pages of its own,
and is unregistered before they go back to the system.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections import deque
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_log = logging.getLogger(__name__)


class PinningDriver(Protocol):
    """The driver's calls. They return its error codes, 0 for none."""

    def register(self, address: int, num_bytes: int) -> int:
        """Pin whole pages."""
        ...

    def unregister(self, address: int) -> int:
        """End the registration that begins at this address."""
        ...

    def is_capturing(self) -> bool:
        """Whether this thread records a graph, and so must not wait for the device."""
        ...

    def synchronize(self) -> None:
        """Wait until nothing queued on the device uses host memory."""
        ...


class PinnedMemory:
    """Allocates pinned tensors, whose views keep the memory alive as well. Any thread may drop the last one."""

    def __init__(self, driver: PinningDriver):
        self._driver = driver
        self._dropped: deque[mmap.mmap] = deque()  # registered, and used by no tensor any more

    def allocate(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], zeros, aligned to a page. Raises MemoryError where the driver refuses."""
        self.collect()
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        mapping = mmap.mmap(-1, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE,
                            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if error := self._driver.register(_address(mapping), len(mapping)):
            raise MemoryError(f"the driver cannot pin {num_bytes} bytes of host memory: error {error}")
        array = np.frombuffer(mapping, dtype=np.uint8)
        # The tensor's storage holds the array. What ends with it holds the mapping, which is thus unmapped last.
        weakref.finalize(array, self._drop, mapping).atexit = False
        return torch.from_numpy(array)[:num_bytes]

    def _drop(self, mapping: mmap.mmap) -> None:
        self._dropped.append(mapping)
        self.collect()

    def collect(self) -> None:
        """Free the memory that no tensor uses; does nothing while this thread records a graph, a later call does it
        then."""
        if not self._dropped or self._driver.is_capturing():
            return
        mappings = []
        while self._dropped:  # the last tensor of another may be dropped in any thread meanwhile
            try:
                mappings.append(self._dropped.popleft())
            except IndexError:
                break
        _KEPT.extend(mappings)
        self._driver.synchronize()
        for mapping in mappings:
            if error := self._driver.unregister(_address(mapping)):
                _log.error("the driver does not let go of %d bytes of host memory: error %d", len(mapping), error)
            else:
                _KEPT.remove(mapping)


_KEPT: list[mmap.mmap] = []  # still registered, so not to be unmapped: where the driver failed, never


def _address(mapping: mmap.mmap) -> int:
    return int(np.frombuffer(mapping, dtype=np.uint8).ctypes.data)
