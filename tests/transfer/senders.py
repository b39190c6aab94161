"""A sender that tests command, in this process or in one of its own: `python -m tests.transfer.senders`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from xllm.errors import TransferError
from xllm.kv import failpoints
from xllm.transfer.transport import Peer
from xllm.transfer.transports import connect

ANSWER_S = 60  # a child that says nothing for so long fails the test


def pattern(seed: int, num_bytes: int) -> bytes:
    """Bytes that differ from place to place and from seed to seed."""
    unit = bytes((seed + 7 * i) % 251 for i in range(251))
    return (unit * (num_bytes // 251 + 1))[:num_bytes]


class LocalSender:
    """Holds peers by name. Every command returns None, or what its TransferError says."""

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}
        self.gates: dict[str, threading.Event] = {}
        self.is_held = threading.Event()
        self.failed = ""
        self.thread: threading.Thread | None = None

    def connect(self, name: str, addresses: list[str], **settings: Any) -> None:
        self.peers[name] = connect(addresses, **settings)

    def put(self, name: str, number: int, key: str, pieces: list[tuple[int, int, int]], note: str) -> None:
        """pieces: (offset, length, seed of its pattern)."""
        data = [(at, memoryview(pattern(seed, length) if length else b"")) for at, length, seed in pieces]
        self.peers[name].put(number, bytes.fromhex(key), data, note.encode())

    def finish(self, name: str, number: int) -> None:
        self.peers[name].finish(number)

    def close(self, name: str) -> None:
        self.peers.pop(name).close()

    def hold(self, point: str) -> None:
        """The next put stops at a failpoint until `go_on`."""
        self.gates[point] = threading.Event()
        self.is_held.clear()

        def stop() -> None:
            self.is_held.set()
            assert self.gates[point].wait(ANSWER_S)

        failpoints.arm(point, stop)

    def begin_put(self, *command: Any) -> None:
        """A put in a thread of its own, that is to be held; returns when it is."""
        def run() -> None:
            self.failed = ""
            try:
                self.put(*command)
            except TransferError as error:
                self.failed = str(error)

        self.thread = threading.Thread(target=run)
        self.thread.start()
        assert self.is_held.wait(ANSWER_S)

    def go_on(self, point: str) -> str:
        """What the held put said at its end."""
        failpoints.disarm(point)
        self.gates.pop(point).set()
        assert self.thread is not None
        self.thread.join()
        return self.failed

    def die_at(self, point: str) -> None:
        failpoints.arm(point, "kill")

    def left_open(self) -> list[int]:
        """Descriptors and threads of this process."""
        return [len(os.listdir("/proc/self/fd")), threading.active_count()]

    def stop(self) -> None:
        failpoints.disarm()
        for peer in self.peers.values():
            peer.close()
        self.peers.clear()


class RemoteSender:
    """The same commands, carried out by a child process."""

    def __init__(self) -> None:
        self.child = subprocess.Popen([sys.executable, "-m", "tests.transfer.senders"], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True, bufsize=1)

    def __getattr__(self, command: str) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            self.send(command, *arguments, **settings)
            return self.answer()
        return call

    def send(self, command: str, *arguments: Any, **settings: Any) -> None:
        self.child.stdin.write(json.dumps([command, arguments, settings]) + "\n")

    def answer(self) -> Any:
        """Raises TransferError as the command did, EOFError if the child is dead."""
        ready, _, _ = select.select([self.child.stdout], [], [], ANSWER_S)
        assert ready, "the sender says nothing"
        line = self.child.stdout.readline()
        if not line:
            raise EOFError
        kind, value = json.loads(line)
        if kind == "failed":
            raise TransferError(value)
        assert kind == "done", value
        return value

    def end(self) -> None:
        self.child.stdin.close()
        self.child.wait(ANSWER_S)
        self.child.stdout.close()


def serve() -> None:
    sender = LocalSender()
    for line in sys.stdin:
        command, arguments, settings = json.loads(line)
        try:
            answer = ["done", getattr(sender, command)(*arguments, **settings)]
        except TransferError as error:
            answer = ["failed", str(error)]
        except BaseException as error:
            answer = ["broken", repr(error)]
        print(json.dumps(answer), flush=True)
    sender.stop()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + ANSWER_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


if __name__ == "__main__":
    serve()
