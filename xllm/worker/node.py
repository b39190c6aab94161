"""`Node`: the share of an engine's ranks that is on another machine than the engine. `nodes_link.py` is the other end.

It runs no engine and answers nobody: it meets node 0, starts its ranks, hands them what comes from the engine and hands
on what they report. When the engine is started again, it starts its ranks again.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from xllm.config import EngineConfig
from xllm.errors import WorkerError
from xllm.parallel.meeting import MEET_S, RETRY_S, TAKEN_S, Arrival, Door, Gone, Taken, arrive, find_store
from xllm.worker.message_codec import decode, encode
from xllm.worker.messages import Load
from xllm.worker.node_facts import node_facts
from xllm.worker.node_wire import BEAT, COMMAND, END, FAILED, REPORT, UP, connect, message_of
from xllm.worker.processes import CHECK_S, HEARTBEAT_S, ProcessLink

LAST_REPORTS_MS = 200  # for what ranks, or node 0, sent before they ended. Chosen: it lies in a socket here
MOST_AT_ONCE = 100  # messages of one side, before the other's turn. Chosen: far more than a step has
STOPPED, IN_ORDER = "it was stopped", "the engine has ended"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NodeEnd:
    """How an engine's life ended here. in_order: it was to end. was_up: it had loaded its model on all nodes."""

    reason: str
    in_order: bool = False
    was_up: bool = False


class Node:
    """Make it with a config whose nodes are resolved. should_stop: asked again and again; True ends it."""

    def __init__(self, config: EngineConfig, should_stop: Callable[[], bool]):
        self._config, self._should_stop = config, should_stop
        nodes = config.nodes
        assert nodes.nnodes is not None and nodes.node_rank
        self._number, self._num_nodes = nodes.node_rank, nodes.nnodes

    def run(self) -> None:
        """Take part in one engine after the other; returns once one has ended in order, or this node was to stop.

        Raises:
            ConfigError: the nodes do not go together.
            WorkerError: node 0 was not reached, or its first engine failed before it had loaded its model.
        """
        was_up, reason = False, ""
        while True:
            try:
                end = self._take_part(is_again=was_up)
            except WorkerError as error:
                if self._should_stop():
                    return
                raise WorkerError(f"{error}; it ended before: {reason}") from None if was_up else error
            if end.in_order or self._should_stop():
                logger.info("node %d ends: %s", self._number, end.reason)
                return
            was_up, reason = was_up or end.was_up, end.reason
            if not was_up:
                raise WorkerError(reason)
            logger.error("the engine failed: %s; waiting at most %g s for node 0 to start it again", reason, MEET_S)

    def _take_part(self, *, is_again: bool) -> NodeEnd:
        door = self._meet(is_again)
        link = RankRelay(self._config, door)
        try:
            return link.run(self._should_stop)
        finally:
            link.close()

    def _meet(self, is_again: bool) -> Door:
        """Where the engine awaits this node. is_again: the engine before may still be about to end."""
        own = Arrival(self._number, self._num_nodes, socket.gethostname(), node_facts(self._config))
        until_s, is_told = time.monotonic() + TAKEN_S, is_again
        while True:
            store = find_store(self._config.nodes, MEET_S, self._should_stop)
            try:
                return arrive(store, own, self._should_stop)
            except (Taken, Gone) as error:
                may_wait = is_again or isinstance(error, Taken)
                if not may_wait or time.monotonic() >= until_s or self._should_stop():
                    raise
                if not is_told:
                    logger.warning("%s; waiting at most %g s for that engine to end", error, TAKEN_S)
                is_told = True
            time.sleep(RETRY_S)


class RankRelay(ProcessLink):
    """Starts this node's ranks and stands between them and the engine; `run`, then `close`."""

    def __init__(self, config: EngineConfig, door: Door):
        nodes, count = config.nodes, config.ranks_a_node
        assert nodes.node_rank is not None and nodes.master_addr is not None
        first = nodes.node_rank * count
        self._config = config
        super().__init__(config.device.num_ranks, depth=0, here=range(first, first + count),
                         store=f"store://{nodes.place}")
        self._engine, self._monitor = connect(
            self._context, nodes.master_addr, door.port, door.key,
            events=(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
                    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH))
        self._poller = zmq.Poller()
        for opened in (self._engine, self._monitor, self._reports):
            self._poller.register(opened, zmq.POLLIN)
        self._was_up = self._is_loading = False

    def run(self, should_stop: Callable[[], bool]) -> NodeEnd:
        """Relay until the engine, this node's part of it, or the way between them ends."""
        beat_s = 0.0
        while True:
            now = time.monotonic()
            if now - beat_s >= HEARTBEAT_S:
                beat_s = now
                self._say(BEAT)
            if should_stop():
                return self._fail(STOPPED)
            if now - self._checked_s >= CHECK_S:
                try:
                    self._check_ranks()
                except WorkerError as error:
                    return self._fail(str(error))
            if all(rank.process.poll() == 0 for rank in self._ranks):
                while self._reports.poll(LAST_REPORTS_MS):
                    self._hand_on()
                return NodeEnd(reason=IN_ORDER, in_order=True)
            ready = dict(self._poller.poll(int(CHECK_S * 1000)))
            if self._reports in ready:
                self._hand_on()
            if self._engine in ready and (end := self._take_commands()):
                return end
            if self._monitor in ready and not self._engine.poll(LAST_REPORTS_MS):  # all that it said was read
                recv_monitor_message(self._monitor)
                return self._ended("node 0 has gone")

    def _take_commands(self) -> NodeEnd | None:
        for _ in range(MOST_AT_ONCE):
            if not self._engine.poll(0):
                break
            kind, payload = message_of(self._engine)
            if kind == END and not payload:
                return NodeEnd(reason=IN_ORDER, in_order=True)
            if kind == END:
                return self._ended(payload.decode(errors="replace"))
            if kind == UP:
                self._was_up = True
            elif kind == COMMAND:
                if not self._is_loading and isinstance(decode(payload), Load):
                    # Equal to the engine's but for where this node's files are.
                    payload, self._is_loading = encode(Load(config=self._config)), True
                self._send_frame(payload)
        return None

    def _hand_on(self) -> None:
        """Hand on what the ranks have reported."""
        for _ in range(MOST_AT_ONCE):
            if not self._reports.poll(0):
                return
            origin, frame = self._reports.recv_multipart()
            self._say(REPORT, origin + frame)

    def _say(self, kind: bytes, payload: bytes = b"") -> None:
        with contextlib.suppress(zmq.Again):  # it has not connected yet, or has gone: the monitor says so
            self._engine.send_multipart((kind, payload), zmq.NOBLOCK, copy=False)

    def _fail(self, reason: str) -> NodeEnd:
        self._say(FAILED, reason.encode())
        return self._ended(reason)

    def _ended(self, reason: str) -> NodeEnd:
        self._end_ranks()
        return NodeEnd(reason=reason, was_up=self._was_up)

    def _check_ranks(self) -> None:
        """The engine says if one is silent or late; one that has ended in order was told to."""
        self._checked_s = time.monotonic()
        for rank in self._ranks:
            code = rank.process.poll()
            if code:
                raise WorkerError(f"worker rank {rank.number} {rank.end.reason(code)}")
            rank.end.look()

    def close(self) -> None:
        self._end_ranks()
        self._engine.disable_monitor()
        self._engine.close()  # once the last words are sent
        super().close()
