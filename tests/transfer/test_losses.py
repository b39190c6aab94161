"""Senders and receivers that are killed or stopped, and bytes that are changed on their way."""

from __future__ import annotations

import os
import signal
import socket
import threading

import pytest

from tests.transfer.receiving import KEY, LEASE_S, SIZE, put_until_refused, take
from tests.transfer.senders import pattern
from xllm.errors import TransferError
from xllm.transfer.tcp import SESSION_BYTES
from xllm.transfer.transport import Arrived, Ended
from xllm.transfer.transports import NAMES, open_window

BETWEEN_PROCESSES = [name for name in NAMES if name != "memory"]


@pytest.mark.parametrize("transport", BETWEEN_PROCESSES)
@pytest.mark.parametrize("point", ["transfer.put_begun", "transfer.put_half"])
def test_a_sender_that_is_killed_in_the_middle_of_a_put(window, mortal, point):
    for number in (7, 8):
        window.grant(number, KEY, [(0, SIZE)], LEASE_S)
    mortal.connect("a", window.addresses)
    mortal.put("a", 7, KEY.hex(), [(0, 10, 1)], "first")
    mortal.put("a", 8, KEY.hex(), [(0, 10, 1)], "other")
    assert take(window, 2) == [Arrived(7, b"first", 10), Arrived(8, b"other", 10)]
    mortal.finish("a", 8)
    assert take(window, 1) == [Ended(8, "")]
    mortal.die_at(point)
    with pytest.raises(EOFError):
        mortal.put("a", 7, KEY.hex(), [(start, 1024, 5) for start in range(0, SIZE, 1024)], "never")
    assert take(window, 1) == [Ended(7, "its sender is gone")]


@pytest.mark.parametrize("transport", ["shm"])
def test_a_sender_that_is_stopped_in_a_put_keeps_its_ranges_until_it_dies(window, mortal):
    """It could still write, so the window must not use them for something else."""
    window.grant(7, KEY, [(0, SIZE)], 0.2)
    mortal.connect("a", window.addresses)
    mortal.hold("transfer.put_half")
    mortal.begin_put("a", 7, KEY.hex(), [(0, 1024, 5), (1024, 1024, 5)], "never")
    mortal.child.send_signal(signal.SIGSTOP)
    assert window.take(0.5) == []
    mortal.child.kill()
    assert take(window, 1) == [Ended(7, "its lease is over")]


@pytest.mark.parametrize("transport", BETWEEN_PROCESSES)
def test_a_receiver_that_is_killed(transport, child):
    pid, addresses = fork_a_window(transport)
    try:
        child.connect("a", addresses, timeout_s=2.0)
        child.put("a", 7, KEY.hex(), [(0, 10, 1)], "x")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with pytest.raises(TransferError):
        put_until_refused(child, 7)
    with pytest.raises(TransferError):
        child.finish("a", 7)
    child.stop()


def fork_a_window(transport: str) -> tuple[int, list[str]]:
    """A process with a window that grants number 7, and takes."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        opened = open_window([transport], SIZE)
        opened.grant(7, KEY, [(0, SIZE)], LEASE_S)
        os.write(writing, "\n".join(opened.addresses).encode())
        os.close(writing)
        while True:
            opened.take(60)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pid, pipe.read().split("\n")


class CorruptingProxy:
    """A connection in between, which changes one byte."""

    def __init__(self, port: int, at: int):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.run, args=(port, at))
        self.thread.start()

    def run(self, port: int, at: int) -> None:
        near, _ = self.listener.accept()
        self.listener.close()
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            num_bytes = 0
            while data := bytearray(near.recv(65_536)):
                if num_bytes <= at < num_bytes + len(data):
                    data[at - num_bytes] ^= 1
                num_bytes += len(data)
                far.sendall(data)


@pytest.mark.parametrize("checksums", [None, False])
def test_a_byte_that_is_changed_on_its_way(child, checksums):
    window = open_window(["tcp"], SIZE, checksums=checksums)
    [address] = window.addresses
    port = address.split("/")[3]
    proxy = CorruptingProxy(int(port), SESSION_BYTES + 5000)
    window.grant(7, KEY, [(0, SIZE)], LEASE_S)
    child.connect("a", [address.replace(f"/{port}/", f"/{proxy.port}/")])
    child.put("a", 7, KEY.hex(), [(0, 3000, 1), (8000, 4000, 2)], "x")
    if checksums is False:
        assert take(window, 1) == [Arrived(7, b"x", 7000)]
    else:
        assert take(window, 1) == [Ended(7, "bytes that came are not those that were sent (CRC-32)")]
        with pytest.raises(TransferError, match="grant 7 is over: bytes that came"):
            child.finish("a", 7)
    assert window.memory[10_000] == pattern(2, 4000)[2000] ^ 1
    child.stop()
    proxy.thread.join()
    window.close()
