"""The folder of a disk store: one writer at a time, and which of its files are segments of the store."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import stat
from pathlib import Path

from xllm.errors import ConfigError
from xllm.kv.disk_format import Geometry
from xllm.kv.disk_segment import (
    SUFFIX,
    TEMPORARY_SUFFIX,
    DiskSegment,
    create_segment,
    open_segment,
    temporary_path,
)
from xllm.private_files import open_private_folder

PID_FILE = "writer.pid"
# File descriptors left for everything else in the process (the model's shards, sockets, pipes): chosen, not counted.
SPARE_FILES = 512

_log = logging.getLogger(__name__)


class DiskFolder:
    """Holds the folder's lock, and opens and creates its segments. Raises OSError unless it says otherwise.

    The lock is a flock on the folder itself, so deleting a file in it lets no other process in, and the kernel drops
    it with the process. Raises ConfigError if another process (or store) has it, or others may write to it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.num_ignored_files = 0
        self._fd = open_private_folder(path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise ConfigError(f"the KV folder {path} is in use by process {self._read_pid()}; "
                              "it has one writer at a time") from None  # fmt: skip
        with contextlib.suppress(OSError):  # it only serves the message above; the disk may be full
            self._write_pid()

    def close(self) -> None:
        """Release the folder's lock; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def sync(self) -> None:
        os.fsync(self._fd)

    def _write_pid(self) -> None:
        path = self.path / PID_FILE
        path.unlink(missing_ok=True)  # whatever it is: a link would lead elsewhere
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(f"{os.getpid()}\n")

    def _read_pid(self) -> str:
        try:
            fd = os.open(self.path / PID_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                text = file.read(20).decode("ascii", "replace").strip()
        except OSError:
            text = ""
        return text if text.isdecimal() else "unknown"

    def open_segments(self, geometry: Geometry, num_slots: int) -> list[DiskSegment | None]:
        """The segments that are there, by number, for a store of `num_slots`; None where there is none yet.

        Segments beyond `num_slots` are deleted: the capacity was lowered, and nothing would ever use or free
        them. So are files that a crash left under a temporary name. All else is left alone, and counted.
        Raises ConfigError if they are more files than the process may open.
        """
        num_segments = -(-num_slots // geometry.slots_per_segment)
        _allow_open_files(num_segments + SPARE_FILES)
        segments: list[DiskSegment | None] = [None] * num_segments
        try:
            for path in sorted(self.path.iterdir()):
                if path.name.endswith(SUFFIX + TEMPORARY_SUFFIX):
                    _remove_leftover(path)
                elif path.suffix == SUFFIX:
                    self._adopt(path, geometry, num_slots, segments)
        except BaseException:
            for segment in filter(None, segments):
                segment.close()
            raise
        return segments

    def _adopt(self, path: Path, geometry: Geometry, num_slots: int, segments: list[DiskSegment | None]) -> None:
        try:
            found = open_segment(path, geometry, num_slots)
        except OSError as error:
            _log.warning("%s cannot be opened: %s", path, error)
            found = None
        if found is None or (found.number < len(segments) and segments[found.number] is not None):
            self.num_ignored_files += 1
            _log.warning("%s is damaged or not of this KV store; it is left alone", path)
            if found is not None:
                found.close()
        elif found.number >= len(segments):
            found.delete()
        else:
            segments[found.number] = found
            found.shrink()

    def create_segment(self, number: int, geometry: Geometry, num_slots: int) -> DiskSegment:
        """A new file under the first free name, for segment `number` of a store of `num_slots`."""
        candidate = number
        while True:
            path = self.path / f"{candidate:06d}{SUFFIX}"
            if not os.path.lexists(path) and not os.path.lexists(temporary_path(path)):
                return create_segment(path, number, geometry, num_slots)
            candidate += 1


def _remove_leftover(path: Path) -> None:
    if stat.S_ISREG(path.lstat().st_mode):
        path.unlink()


def _allow_open_files(num_files: int) -> None:
    """Every segment stays open; raise the process's soft limit where that takes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or num_files <= soft:
        return
    if hard != resource.RLIM_INFINITY and num_files > hard:
        raise ConfigError(f"a KV disk of this capacity needs {num_files} open files, and the limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, hard))
