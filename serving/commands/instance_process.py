"""`InstanceProcess`: an `xllm serve` that another command of ours runs as an instance of its cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from xllm.child_end import ChildEnd
from xllm.child_process import run_module

LOOK_S = 0.25  # between looks at whether it lives. As `child_end.LOOK_S`
_TAIL_BYTES = 4096  # of a log, at its end, in which its last lines are looked for. Chosen: some long lines


class InstanceProcess:
    """Started when made. It is a process group of its own, so that a terminal's Ctrl-C reaches its owner alone; when
    its owner is gone, however that ended, it ends as if by SIGTERM (`owned_server.py`).

    name: of the instance. log: the file that its stdout and stderr go to. ended: how it ended; None: it lives.
    """

    command: Sequence[str] = ("serving.commands.owned_server",)  # a module, and what stands before the flags

    def __init__(self, name: str, flags: Sequence[str], environment: Mapping[str, str], log: Path):
        self.name, self.log = name, log
        self.ended: str | None = None
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, *run_module(self.command[0]), *self.command[1:], *flags, "--host", "127.0.0.1",
                 "--port", "0", "--instance-name", name],
                stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        self._end = ChildEnd(self._process)

    @property
    def pid(self) -> int:
        """Of the server's process, which is its group's number, too."""
        return self._process.pid

    async def wait(self) -> str:
        """Until it has ended; returns how, as "exited with code 1"."""
        while (code := self._process.poll()) is None:
            self._end.look()
            await asyncio.sleep(LOOK_S)
        self.ended = self._end.reason(code)
        return self.ended

    def drain(self) -> None:
        """Have it finish what it has, and end."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End it and all that it started, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it has gone
            os.killpg(self._process.pid, signal.SIGKILL)

    def last_lines(self, count: int) -> list[str]:
        """The last lines of its log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-count:]
