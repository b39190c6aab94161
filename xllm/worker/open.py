"""`open_link`: makes the link to the workers that `--worker` asks for."""

from __future__ import annotations

import dataclasses
import logging

from xllm import env
from xllm.config import EngineConfig, check_workers
from xllm.errors import ConfigError
from xllm.node_settings import resolve_nodes
from xllm.worker.link import WorkerLink

logger = logging.getLogger(__name__)


def open_link(config: EngineConfig) -> WorkerLink:
    """Make the link that `config` asks for. In-process workers are made, processes are started; no model is loaded
    yet. With several nodes it waits for the others. Raises ConfigError, or WorkerError for nodes that do not come."""
    check_workers(config.device)
    config = with_nodes(config)
    way, depth = config.device.worker, 1 if config.scheduler.async_scheduling else 0
    if config.nodes.is_several:
        from xllm.worker.nodes_link import NodesLink

        if config.nodes.node_rank:
            raise ConfigError(f"node_rank {config.nodes.node_rank}: the engine runs on node 0; `xllm serve` on the "
                              "others starts their ranks")
        return NodesLink(config, depth=depth)
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


def with_nodes(config: EngineConfig) -> EngineConfig:
    """The config with its nodes resolved, by torchrun's variables too. Raises ConfigError."""
    nodes = resolve_nodes(config.nodes, env.launcher(), config.device.tensor_parallel_size)
    if not nodes.is_several and config.nodes.master_addr is not None:
        logger.warning("master_addr is ignored: with one node its ranks meet on this machine")
    return dataclasses.replace(config, nodes=nodes)
