"""`LogWriter`: writes lines to a file descriptor from a thread, so that no caller waits for a slow reader."""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Callable

# Lines; more are dropped and counted. Chosen: a reader may pause for a moment, and memory stays bounded.
MAX_WAITING = 4096
FLUSH_S = 1.0  # that `flush` waits at most. Chosen: a reader that has stopped must not keep the process from ending


class LogWriter:
    """Usable from every thread. complaint: the line that says how many were lost, once the reader reads
    again, or the disk has room."""

    def __init__(self, fd: int, complaint: Callable[[int], str]):
        self.num_lost = 0  # so far
        self._fd, self._complaint = fd, complaint
        self._num_told = 0
        self._is_torn = False  # a line was written in part
        # Its own bound and `join` would take Python code and locks at both ends of each line.
        self._lines: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def put(self, line: str) -> None:
        """Queue a line, given without its line end. Never waits; a line that finds the queue full is dropped and
        counted."""
        if self._lines.qsize() >= MAX_WAITING:
            self.num_lost += 1
        else:
            self._lines.put(line)

    def flush(self) -> None:
        """Wait until all is written, for FLUSH_S at most."""
        is_written = threading.Event()
        self._lines.put(is_written)
        is_written.wait(FLUSH_S)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            if not self._write(line):
                self.num_lost += 1
            num_new = self.num_lost - self._num_told
            if num_new and self._write(self._complaint(num_new)):
                self._num_told += num_new

    def _write(self, line: str) -> bool:
        """A line in one call, where the system takes it whole: other processes write to the same file. False: its
        reader has gone, or the disk is full; serving goes on."""
        rest = line.encode("utf-8", "backslashreplace") + b"\n"
        if self._is_torn:
            rest = b"\n" + rest
        num_bytes = len(rest)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest):]
            except BlockingIOError:  # another process made it non-blocking
                select.select([], [self._fd], [])
            except OSError:
                self._is_torn = self._is_torn or len(rest) < num_bytes
                return False
        self._is_torn = False
        return True
