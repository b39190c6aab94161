"""A real `xllm serve` process for the tests, and how to talk to it."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import httpx
import openai
import psutil

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 90.0
ADDRESS = re.compile(r"on (https?://127\.0\.0\.1:\d+)")


def wait_for(condition: Callable[[], object], timeout_s: float = 20.0, what: str = "the condition") -> float:
    """Poll until `condition` holds; returns how long that took. Fails the test when it does not."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < timeout_s, f"{what} did not come true in {timeout_s} s"
        time.sleep(0.05)
    return time.monotonic() - started_s


class ServerProcess:
    """`xllm serve` on a free port, ready when constructed. Use it in a `with` statement."""

    def __init__(self, log: Path, *flags: str, key: str = "EMPTY", monitor_key: str = "",
                 max_files: int | None = None):
        """monitor_key: may see /metrics, where `key` may not. max_files: open files that it may have, which it cannot
        raise itself."""
        self.key = key
        self._monitor = {"Authorization": f"Bearer {monitor_key or key}"}
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving.commands.cli", "serve", "--port", "0", "--max-model-len", "512",
                 "--num-kv-blocks", "1024", *flags],
                cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        if max_files is not None:
            resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (max_files, max_files))
        try:
            wait_for(lambda: "curl" in self.log or self.process.poll() is not None, START_TIMEOUT_S, "start-up")
            found = ADDRESS.search(self.log)
            assert found, self.log
        except BaseException:
            self.stop()
            raise
        self.url = found[1]
        self.http = httpx.Client(base_url=self.url, timeout=60, headers={"Authorization": f"Bearer {key}"})

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def engine_pid(self) -> int:
        children = psutil.Process(self.process.pid).children()
        return next(child.pid for child in children if "xllm.client.engine_process" in child.cmdline())

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60,
                             **options)  # type: ignore[arg-type]

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120)

    def metrics(self) -> str:
        return self.http.get("/metrics", headers=self._monitor).text

    def gauge(self, name: str) -> float:
        """One value from /metrics; labels other than the two common ones are not looked at."""
        found = re.search(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", self.metrics(), re.MULTILINE)
        assert found, f"{name} is not in /metrics"
        return float(found[1])

    def value(self, series: str) -> float:
        """One value from /metrics, named with all its labels."""
        return next(float(line.rpartition(" ")[2]) for line in self.metrics().splitlines()
                    if line.startswith(series + " "))

    def wait_idle(self, timeout_s: float = 20.0) -> None:
        """Until nothing runs or waits and no KV block is held."""
        wait_for(lambda: self.gauge("xllm:num_requests_running") == self.gauge("xllm:num_requests_waiting") == 0
                 and self.gauge("xllm:kv_cache_usage_perc") == 0
                 and self.gauge("xllm:num_free_kv_blocks") == self.gauge("xllm:num_kv_blocks"), timeout_s, "idleness")

    def health(self) -> httpx.Response:
        return self.http.get("/health")

    def stop(self) -> int:
        """End it, gently if it listens; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.kill(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.http.close()
        self.stop()
