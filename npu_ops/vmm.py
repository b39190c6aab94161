"""`AclVmm`: the `VmmDriver` protocol (backends/vmm.py) by the virtual memory calls of Ascend's ACL runtime.

A physical page is one `aclrtMallocPhysical` allocation, so each page is mapped, and unmapped, by a call of its own and
may be mapped at several addresses. The calls go through ctypes on libascendcl.so, loaded with the first object;
tensors come from torch_npu. The calls are tested against a library that stands in for ACL; tensors on a device only.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import POINTER, Structure, byref, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from npu_ops.recording import CAPTURE_LOCK

LIBRARY = "libascendcl.so"
HBM_HUGE_PAGES = 4  # ACL_HBM_MEM_HUGE
ON_DEVICE = 1  # ACL_MEM_LOCATION_TYPE_DEVICE
RECOMMENDED = 1  # ACL_RT_MEM_ALLOC_GRANULARITY_RECOMMENDED
OUT_OF_MEMORY = (207001, 207018)  # ACL_ERROR_RT_MEMORY_ALLOCATION, ACL_ERROR_RT_RESOURCE_ALLOC_FAIL


class Location(Structure):
    """`aclrtMemLocation`."""

    _fields_ = [("id", c_uint32), ("type", c_int32)]


class PhysicalMemProp(Structure):
    """`aclrtPhysicalMemProp`."""

    _fields_ = [("handleType", c_int32), ("allocationType", c_int32), ("memAttr", c_int32), ("location", Location),
                ("reserve", c_uint64)]


SIGNATURES: dict[str, list[Any]] = {
    "aclrtSetDevice": [c_int32],
    "aclrtMemGetAllocationGranularity": [POINTER(PhysicalMemProp), c_int, POINTER(c_size_t)],
    "aclrtReserveMemAddress": [POINTER(c_void_p), c_size_t, c_size_t, c_void_p, c_uint64],
    "aclrtReleaseMemAddress": [c_void_p],
    "aclrtMallocPhysical": [POINTER(c_void_p), c_size_t, POINTER(PhysicalMemProp), c_uint64],
    "aclrtFreePhysical": [c_void_p],
    "aclrtMapMem": [c_void_p, c_size_t, c_size_t, c_void_p, c_uint64],
    "aclrtUnmapMem": [c_void_p],
    "aclrtMemset": [c_void_p, c_size_t, c_int32, c_size_t],
}


class Pool:
    """The allocations behind `num_pages` pages of `page_bytes`."""

    def __init__(self, handles: list[c_void_p], page_bytes: int):
        self.handles, self.page_bytes, self.num_pages = handles, page_bytes, len(handles)


class AclVmm:
    """A `VmmDriver` over one Ascend device; the contract of each method stands in `backends/vmm.py`. Raises
    RuntimeError without the library or its calls.

    Nothing on the device may use addresses while they are mapped or unmapped: synchronise before. Calls wait while a
    graph is captured, which they would break.
    """

    def __init__(self, device: int = 0, library: str = LIBRARY):
        try:
            self._acl = ctypes.CDLL(library)
            for name, arguments in SIGNATURES.items():
                function = getattr(self._acl, name)
                function.restype, function.argtypes = c_int, arguments
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"virtual memory management on an NPU needs {library} of CANN: {error}") from error
        self._device, self._local = device, threading.local()
        self._property = PhysicalMemProp(memAttr=HBM_HUGE_PAGES, location=Location(id=device, type=ON_DEVICE))
        granularity = c_size_t()
        self._call("aclrtMemGetAllocationGranularity", byref(self._property), RECOMMENDED, byref(granularity))
        self.granularity_bytes = granularity.value
        self._mapped: dict[int, int] = {}  # address -> bytes: each mapping is unmapped by its own start

    def max_mappings(self) -> int | None:
        return None

    def reserve(self, num_bytes: int) -> int:
        address = c_void_p()
        self._call("aclrtReserveMemAddress", byref(address), num_bytes, 0, None, 0)
        assert address.value is not None
        return address.value

    def create(self, num_pages: int, page_bytes: int) -> Pool:
        assert page_bytes % self.granularity_bytes == 0
        pool = Pool([], page_bytes)
        try:
            for _ in range(num_pages):
                handle = c_void_p()
                self._call("aclrtMallocPhysical", byref(handle), page_bytes, byref(self._property), 0)
                pool.handles.append(handle)
            pool.num_pages = num_pages
            self._clear(pool)
        except BaseException:
            self.destroy(pool)
            raise
        return pool

    def _clear(self, pool: Pool) -> None:
        """Zeros: fresh memory may hold anything, NaN as well."""
        address = self.reserve(pool.page_bytes)
        try:
            for number in range(pool.num_pages):
                self.map(address, pool, number, 1)
                self._call("aclrtMemset", address, pool.page_bytes, 0, pool.page_bytes)
        finally:
            self.release(address, pool.page_bytes)

    def map(self, address: int, pool: Any, first_page: int, num_pages: int, *, touch: bool = True) -> None:
        assert first_page >= 0 and first_page + num_pages <= pool.num_pages
        size = pool.page_bytes
        self.unmap(address, num_pages * size)
        for number in range(num_pages):
            at = address + number * size
            self._call("aclrtMapMem", at, size, 0, pool.handles[first_page + number], 0)  # the offset must be 0
            self._mapped[at] = size

    def unmap(self, address: int, num_bytes: int) -> None:
        at, end = address, address + num_bytes
        while at < end:
            size = self._mapped.pop(at, 0)
            if size:
                self._call("aclrtUnmapMem", at)
            at += size or self.granularity_bytes

    def release(self, address: int, num_bytes: int) -> None:
        for at in [at for at in self._mapped if address <= at < address + num_bytes]:
            del self._mapped[at]
            self._call("aclrtUnmapMem", at)
        self._call("aclrtReleaseMemAddress", address)

    def destroy(self, pool: Any) -> None:
        while pool.handles:
            self._call("aclrtFreePhysical", pool.handles.pop())

    def tensor(self, address: int, num_bytes: int, dtype: torch.dtype, owner: object) -> Tensor:
        """torch_npu's tensor over foreign memory; it cannot keep `owner` alive: the caller must."""
        import torch_npu

        device, size = torch.device("npu", self._device), num_bytes // dtype.itemsize
        storage = torch_npu._C._construct_storage_from_data_pointer(address, device, num_bytes)
        layout = {"size": (size,), "stride": (1,), "dtype": dtype, "device": device, "storage_offset": 0}
        made: Tensor = torch_npu._C._construct_NPU_Tensor_From_Storage_And_Metadata(layout, storage)
        return made

    def _call(self, name: str, *arguments: Any) -> None:
        """One call; the runtime knows a device by thread. Raises MemoryError or RuntimeError, naming the call."""
        if not hasattr(self._local, "entered"):
            self._local.entered = True
            self._call("aclrtSetDevice", self._device)
        with CAPTURE_LOCK.using():
            code = getattr(self._acl, name)(*arguments)
        if code:
            raise (MemoryError if code in OUT_OF_MEMORY else RuntimeError)(f"{name} failed with error {code}")
