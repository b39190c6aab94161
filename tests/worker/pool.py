"""A standing pool of ranks: a process that has imported torch once, and forks each rank that a test needs.

A rank of its own takes more than a second and 250 MB to start, a forked one a tenth of both. What a rank is and does is
the product's; only the way in which it comes to life is not. Tests of that way itself do without the pool.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from xllm.worker.rank import main

KEPT = ("XLLM_", "OMP_", "GOMP_")  # variables that a test may have set since the pool was started


class ForkedRank:
    """What `ProcessLink` uses of a `subprocess.Popen`."""

    def __init__(self, process: Any, stdin: Connection):
        self.stdin = stdin
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return self._process.exitcode


@functools.cache
def context() -> Any:
    """One pool for this process; it ends with it."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.worker.pool", "xllm.models.decoder", "xllm.models.loader", "backends.cpu.cpu"])
    return found


def fork_rank(folder: Path, rank: int, num_ranks: int, store: str = "") -> ForkedRank:
    """Stands in for `xllm.worker.processes.start_rank`."""
    reader, writer = context().Pipe(duplex=False)
    variables = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    argv = [str(folder), str(rank), str(num_ranks), *([store] if store else [])]
    process = context().Process(target=_run, args=(argv, reader, variables))
    process.start()
    reader.close()
    return ForkedRank(process, writer)


def _run(argv: list[str], stdin: Connection, variables: dict[str, str]) -> None:
    os.setsid()
    for name in [name for name in os.environ if name.startswith(KEPT) and name not in variables]:
        del os.environ[name]
    os.environ.update(variables)
    os.dup2(stdin.fileno(), 0)
    stdin.close()
    sys.stdin = os.fdopen(0)
    if "XLLM_TEST_FAULT" in os.environ:
        sys.argv = ["rank", *argv]
        from tests.worker.faulty_rank import install

        install()
    code = main(argv)
    sys.stderr.flush()
    os._exit(code)
