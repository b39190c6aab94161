"""`CudaVmm`: the `VmmDriver` protocol (backends/vmm.py) by the CUDA driver's virtual memory management.

A physical page is one `cuMemCreate` allocation, so each page is mapped by a call of its own and may be mapped at
several addresses. Needs the package cuda-bindings, which is imported with the first object. Exercised on a GPU only.
CUDA driver API, "Virtual Memory Management".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Pool:
    """The allocations behind `num_pages` pages of `page_bytes`."""

    def __init__(self, handles: list[Any], page_bytes: int):
        self.handles, self.page_bytes, self.num_pages = handles, page_bytes, len(handles)


class Span:
    """What torch makes a tensor of; the tensor keeps it, and so `owner`, alive."""

    def __init__(self, address: int, num_bytes: int, owner: object):
        self.owner = owner
        self.__cuda_array_interface__ = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False),
                                         "strides": None, "version": 3}


class CudaVmm:
    """A `VmmDriver` over one CUDA device; the contract of each method stands in `backends/vmm.py`. Raises RuntimeError
    without cuda-bindings or where the device lacks the calls.

    Nothing on the device may use addresses while they are mapped or unmapped: wait for the streams before.
    """

    def __init__(self, device: int = 0):
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise RuntimeError("virtual memory management on CUDA needs the package cuda-bindings") from error
        if not torch.cuda.is_available():
            raise RuntimeError("virtual memory management on CUDA needs a CUDA device, and torch sees none")
        torch.cuda.set_device(device)
        torch.cuda.synchronize()  # makes the device's context current
        self._cu: Any = driver
        self._property = driver.CUmemAllocationProp()
        self._property.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._property.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._property.location.id = device
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._property.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        recommended = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        self.granularity_bytes = int(self._call("cuMemGetAllocationGranularity", self._property, recommended))
        self._mapped: dict[int, int] = {}  # address -> bytes: an unmapping must cover whole mappings and no gaps
        self._device = device

    def max_mappings(self) -> int | None:
        return None

    def reserve(self, num_bytes: int) -> int:
        return int(self._call("cuMemAddressReserve", num_bytes, 0, 0, 0))

    def create(self, num_pages: int, page_bytes: int) -> Pool:
        assert page_bytes % self.granularity_bytes == 0
        pool = Pool([], page_bytes)
        try:
            for _ in range(num_pages):
                pool.handles.append(self._call("cuMemCreate", page_bytes, self._property, 0))
            pool.num_pages = num_pages
            self._clear(pool)
        except BaseException:
            self.destroy(pool)
            raise
        return pool

    def _clear(self, pool: Pool) -> None:
        """Fill the pool with zeros: fresh memory may hold anything, NaN as well."""
        size = pool.num_pages * pool.page_bytes
        address = self.reserve(size)
        try:
            self.map(address, pool, 0, pool.num_pages)
            self._call("cuMemsetD8", address, 0, size)
            torch.cuda.synchronize(self._device)
        finally:
            self.release(address, size)

    def map(self, address: int, pool: Any, first_page: int, num_pages: int, *, touch: bool = True) -> None:
        assert first_page >= 0 and first_page + num_pages <= pool.num_pages
        size = pool.page_bytes
        self.unmap(address, num_pages * size)
        for number in range(num_pages):
            at = address + number * size
            self._call("cuMemMap", at, size, 0, pool.handles[first_page + number], 0)
            self._mapped[at] = size
        self._call("cuMemSetAccess", address, num_pages * size, [self._access], 1)

    def unmap(self, address: int, num_bytes: int) -> None:
        at, end = address, address + num_bytes
        while at < end:
            size = self._mapped.pop(at, 0)
            if size:
                self._call("cuMemUnmap", at, size)
            at += size or self.granularity_bytes

    def release(self, address: int, num_bytes: int) -> None:
        for at in [at for at in self._mapped if address <= at < address + num_bytes]:
            self._call("cuMemUnmap", at, self._mapped.pop(at))
        self._call("cuMemAddressFree", address, num_bytes)

    def destroy(self, pool: Any) -> None:
        while pool.handles:
            self._call("cuMemRelease", pool.handles.pop())

    def tensor(self, address: int, num_bytes: int, dtype: torch.dtype, owner: object) -> Tensor:
        """The first page must be mapped: torch asks the driver which device the address belongs to."""
        flat = torch.as_tensor(Span(address, num_bytes, owner), device=torch.device("cuda", self._device))
        return flat.view(dtype)

    def _call(self, name: str, *arguments: Any) -> Any:
        """One call of the driver: its result. Raises MemoryError or RuntimeError, naming the call."""
        error, *results = getattr(self._cu, name)(*arguments)
        if error == self._cu.CUresult.CUDA_SUCCESS:
            return results[0] if results else None
        text = f"{name} failed: {error.name}"
        raise MemoryError(text) if error == self._cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY else RuntimeError(text)
