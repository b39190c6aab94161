"""`cut_transfers`: breaks the connections by which KV reaches an instance, whatever they are and whoever has them."""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

SHM_NAME = b"\0xllm-window-"  # of the Unix sockets of windows, see xllm/transfer/shared_memory.py
PIDFD_GETFD = 438  # its number as a system call, the same on all machines (asm-generic/unistd.h)


def cut_transfers(pid: int) -> int:
    """Shut all connections of this engine down through which KV comes or goes; returns how many. The sockets are the
    engine's own: both ends see the connection break, as by a reset."""
    handle, num_cut = os.pidfd_open(pid), 0
    try:
        for number in _sockets(pid):
            fd = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, handle, number, 0)
            if fd < 0:
                if (error := ctypes.get_errno()) in (1, 38):  # EPERM, ENOSYS
                    raise OSError(error, f"sockets of process {pid} cannot be had: {os.strerror(error)}")
                continue  # it was closed meanwhile
            with socket.socket(fileno=fd) as copy:
                num_cut += _cut(copy)
    finally:
        os.close(handle)
    return num_cut


def _sockets(pid: int) -> list[int]:
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(link).startswith("socket:"):
                found.append(int(link.name))
        except OSError:
            continue  # it was closed meanwhile
    return found


def _cut(one: socket.socket) -> bool:
    """An engine speaks TCP with other engines only; its Unix sockets are others' as well, and told by their names."""
    try:
        if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        if one.family == socket.AF_UNIX and not any(name.startswith(SHM_NAME) for name in _names(one)):
            return False
        if one.family not in (socket.AF_UNIX, socket.AF_INET):
            return False
        one.getpeername()  # raises OSError: it is not connected
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True


def _names(one: socket.socket) -> list[bytes]:
    return [name for name in (one.getsockname(), one.getpeername()) if isinstance(name, bytes)]
