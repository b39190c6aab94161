"""`StartupView`: the phases of a start with their times, and a bar while the weights load."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import time
from collections.abc import Callable
from typing import TextIO

BAR_CHARS = 30  # the width of the bar
REDRAW_S = 0.05  # between two drawings of the line. Chosen: smooth enough
# Between two lines about one phase, where nothing can be drawn over. Chosen: a log shows progress, and stays short.
LOG_INTERVAL_S = 5.0


class LogStream(io.TextIOBase):
    """What is written becomes lines of a log."""

    def __init__(self, logger: logging.Logger):
        self._logger = logger

    def write(self, text: str) -> int:
        for line in text.splitlines():
            self._logger.info("%s", line)
        return len(text)


class StartupView:
    """Writes to `out`: on a terminal one line a phase that is drawn over as it goes on, elsewhere plain lines.

    clock: seconds, for tests.
    """

    def __init__(self, out: TextIO | io.TextIOBase, *, clock: Callable[[], float] = time.monotonic):
        self._out, self._clock = out, clock
        self._is_terminal = out.isatty()
        self._name = ""
        self._began_s = self._drawn_s = clock()
        self._start_s: float | None = self._began_s
        self._times: list[tuple[str, float]] = []
        self._is_drawn = False  # there is a line that the next one replaces

    def phase(self, name: str, share: float) -> None:
        """`share` of the phase is done, 0 to 1. Another name ends the one before."""
        now = self._clock()
        if self._start_s is None:
            self._start_s = now
        if name != self._name:
            self._end(now)
            self._name, self._began_s, self._drawn_s = name, now, now
            if self._is_terminal:
                self._draw(0.0, now)
            else:
                self._write(f"[{now - self._start_s:6.2f} s] {name}\n")
        elif now - self._drawn_s >= (REDRAW_S if self._is_terminal else LOG_INTERVAL_S):
            self._drawn_s = now
            if self._is_terminal:
                self._draw(share, now)
            else:
                self._write(f"[{now - self._start_s:6.2f} s] {name} {share:.0%}\n")

    def ready(self) -> None:
        """All is done: one line with every phase's time. The next phase begins another start."""
        now = self._clock()
        if self._start_s is None:
            return
        self._end(now)
        phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._times)
        self._write(f"ready after {now - self._start_s:.2f} s ({phases})\n")
        self._times, self._start_s = [], None

    def interrupt(self) -> None:
        """End the line that is being drawn, before other output is written."""
        if self._is_drawn:
            self._is_drawn = False
            self._write("\n")

    def _end(self, now: float) -> None:
        if not self._name:
            return
        self._times.append((self._name, now - self._began_s))
        if self._is_terminal:
            self._is_drawn = False
            self._write(f"\r\x1b[K{self._name:<12}{now - self._began_s:8.2f} s\n")
        self._name = ""

    def _draw(self, share: float, now: float) -> None:
        self._is_drawn = True
        bar = ""
        if share > 0.0 and shutil.get_terminal_size().columns >= BAR_CHARS + 32:
            full = int(min(1.0, share) * BAR_CHARS)
            bar = f"  {'█' * full}{'░' * (BAR_CHARS - full)} {share:4.0%}"
        self._write(f"\r\x1b[K{self._name:<12}{now - self._began_s:8.2f} s{bar}")

    def _write(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the reader of our output has gone; serving goes on
            self._out.write(text)
            self._out.flush()
