"""HCCL called directly, as torch_npu calls it: for what torch.distributed does not let through."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PARA, PTR, NOT_SUPPORT, TIMEOUT, TCP_CONNECT, RUNTIME, REMOTE, OOM = 1, 2, 5, 9, 11, 15, 21, 24
CAPTURE_INVALIDATED = 507903  # of the runtime
INT8, INT32, FP16, FP32, INT64, UINT8, FP64, BF16 = 0, 2, 3, 4, 5, 7, 10, 11
SUM, PROD, MAX, MIN = range(4)
TYPES = {torch.float16: FP16, torch.bfloat16: BF16, torch.float32: FP32}
ROOT_INFO_BYTES = 4108

Handle, Size, Word = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32


@functools.cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL("libhccl.so")
    found.HcclCommInitRootInfo.argtypes = [Word, ctypes.c_void_p, Word, ctypes.c_void_p]
    found.HcclCommInitRootInfoConfig.argtypes = [Word, ctypes.c_void_p, Word, ctypes.c_void_p, ctypes.c_void_p]
    found.HcclCommDestroy.argtypes = [Handle]
    found.HcclGetCommAsyncError.argtypes = [Handle, ctypes.c_void_p]
    found.HcclAllReduce.argtypes = [Handle, Handle, Size, ctypes.c_int, ctypes.c_int, Handle, Handle]
    found.HcclBroadcast.argtypes = [Handle, Size, ctypes.c_int, Word, Handle, Handle]
    found.HcclSend.argtypes = [Handle, Size, ctypes.c_int, Word, Handle, Handle]
    found.HcclAllGather.argtypes = [Handle, Handle, Size, ctypes.c_int, Handle, Handle]
    return found


def root_info() -> ctypes.Array[ctypes.c_char]:
    info = ctypes.create_string_buffer(ROOT_INFO_BYTES)
    assert library().HcclGetRootInfo(info) == 0
    return info


def current_stream() -> int:
    return int(torch.npu.current_stream().npu_stream)


class Comm:
    """A communicator, or the code why there is none."""

    def __init__(self, size: int = 1, rank: int = 0, info: Any = None):
        handle = ctypes.c_void_p()
        self.code = library().HcclCommInitRootInfo(size, info or root_info(), rank, ctypes.byref(handle))
        self.handle = handle.value

    @classmethod
    def of_store(cls, store: str, size: int, rank: int) -> Comm:
        torch.npu.set_device(0)
        torch.ones(1, device="npu")
        files = dist.FileStore(store.removeprefix("file://"), size)
        if rank == 0:
            files.set("root", root_info().raw)
        return cls(size, rank, ctypes.create_string_buffer(files.get("root"), ROOT_INFO_BYTES))

    def all_reduce(self, x: Tensor, out: Tensor | None = None, *, op: int = SUM, **other: Any) -> int:
        given = {"send": x.data_ptr(), "receive": (x if out is None else out).data_ptr(), "count": x.numel(),
                 "type": TYPES.get(x.dtype, FP32), "op": op, "comm": self.handle, "stream": current_stream(),
                 **other}  # fmt: skip
        return int(library().HcclAllReduce(*given.values()))

    def async_error(self) -> int:
        error = ctypes.c_int(-1)
        assert library().HcclGetCommAsyncError(self.handle, ctypes.byref(error)) == 0
        return error.value

    def destroy(self) -> int:
        return int(library().HcclCommDestroy(self.handle))
