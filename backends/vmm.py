"""`VmmDriver`: virtual memory management of a device, which the xtensor KV layout is built on.

A range of addresses is reserved without memory behind it; a pool of physical pages is created once; pages are mapped at
any page of the range, one page at several addresses if wanted, and unmapped again. One tensor lies over the whole
range. **Touching an address without a page behind it kills the process**, so nobody may print, sum, copy or make
contiguous such a tensor; only views that lie on mapped pages may be read or written.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class VmmDriver(Protocol):
    """One device's calls. Addresses and sizes are bytes, multiples of `granularity_bytes`.

    Calls for different addresses may come from different threads; the caller sees to it that nothing on the
    device reads or writes an address while it is mapped or unmapped.
    """

    granularity_bytes: int

    def max_mappings(self) -> int | None:
        """How many more mappings this process may hold, with a margin for other users of mappings; None: no limit.
        Pages that are neighbours both in the range and in the pool count as one."""
        ...

    def reserve(self, num_bytes: int) -> int:
        """Reserve a range of addresses; returns its start. Raises MemoryError if there is none of that size."""
        ...

    def create(self, num_pages: int, page_bytes: int) -> Any:
        """Create a pool of physical pages, numbered from 0; contents finite. Memory may be taken at first touch. The
        result is opaque. Raises MemoryError."""
        ...

    def map(self, address: int, pool: Any, first_page: int, num_pages: int, *, touch: bool = True) -> None:
        """Show pages `first_page` to `first_page + num_pages - 1` of the pool at `address` and behind it, in order.

        What was mapped there is replaced. touch: take the page faults now rather than at first use, where the
        device has such. Raises MemoryError if the system refuses; what these addresses show is then undefined.
        """
        ...

    def unmap(self, address: int, num_bytes: int) -> None:
        """Unmap every page in this part of the range; the addresses stay reserved. Parts without a page are left as
        they are."""
        ...

    def release(self, address: int, num_bytes: int) -> None:
        """Free a whole reservation and unmap everything in it. No tensor over it may be used again."""
        ...

    def destroy(self, pool: Any) -> None:
        """Free a pool. Pages that are still mapped stay until they are unmapped."""
        ...

    def tensor(self, address: int, num_bytes: int, dtype: torch.dtype, owner: object) -> Tensor:
        """A flat tensor over reserved addresses; touches nothing. The tensor keeps `owner` alive where the
        device lets it, so that `owner` can release the range when the last view is gone."""
        ...
