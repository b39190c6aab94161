"""`NodesLink`: a `ProcessLink` some of whose ranks are on other machines. `node.py` is the other end.

The same bytes go to every node, which hands them to its ranks. A node that is lost, or says that one of its ranks is,
fails the engine as a rank of this machine does.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time

import zmq
from torch._C._distributed_c10d import Store

from xllm.config import EngineConfig
from xllm.errors import WorkerError
from xllm.parallel.meeting import Arrival, Door, Gathering, open_store
from xllm.progress import Progress
from xllm.worker.message_codec import decode
from xllm.worker.messages import Failed, Loaded, WorkerReport
from xllm.worker.node_facts import node_facts
from xllm.worker.node_wire import BEAT, COMMAND, END, FAILED, REPORT, UP, listen, message_of
from xllm.worker.processes import CHECK_S, SILENT_S, ProcessLink

CONNECT_S = 20.0  # for a node to connect once all have met. Chosen: it has nothing else to do then
# From the first sign of a rank's death at another one to where its node says it. Chosen: a node looks at its ranks
# every `CHECK_S`; beyond that a way through a busy machine.
NODE_DEATH_S = 3.0
logger = logging.getLogger(__name__)


class _OtherNode:
    """The connection to another node, whose ranks are `ranks`. heard_s: when it, or a rank of it once that is loaded,
    last sent something, on the monotonic clock."""

    def __init__(self, number: int, ranks: range, context: zmq.Context[zmq.Socket[bytes]], address: str):
        self.number, self.ranks = number, ranks
        self.socket, port, key = listen(context, address)
        self.door = Door(port, key)
        self.heard_s = time.monotonic()
        self.rank_heard_s: dict[int, float] = {}

    def tell(self, kind: bytes, payload: bytes = b"") -> None:
        """Send a message; one that nobody is there for is dropped, and the silence noticed."""
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart((kind, payload), zmq.NOBLOCK, copy=False)

    def silence(self, now: float) -> str | None:
        """Who has been silent for too long, as the beginning of a sentence, and for how long."""
        heard = {f"node {self.number}": self.heard_s} | {
            f"worker rank {rank} on node {self.number}": heard_s for rank, heard_s in self.rank_heard_s.items()}
        return next((f"{who} has said nothing for {now - heard_s:.0f} s" for who, heard_s in heard.items()
                     if now - heard_s > SILENT_S), None)


class NodesLink(ProcessLink):
    """Meets the other nodes, then starts node 0's share of the ranks; the others start theirs."""

    def __init__(self, config: EngineConfig, *, depth: int):
        """Raises ConfigError if the nodes do not go together, WorkerError if one does not come."""
        nodes = config.nodes
        assert nodes.nnodes is not None
        here = config.ranks_a_node
        self._nodes: list[_OtherNode] = []
        self._reason = ""  # it ends in order
        self._store: Store | None = None
        self._net: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._store, address = open_store(nodes)
            own = Arrival(0, nodes.nnodes, socket.gethostname(), node_facts(config))
            gathering = Gathering(self._store, own, place=nodes.place)
            gathering.gather()
            self._nodes += [_OtherNode(number, range(number * here, (number + 1) * here), self._net, address)
                            for number in range(1, nodes.nnodes)]
            gathering.admit({node.number: node.door for node in self._nodes})
            self._await_nodes()
            super().__init__(config.device.num_ranks, depth=depth, here=range(here), store=f"store://{nodes.place}")
        except BaseException as error:
            self._tell_the_end(str(error))
            self._leave()
            raise
        self._poller = zmq.Poller()
        for opened in (self._reports, *(node.socket for node in self._nodes)):
            self._poller.register(opened, zmq.POLLIN)
        self._ready: dict[zmq.Socket[bytes], int] = {}

    def _await_nodes(self) -> None:
        until_s = time.monotonic() + CONNECT_S
        for node in self._nodes:
            if not node.socket.poll(int(max(0.0, until_s - time.monotonic()) * 1000)):
                raise WorkerError(f"node {node.number} has met node 0 but not connected to its port {node.door.port} "
                                  f"within {CONNECT_S:g} s: nodes need all ports of each other")
        for node in self._nodes:
            node.heard_s = time.monotonic()
        logger.info("%d nodes have met", len(self._nodes) + 1)

    def load(self, config: EngineConfig, progress: Progress) -> Loaded:
        loaded = super().load(config, progress)
        for node in self._nodes:
            node.tell(UP)
        return loaded

    def close(self) -> None:
        super().close()
        self._leave()

    def _leave(self) -> None:
        """Send the last words, and free the meeting's port."""
        self._net.destroy()
        self._store = None

    def _send_frame(self, frame: bytes) -> None:
        for node in self._nodes:  # they are farther away
            node.tell(COMMAND, frame)
        super()._send_frame(frame)

    def _poll(self, timeout_ms: int) -> bool:
        self._ready = dict(self._poller.poll(timeout_ms))
        return bool(self._ready)

    def _receive(self) -> WorkerReport | None:
        node = next((node for node in self._nodes if node.socket in self._ready), None)
        report = super()._receive() if node is None else self._receive_from(node)
        if isinstance(report, Failed):
            self._reason = f"{report.kind}: {report.message}"
        return report

    def _receive_from(self, node: _OtherNode) -> WorkerReport | None:
        kind, payload = message_of(node.socket)
        node.heard_s = time.monotonic()
        if kind == FAILED:
            raise self._failed(f"node {node.number}: {payload.decode(errors='replace')}")
        if kind == BEAT:
            return None
        try:
            number = payload[0]
            if kind != REPORT or number not in node.ranks:
                raise ValueError("a message of an unknown kind or rank")
            report: WorkerReport = decode(memoryview(payload)[1:])
        except (ValueError, IndexError) as error:
            raise self._failed(f"what node {node.number} sent cannot be read: {error}") from error
        if isinstance(report, Loaded) or number in node.rank_heard_s:
            node.rank_heard_s[number] = node.heard_s
        return self._take_in(number, report)

    def _check_ranks(self) -> None:
        super()._check_ranks()
        for node in self._nodes:
            silence = None if self._closed else node.silence(self._checked_s)
            if silence and not node.socket.poll(0):  # else it was this process that did not listen
                raise self._failed(silence)

    def _look_for_the_cause(self) -> None:
        """The process that died may be on any node."""
        until_s = time.monotonic() + NODE_DEATH_S
        while time.monotonic() < until_s:
            self._check_ranks()
            for node in self._nodes:
                while node.socket.poll(0):
                    self._receive_from(node)
            time.sleep(CHECK_S / 10)

    def _failed(self, reason: str) -> WorkerError:
        self._reason = reason
        return super()._failed(reason)

    def _end_ranks(self) -> None:
        self._tell_the_end(self._reason)
        super()._end_ranks()

    def _tell_the_end(self, reason: str) -> None:
        for node in self._nodes:
            if not node.socket.closed:
                node.tell(END, reason.encode())
                node.socket.close()  # once that is sent
