"""`Memfd`: memory that several processes of one machine map, without a name in any folder. Linux only."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct

_FLOCK = struct.Struct("hhqqi4x")  # `struct flock` of 64-bit Linux: type, whence, start, length, pid
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Memfd:
    """A file in memory, mapped. Gone with the last process that has it.

    memory: all of it, writable. Its locks belong to this object alone (open file description locks), also beside others
    of the same process, and end with it or with its process, after the process can write no more.
    """

    def __init__(self, fd: int):
        """fd: taken over."""
        self._fd = fd
        try:
            self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        except BaseException:
            os.close(fd)
            raise
        self.memory = memoryview(self._map)

    @classmethod
    def make(cls, num_bytes: int) -> Memfd:
        """A new one of zeros, whose size nobody can change: no access to it can fail."""
        fd = os.memfd_create("xllm-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, max(1, num_bytes))  # nothing cannot be mapped
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return cls(fd)

    @classmethod
    def take(cls, fd: int) -> Memfd:
        """The one that another process sent, `fd` closed. Opened anew: a descriptor that was sent shares its locks with
        the sender. Raises OSError where the system has no /proc."""
        try:
            own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.close(fd)
        return cls(own)

    def fileno(self) -> int:
        return self._fd

    def lock(self, at: int, *, shared: bool) -> bool:
        """Lock one byte's number; whether nobody else holds it (with `shared`: alone). Does not wait."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK if shared else fcntl.F_WRLCK, at))
        except BlockingIOError:
            return False
        return True

    def unlock(self, at: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, at))

    def close(self) -> None:
        """May be called twice. The pages stay as long as somebody has a view of `memory`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(BufferError):  # there are views; the mapping goes with the last of them
                self.memory.release()
                self._map.close()


def _flock(kind: int, at: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0)
