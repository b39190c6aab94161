"""`open_link`: makes the link to the workers that `--worker` asks for."""

from __future__ import annotations

from xllm.config import EngineConfig, check_workers
from xllm.worker.link import WorkerLink


def open_link(config: EngineConfig) -> WorkerLink:
    """Make the link that `config` asks for. In-process workers are made, processes are started; no model is loaded
    yet. Raises ConfigError."""
    check_workers(config.device)
    way, depth = config.device.worker, 1 if config.scheduler.async_scheduling else 0
    if way == "processes" or config.device.num_ranks > 1:
        from xllm.worker.processes import ProcessLink

        return ProcessLink(config.device.num_ranks, depth=depth)
    from xllm.worker.inline import DIRECT, InlineLink
    from xllm.worker.thread import ThreadLink

    wire = DIRECT
    if way == "codec":
        from xllm.worker.message_codec import CODED

        wire = CODED
    if way == "thread" or (way != "inline" and depth):
        return ThreadLink(depth=depth, wire=wire)
    return InlineLink(wire=wire)
