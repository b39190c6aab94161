"""What a server holds, as the system and its own metrics see it: memory, threads, files, sockets, KV blocks."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from tests.serving.server_process import ServerProcess

PARTS = ("api", "engine")
# What must come back to where it was; memory is judged by its slope instead.
COUNTS = tuple(f"{part}_{what}" for part in PARTS for what in ("threads", "files", "sockets"))


@dataclass(frozen=True)
class Sample:
    """num_done: requests answered by then. rss_bytes and counts by "api_..." and "engine_..."."""

    num_done: int
    rss_bytes: dict[str, int]
    counts: dict[str, int]


class Gauges:
    """Watches both processes of one server. Raises psutil.NoSuchProcess when one of them is gone."""

    def __init__(self, server: ServerProcess):
        self._server = server
        self.pids = {"api": server.process.pid, "engine": server.engine_pid}
        self._processes = {part: psutil.Process(pid) for part, pid in self.pids.items()}

    def sample(self, num_done: int) -> Sample:
        rss: dict[str, int] = {}
        counts: dict[str, int] = {}
        for part, process in self._processes.items():
            with process.oneshot():
                rss[part] = process.memory_info().rss
                counts[f"{part}_threads"] = process.num_threads()
                counts[f"{part}_files"] = process.num_fds()
            counts[f"{part}_sockets"] = len(process.net_connections())
        return Sample(num_done, rss, counts)

    def cpu_s(self) -> float:
        """Processor seconds of both, so far."""
        times = [process.cpu_times() for process in self._processes.values()]
        return float(sum(found.user + found.system for found in times))

    def at_rest(self) -> dict[str, float]:
        """What an idle server says of itself: all of it should be 0."""
        gauge = self._server.gauge
        return {
            "running": gauge("xllm:num_requests_running"), "waiting": gauge("xllm:num_requests_waiting"),
            "kv_usage": gauge("xllm:kv_cache_usage_perc"),
            "kv_blocks_held": gauge("xllm:num_kv_blocks") - gauge("xllm:num_free_kv_blocks"),
            "open_calls": float(self._server.http.get("/load").json()["server_load"]),
            "engine_restarts": float(self._server.engine_pid != self.pids["engine"]),
        }


def slope_bytes(samples: list[Sample], part: str) -> float:
    """Least squares: resident bytes of a process per request, over these samples."""
    n = len(samples)
    x = [sample.num_done for sample in samples]
    y = [sample.rss_bytes[part] for sample in samples]
    mean_x, mean_y = sum(x) / n, sum(y) / n
    spread = sum((at - mean_x) ** 2 for at in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0
