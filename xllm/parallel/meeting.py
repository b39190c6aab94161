"""The meeting of an engine's nodes at a TCPStore: who has come, and whether all can compute the same.

Node 0 opens the store, and opens another one whenever the engine is started again. Each other node writes that it has
arrived, with its facts; node 0 compares them with its own, as they come, and gives one ruling for all. What is written
here is not secret from anybody who reaches the port, nor safe from being overwritten: docs/parallel.md.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import msgspec
from torch._C._distributed_c10d import Store, TCPStore

from xllm.errors import ConfigError, WorkerError
from xllm.node_settings import NodeSettings

MEET_S = 120.0  # for all nodes to come. Chosen: as for the ranks (`seat.py`); a launcher starts them at about one time
POLL_S = 0.05  # between two looks at the store. Chosen: hardly noticed in a start that takes seconds
RETRY_S = 0.3  # between two attempts to reach node 0. Chosen: a dozen of them are cheap, and a start waits that long
STORE_S = 10.0  # for one answer of the store. Chosen: it is a process that does little else
HEARD_S = 2.0  # for the others to read why the start fails. Chosen: many looks at the store
# For the engine that has this node's place to end: the one before, if this node was started again. Chosen: longer than
# a lost node is noticed (`worker/processes.py:SILENT_S`) and an engine takes to end (`CLOSE_S` there).
TAKEN_S = 20.0
_ARRIVALS, _HEARD, _RULING = "node/arrivals", "node/heard", "node/ruling"
M = TypeVar("M", bound=msgspec.Struct)
logger = logging.getLogger(__name__)


class Taken(WorkerError):
    """The nodes of the engine at that place are complete without this one."""


class Gone(WorkerError):
    """Node 0 ended while the nodes met."""


class Arrival(msgspec.Struct, frozen=True):
    """What a node says of itself. facts: by name; those of all nodes must be equal."""

    node: int
    nnodes: int
    host: str
    facts: dict[str, str]


class Door(msgspec.Struct, frozen=True):
    """Where node 0 awaits a node's connection: a TCP port at its address, and the key that proves it (Z85, CURVE)."""

    port: int
    key: str


class Ruling(msgspec.Struct, frozen=True):
    """error: why there is no engine, else "". arrivals: the numbers of those that it is for. doors: by node."""

    error: str
    arrivals: list[int]
    doors: dict[int, Door]


def open_store(nodes: NodeSettings) -> tuple[Store, str]:
    """Listen at the meeting's place, and nowhere else. Returns the store and the address, resolved.

    Raises ConfigError: the port is taken, the address is not this machine's or unknown.
    """
    assert nodes.master_addr is not None and nodes.master_port is not None
    try:
        family, _, _, _, address = socket.getaddrinfo(nodes.master_addr, nodes.master_port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
            store = TCPStore(nodes.master_addr, nodes.master_port, is_master=True, wait_for_workers=False,
                             timeout=timedelta(seconds=STORE_S), master_listen_fd=listener.detach())
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"node 0 cannot listen at {nodes.place} (master_addr, master_port): {_first_line(error)}"
                          ) from None
    return store, str(address[0])


def find_store(nodes: NodeSettings, patience_s: float, should_stop: Callable[[], bool]) -> Store:
    """Connect to node 0, trying again and again. Raises WorkerError when `patience_s` is over, or if it should stop."""
    assert nodes.master_addr is not None and nodes.master_port is not None
    until_s = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((nodes.master_addr, nodes.master_port), timeout=STORE_S).close()
            return TCPStore(nodes.master_addr, nodes.master_port, is_master=False, wait_for_workers=False,
                            timeout=timedelta(seconds=STORE_S))
        except (OSError, RuntimeError) as error:
            if time.monotonic() >= until_s or should_stop():
                raise WorkerError(f"node 0 was not reached at {nodes.place} (master_addr, master_port) within "
                                  f"{patience_s:g} s: {_first_line(error)}") from None
        time.sleep(RETRY_S)


def arrive(store: Store, own: Arrival, should_stop: Callable[[], bool]) -> Door:
    """Say that this node is here, and wait for the ruling.

    Raises:
        ConfigError: why the nodes do not go together. Taken: another process has this node's place.
        Gone: node 0 has ended meanwhile. WorkerError: the others did not come in time.
    """
    try:
        number = store.add(_ARRIVALS, 1)
        store.set(_arrival(number), msgspec.json.encode(own).decode())
        until_s = time.monotonic() + MEET_S + HEARD_S  # node 0 says who is missing
        while not store.check([_RULING]):
            if time.monotonic() >= until_s or should_stop():
                raise WorkerError(f"the nodes did not come together within {MEET_S:g} s")
            time.sleep(POLL_S)
        ruling = _read(store.get(_RULING), Ruling)
        if number not in ruling.arrivals:
            raise Taken(f"node_rank {own.node} is taken: the engine's nodes were complete without this process")
        store.add(_HEARD, 1)
    except RuntimeError as error:  # of torch's
        raise Gone(f"node 0 ended while the nodes met: {_first_line(error)}") from None
    if ruling.error:
        raise ConfigError(ruling.error)
    return ruling.doors[own.node]


class Gathering:
    """Node 0's part in the meeting: `gather`, then `admit` or `refuse`."""

    def __init__(self, store: Store, own: Arrival, *, place: str):
        self._store, self._own, self._place = store, own, place
        self._arrivals: list[int] = []

    def gather(self, patience_s: float = MEET_S) -> None:
        """Wait for the other nodes. Raises ConfigError as soon as one does not go with this one, WorkerError if one
        does not come; all that have come are told."""
        seen: dict[int, str] = {}
        until_s, told_s = time.monotonic() + patience_s, time.monotonic()
        try:
            while len(seen) < self._own.nnodes - 1:
                for number in range(1, self._store.add(_ARRIVALS, 0) + 1):
                    if number not in self._arrivals and self._store.check([_arrival(number)]):
                        self._arrivals.append(number)
                        arrival = _read(self._store.get(_arrival(number)), Arrival)
                        check_arrival(self._own, arrival, seen)
                        seen[arrival.node] = arrival.host
                missing = ", ".join(str(node) for node in range(1, self._own.nnodes) if node not in seen)
                if missing and time.monotonic() >= until_s:
                    raise WorkerError(f"node {missing} of {self._own.nnodes} did not come to {self._place} within "
                                      f"{patience_s:g} s")
                if missing and time.monotonic() >= told_s:
                    logger.info("waiting at %s for node %s", self._place, missing)
                    told_s += STORE_S
                time.sleep(POLL_S)
        except (ConfigError, WorkerError) as error:
            self.refuse(str(error))
            raise

    def admit(self, doors: dict[int, Door]) -> None:
        """Tell every node where its connection is awaited."""
        self._tell(Ruling("", self._arrivals, doors))

    def refuse(self, reason: str) -> None:
        """Tell every node that has come why there is no engine, and wait until they have heard it."""
        self._tell(Ruling(reason, self._arrivals, {}))
        until_s = time.monotonic() + HEARD_S
        while self._store.add(_HEARD, 0) < len(self._arrivals) and time.monotonic() < until_s:
            time.sleep(POLL_S)

    def _tell(self, ruling: Ruling) -> None:
        self._store.set(_RULING, msgspec.json.encode(ruling).decode())


def check_arrival(own: Arrival, other: Arrival, seen: Mapping[int, str]) -> None:
    """Raise ConfigError, which names the node and what is wrong, if `other` does not go with node 0, `own`.

    seen: the hosts of those that have come before, by node.
    """
    who = f"node {other.node} ({other.host})"
    if other.nnodes != own.nnodes:
        raise ConfigError(f"{who} was started with nnodes {other.nnodes}, node 0 ({own.host}) with {own.nnodes}")
    if not 0 < other.node < own.nnodes:
        raise ConfigError(f"{who} is outside of {own.nnodes} nodes")
    if other.node in seen:
        raise ConfigError(f"node_rank {other.node} was given twice, on {seen[other.node]} and on {other.host}")
    if wrong := [_difference(name, own.facts.get(name), other.facts.get(name))
                 for name in sorted(own.facts.keys() | other.facts.keys())
                 if own.facts.get(name) != other.facts.get(name)]:
        raise ConfigError(f"{who} does not go with node 0 ({own.host}): {'; '.join(wrong)}")


def _difference(name: str, own: str | None, other: str | None) -> str:
    if name.startswith("file "):
        file = name.removeprefix("file ")
        return f"it has {'no' if other is None else 'a' if own is None else 'another'} {file} in its checkpoint"
    return f"{name} is {other}, and {own} on node 0"


def _arrival(number: int) -> str:
    return f"node/arrival/{number}"


def _read(text: bytes, kind: type[M]) -> M:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise ConfigError(f"what was written at the nodes' meeting cannot be read: {error}") from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
