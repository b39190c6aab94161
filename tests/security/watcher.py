"""Watches a server from a process of its own: `python -m tests.security.watcher URL KEY PID`.

Each line on stdin is answered by one of JSON on stdout: since the last one the longest answer of /health, the longest
time to a first token of a small streamed call (seconds), and the most memory of the server's processes together (MB).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import psutil

PAUSE_S = 0.02
SMALL = json.dumps({"prompt": "Once upon a time", "max_tokens": 4, "stream": True, "temperature": 0}).encode()


class Watcher:
    """Of each figure the worst since it was asked for last."""

    def __init__(self, url: str, key: str, pid: int):
        self._address = urlsplit(url).netloc
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._process = psutil.Process(pid)
        self._worst: dict[str, float] = {}
        measures = {"silence_s": self._silence_s, "ttft_s": self._ttft_s, "memory_mb": self._memory_mb}
        self._rounds = dict.fromkeys(measures, 0)
        for name, measure in measures.items():
            threading.Thread(target=self._repeat, args=(name, measure), daemon=True).start()

    def report(self) -> dict[str, float]:
        """Waits until whatever is being measured now has been."""
        before = dict(self._rounds)
        while any(self._rounds[name] < before[name] + 2 for name in self._rounds):
            time.sleep(PAUSE_S)
        worst, self._worst = self._worst, {}
        return worst

    def _repeat(self, name: str, measure: Callable[[], float]) -> None:
        while True:
            value = measure()
            self._worst[name] = max(self._worst.get(name, 0.0), value)
            self._rounds[name] += 1
            time.sleep(PAUSE_S)

    def _silence_s(self) -> float:
        return self._timed("GET", "/health", None)

    def _ttft_s(self) -> float:
        return self._timed("POST", "/v1/completions", SMALL)

    def _timed(self, method: str, path: str, body: bytes | None) -> float:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        started_s = time.monotonic()
        try:
            connection.request(method, path, body, self._headers)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            response.read(1)
            return time.monotonic() - started_s
        finally:
            connection.close()

    def _memory_mb(self) -> float:
        num_bytes = 0
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                num_bytes += process.memory_info().rss
        return num_bytes / 1e6


def main(argv: list[str]) -> None:
    watcher = Watcher(argv[0], argv[1], int(argv[2]))
    for _ in sys.stdin:
        print(json.dumps(watcher.report()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
