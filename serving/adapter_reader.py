"""`AdapterReader`: adapters are read from disk beside the step loop, and entered by it between two steps."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from serving.protocol import Control
from xllm.engine.adapters import AdapterNames, ReadAdapter


class AdapterReader:
    """Reads in a thread of its own, one adapter after the other. All methods are for the step loop's thread."""

    def __init__(self, adapters: AdapterNames):
        self._adapters = adapters
        self._thread = ThreadPoolExecutor(1, "adapter-reader")
        self._open: deque[tuple[Control, Future[ReadAdapter]]] = deque()

    def begin(self, command: Control) -> None:
        """Read what a "load_adapter" asks for. Raises as `AdapterNames.check` does; nothing is read then."""
        self._adapters.check(command.name)
        self._open.append((command, self._thread.submit(self._adapters.read, Path(command.folder))))

    @property
    def is_busy(self) -> bool:
        """Whether there is something to wait for or to enter."""
        return bool(self._open)

    def take_done(self) -> tuple[Control, Future[ReadAdapter]] | None:
        """The oldest command if its adapter has been read or cannot be, which `Future.result` tells."""
        return self._open.popleft() if self._open and self._open[0][1].done() else None
