"""A real `xllm cluster up` for the tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil

from tests.serving.server_process import ROOT, START_TIMEOUT_S, wait_for

COMMAND = [sys.executable, "-m", "serving.commands.cli", "cluster", "up"]
SMALL = ["--port", "0", "--num-kv-blocks", "1024"]


class ClusterUp:
    """On a free port, ready when constructed. Use it in a `with` statement."""

    def __init__(self, log: Path, num_instances: int, *flags: str):
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen([*COMMAND, "--instances", str(num_instances), *SMALL, *flags], cwd=ROOT,
                                            stdout=out, stderr=subprocess.STDOUT,
                                            env={**os.environ, "TMPDIR": str(log.parent)})
        try:
            wait_for(lambda: self._is_up(num_instances) or self.process.poll() is not None, START_TIMEOUT_S, "start-up")
            found = re.search(r"master serves \S+ on (http://127\.0\.0\.1:\d+)", self.log)
            assert found, self.log
        except BaseException:
            self.stop()
            raise
        self.url = found[1]
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _is_up(self, num_instances: int) -> bool:
        return "curl" in self.log and self.log.count("has joined") == num_instances

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def instances(self) -> dict[str, psutil.Process]:
        """By name."""
        return instances_of(self.process.pid)

    def cluster(self) -> dict:
        return self.http.get("/cluster").raise_for_status().json()

    def stop(self, signum: int = signal.SIGINT) -> int:
        """Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.kill(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def __enter__(self) -> ClusterUp:
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.close()
        self.stop()


def instances_of(pid: int) -> dict[str, psutil.Process]:
    found = {}
    for child in psutil.Process(pid).children():
        words = child.cmdline()
        if "serving.commands.owned_server" in words:
            found[words[words.index("--instance-name") + 1]] = child
    return found
