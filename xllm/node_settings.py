"""`NodeSettings`: over how many machines the ranks of one engine are spread. torchrun's variables may say it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from xllm.errors import ConfigError
from xllm.option import option

DEFAULT_PORT = 29501  # vLLM's
_BY_LAUNCHER = "none: what torchrun's variables say"


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """Which of several machines (nodes) this is, and where they meet. `resolve_nodes` fills in what is None."""

    nnodes: int | None = option(None, "machines (nodes) among which the ranks of one model are divided evenly, with "
                                f"the same command on each but for node_rank; {_BY_LAUNCHER}, else 1")
    node_rank: int | None = option(None, "number of this node; node 0 runs the engine and answers HTTP, the others "
                                   f"only compute; {_BY_LAUNCHER}, else 0")
    master_addr: str | None = option(None, f"address of node 0 that all nodes reach, or HOST:PORT; {_BY_LAUNCHER}",
                                     aliases=("master_node_addr",))
    master_port: int | None = option(None, "port at master_addr where the nodes meet; none: what torchrun's variables "
                                     f"say, else {DEFAULT_PORT}")
    headless: bool = option(False, "nothing answers HTTP here, as it always is with node_rank above 0; refused on "
                            "node 0")

    @property
    def is_several(self) -> bool:
        return (self.nnodes or 1) > 1

    @property
    def place(self) -> str:
        """HOST:PORT of the meeting, once resolved."""
        assert self.master_addr is not None
        return f"{f'[{self.master_addr}]' if ':' in self.master_addr else self.master_addr}:{self.master_port}"


def resolve_nodes(given: NodeSettings, variables: Mapping[str, str], tensor_parallel_size: int) -> NodeSettings:
    """The settings with nothing left open; with one node, master_addr may stay None.

    variables: torchrun's, those that are set. They count where several ranks share a model and a master is named.
    Raises ConfigError, naming the setting or variable: numbers that cannot be, what is missing, two that disagree.
    """
    host, port = _split(given.master_addr)
    if port is not None and given.master_port not in (None, port):
        raise ConfigError(f"master_addr says port {port}, and master_port is {given.master_port}")
    asked = replace(given, master_addr=host, master_port=port if port is not None else given.master_port)
    if tensor_parallel_size > 1 and (asked.is_several or "MASTER_ADDR" in variables):
        asked = _with_variables(asked, variables)
    found = replace(asked, nnodes=1 if asked.nnodes is None else asked.nnodes, node_rank=asked.node_rank or 0,
                    master_port=DEFAULT_PORT if asked.master_port is None else asked.master_port)
    _check(found, tensor_parallel_size)
    return found


def _split(address: str | None) -> tuple[str | None, int | None]:
    """Host and port of HOST, HOST:PORT, [V6] or [V6]:PORT; an IPv6 address may stand without brackets and port."""
    if address is None:
        return None, None
    host, port = address, ""
    if address.startswith("["):
        host, bracket, rest = address[1:].partition("]")
        port = rest.removeprefix(":")
        if not bracket or (rest and not port):
            raise ConfigError(f"master_addr {address!r} is neither HOST nor HOST:PORT")
    elif address.count(":") == 1:
        host, _, port = address.partition(":")
        if not port:
            raise ConfigError(f"master_addr {address!r} is neither HOST nor HOST:PORT")
    if not host or (port and not port.isascii()) or (port and not port.isdigit()):
        raise ConfigError(f"master_addr {address!r} is neither HOST nor HOST:PORT")
    return host, int(port) if port else None


def _with_variables(asked: NodeSettings, variables: Mapping[str, str]) -> NodeSettings:
    processes = _number(variables, "LOCAL_WORLD_SIZE")
    if processes is not None and processes > 1:
        raise ConfigError(f"the environment variable LOCAL_WORLD_SIZE is {processes}: start one process a node, it "
                          "starts the ranks itself (torchrun --nproc-per-node 1)")
    for name, names in (("nnodes", ("GROUP_WORLD_SIZE", "NNODES")), ("node_rank", ("GROUP_RANK", "NODE_RANK"))):
        for variable in names:
            asked = _with_one(asked, name, variable, _number(variables, variable))
    address = variables.get("MASTER_ADDR")
    asked = _with_one(asked, "master_addr", "MASTER_ADDR", None if address is None else _split(address)[0])
    if asked.master_port is None and (port := _number(variables, "MASTER_PORT")) is not None:
        # torchrun may keep a store of its own at its port.
        asked = replace(asked, master_port=port + (variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"))
    return asked


def _with_one(asked: NodeSettings, name: str, variable: str, value: int | str | None) -> NodeSettings:
    known = getattr(asked, name)
    if value is None or known == value:
        return asked
    if known is not None:
        raise ConfigError(f"{name} is {known}, and the environment variable {variable} says {value}")
    found: dict[str, Any] = {name: value}
    return replace(asked, **found)


def _number(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment variable {name} must be a number, got {text!r}") from None


def _check(nodes: NodeSettings, tensor_parallel_size: int) -> None:
    assert nodes.nnodes is not None and nodes.node_rank is not None and nodes.master_port is not None
    if nodes.nnodes < 1:
        raise ConfigError(f"nnodes must be at least 1, got {nodes.nnodes}")
    if not 0 <= nodes.node_rank < nodes.nnodes:
        raise ConfigError(f"node_rank {nodes.node_rank} is outside of {nodes.nnodes} nodes, which are 0 to "
                          f"{nodes.nnodes - 1}")
    if not 1 <= nodes.master_port <= 65535:
        raise ConfigError(f"master_port must be in 1 to 65535, got {nodes.master_port}")
    if nodes.headless and nodes.node_rank == 0:
        raise ConfigError("headless is for nodes with node_rank above 0: node 0 answers HTTP")
    if nodes.nnodes == 1:
        return
    if tensor_parallel_size % nodes.nnodes:
        raise ConfigError(f"nnodes {nodes.nnodes} does not divide tensor_parallel_size {tensor_parallel_size}: every "
                          "node has as many of the ranks that share a model")
    if nodes.master_addr is None:
        raise ConfigError(f"nnodes {nodes.nnodes} needs master_addr: an address of node 0 that all nodes reach")
