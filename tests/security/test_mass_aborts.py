"""Callers who ask for a thousand sequences and leave, again and again: nothing stays, and nobody else waits for long.

`ABORTS_ALL=1` runs it at full size.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving.server_process import ServerProcess, wait_for

ALL = os.environ.get("ABORTS_ALL") == "1"
ROUNDS, SEQUENCES, CALLS = (30, 1024, 4) if ALL else (6, 256, 4)  # sequences of a round, over so many calls
MAX_GROWTH_BYTES = 24 << 20
MAX_TTFT_S = 10.0  # on a busy machine; the flood computed to its end would be minutes


@pytest.fixture(scope="module")
def flooded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    # Few blocks: memory of the KV pool counts from its first use on, which is no leak and would hide one.
    with ServerProcess(tmp_path_factory.mktemp("aborts") / "log.txt", "--max-num-seqs", "64", "--num-kv-blocks",
                       "96") as server:
        yield server


def send(server: ServerProcess, num_sequences: int, *, stream: bool, index: int) -> socket.socket:
    """A call for so many sequences of 400 tokens, whose answer nobody has read."""
    num_prompts = -(-num_sequences // 128)  # the largest n
    body = json.dumps({"prompt": [f"def f{index}("] * num_prompts, "n": num_sequences // num_prompts, "stream": stream,
                       "max_tokens": 400, "ignore_eos": True, "temperature": 1.0}).encode()
    peer = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30)
    peer.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return peer


def flood(server: ServerProcess, round_: int) -> None:
    """All sequences of a round arrive, some of them run, and their callers leave in different ways."""
    peers = [send(server, SEQUENCES // CALLS, stream=index % 2 == 0, index=round_ * CALLS + index)
             for index in range(CALLS)]
    wait_for(lambda: server.gauge("xllm:num_requests_running") + server.gauge("xllm:num_requests_waiting")
             >= SEQUENCES, 60.0, "the flood")
    for index, peer in enumerate(peers):
        with contextlib.suppress(OSError):
            if index == 1:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, no farewell
            elif index == 2:
                peer.recv(100)  # in the middle of a stream
            elif index == 3:
                peer.shutdown(socket.SHUT_RDWR)
        peer.close()


def memory_bytes(server: ServerProcess) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in (server.process.pid, server.engine_pid))


def first_token_s(server: ServerProcess) -> float:
    body = {"prompt": "print(", "max_tokens": 3, "stream": True, "ignore_eos": True}
    started = time.monotonic()
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        assert next(line for line in answer.iter_lines() if line.startswith("data: {"))
        return time.monotonic() - started


class Victim(threading.Thread):
    """Somebody who asks for three tokens now and then."""

    def __init__(self, server: ServerProcess):
        super().__init__(daemon=True)
        self._server, self._over = server, threading.Event()
        self.times_s: list[float] = []

    def run(self) -> None:
        while not self._over.wait(0.2):
            self.times_s.append(first_token_s(self._server))

    def stop(self) -> None:
        self._over.set()
        self.join(60)
        assert not self.is_alive()


def test_nothing_stays_of_callers_who_leave(flooded: ServerProcess) -> None:
    for round_ in range(2):  # what is kept for good is kept by now
        flood(flooded, 1000 + round_)
        flooded.wait_idle(60.0)
    before, num_files = memory_bytes(flooded), num_open_files(flooded)
    victim = Victim(flooded)
    victim.start()
    for round_ in range(ROUNDS):
        flood(flooded, round_)
        wait_for(lambda: flooded.gauge("xllm:num_requests_running") + flooded.gauge("xllm:num_requests_waiting") <= 1,
                 30.0, "the end of the flood")
    victim.stop()
    flooded.wait_idle(30.0)
    assert len(victim.times_s) >= 3 and max(victim.times_s) < MAX_TTFT_S, victim.times_s
    wait_for(lambda: memory_bytes(flooded) - before < MAX_GROWTH_BYTES, 10.0, "the return of the memory")
    wait_for(lambda: num_open_files(flooded) <= num_files + 2, 10.0, "the end of the connections")
    assert flooded.http.get("/load").json() == {"server_load": 0}
    assert flooded.health().status_code == 200
    assert "Traceback" not in flooded.log


def num_open_files(server: ServerProcess) -> int:
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (server.process.pid, server.engine_pid))
