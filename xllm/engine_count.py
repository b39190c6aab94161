"""How many engines there may be."""

from __future__ import annotations

from xllm.config import DeviceSettings
from xllm.errors import ConfigError
from xllm.node_settings import NodeSettings

MOST_ENGINES = 64  # of one server. Chosen, above what one front can feed: a typing error must not start thousands


def check_one_engine(d: DeviceSettings) -> None:
    """Refuse several engines where there can be one only."""
    if d.data_parallel_size != 1:
        raise ConfigError(f"data_parallel_size {d.data_parallel_size}: several engines are started by `xllm serve` "
                          "only; LLM, AsyncLLM and the commands beside it have one")


def check_nodes(d: DeviceSettings, nodes: NodeSettings) -> None:
    """Refuse several engines of which each is spread over several machines. nodes: resolved."""
    if d.data_parallel_size > 1 and nodes.is_several:
        raise ConfigError(f"data_parallel_size {d.data_parallel_size} with nnodes {nodes.nnodes}: the engines of one "
                          "server are on one machine; start a server for each group of nodes behind a balancer")


def check_engines(d: DeviceSettings) -> None:
    """Refuse numbers of engines that cannot be; asked before any of them is started."""
    if d.data_parallel_size < 1:
        raise ConfigError(f"data_parallel_size must be at least 1, got {d.data_parallel_size}")
    if d.data_parallel_size > MOST_ENGINES:
        raise ConfigError(f"data_parallel_size must be at most {MOST_ENGINES}, got {d.data_parallel_size}")
