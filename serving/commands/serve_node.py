"""`xllm serve --node-rank 1`: another node's ranks, without an engine and without HTTP."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType

from serving.commands.signals import SECOND, EndSignals
from xllm import logs
from xllm.config import EngineConfig
from xllm.worker.node import Node

logger = logging.getLogger("xllm.node")


def run(config: EngineConfig) -> int:
    """Serve node 0 until its engine ends in order or a signal comes. config: with its nodes resolved. Returns the exit
    code. Raises ConfigError or WorkerError."""
    logs.take_over()
    signals, stopped = EndSignals(), False

    def on_signal(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if signals.note(signum) is SECOND:
            os._exit(128 + signum)  # the ranks end with this process
        stopped = True

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)
    logger.info("node %d of %d: nothing answers HTTP here, node 0 at %s does", config.nodes.node_rank,
                config.nodes.nnodes, config.nodes.place)
    Node(config, lambda: stopped).run()
    return 0
