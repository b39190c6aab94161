"""The C library of the emulator, seen from Python: the hook, and the few functions of our own."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)

SUCCESS = 0
NOT_READY = 1
UNJOINED = 107025
MODEL_RUNNING = 107037
UPDATE_FAILED = 107040
INTERNAL_ERROR = 507000
AICORE_EXCEPTION = 507015
CAPTURE_MODE = 107030
SYNC_TIMEOUT = 507046
DRIVER_ERROR = 507899


@functools.cache
def library() -> ctypes.CDLL:
    """The libascendcl.so of this process, which the launcher has put on the path of the loader."""
    found = ctypes.CDLL("libascendcl.so")
    found.emulated_npu_first_dead.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    found.emulated_npu_is_pinned.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    found.emulated_npu_used_bytes.restype = ctypes.c_size_t
    found.emulated_npu_release_capture.argtypes = [ctypes.c_void_p]
    found.emulated_npu_set_hook.argtypes = [HOOK]
    found.emulated_npu_device_fault.restype = ctypes.c_char_p
    found.emulated_npu_comm_close.argtypes = found.emulated_npu_comm_drop.argtypes = [ctypes.c_void_p]
    found.emulated_npu_operation_bytes.restype = ctypes.c_size_t
    found.emulated_npu_operation_buffer.restype = ctypes.c_size_t
    found.aclGetRecentErrMsg.restype = ctypes.c_char_p
    found.aclmdlRICaptureGetInfo.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return found


_kept: list[object] = []


def set_hook(function: Callable[[int, int | None, int, int, int], int]) -> None:
    hook = HOOK(function)
    _kept.append(hook)
    library().emulated_npu_set_hook(hook)


class DeviceFault(Exception):
    """A task that ends with an error of its own: `code` is what the next call that waits will return."""

    def __init__(self, code: int):
        super().__init__(f"{code}: {library().emulated_npu_device_fault().decode(errors='replace')}")
        self.code = code


class AclError(RuntimeError):
    """As torch_npu words them: the code, and what the runtime says of it."""

    def __init__(self, code: int):
        text = (library().aclGetRecentErrMsg() or library().emulated_npu_device_fault()).decode(errors="replace")
        super().__init__(f"NPU function error: error code is {code}. {text}")
        self.code = code
