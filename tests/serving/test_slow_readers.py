"""Two hundred readers of a byte a second, on every route that streams: what is kept for them is bounded, whoever falls
behind what sockets hold is cut off, and others are served."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psutil
import pytest

from tests.serving.server_process import ServerProcess, wait_for
from tests.serving.test_hostile_regexes import LONGEST_SILENCE_S, MAX_GROWTH_MB, Victim

NUM_READERS, SECONDS = 200, 5
CHAT = [{"role": "user", "content": "x"}]
LIGHT: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 6}, "/v1/chat/completions": {"messages": CHAT, "max_tokens": 6},
    "/v1/responses": {"input": "x", "max_output_tokens": 16}, "/v1/messages": {"messages": CHAT, "max_tokens": 6},
}
# More than a socket holds.
HEAVY: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 480, "n": 16, "ignore_eos": True, "logprobs": 20},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 400, "n": 16, "ignore_eos": True, "logprobs": True,
                             "top_logprobs": 20},
}


@pytest.fixture(scope="module")
def hurried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("readers") / "log.txt", "--write-timeout", "2") as server:
        server.http.post("/v1/completions", json=LIGHT["/v1/completions"])
        yield server
        server.wait_idle(60.0)


def reader(server: ServerProcess, path: str, body: dict[str, Any]) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    peer.connect((host, int(port)))
    content = json.dumps({**body, "stream": True}).encode()
    peer.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return peer


def memory_mb(server: ServerProcess) -> float:
    return sum(psutil.Process(pid).memory_info().rss for pid in (server.process.pid, server.engine_pid)) / 2**20


def test_readers_of_a_byte_a_second(hurried: ServerProcess) -> None:
    before_mb, largest_mb = memory_mb(hurried), 0.0
    wishes = [*HEAVY.items(), *(list(LIGHT.items())[index % len(LIGHT)] for index in range(NUM_READERS - len(HEAVY)))]
    with ExitStack() as stack:
        peers = [stack.enter_context(reader(hurried, path, body)) for path, body in wishes]
        for peer in peers:
            peer.setblocking(False)
        time.sleep(1)  # until their requests are read, which is not what is measured
        victim = stack.enter_context(Victim(hurried))

        def have_read() -> bool:
            """A byte each; whether most of them had one to read."""
            nonlocal largest_mb
            time.sleep(1)
            largest_mb = max(largest_mb, memory_mb(hurried))
            return len([peer.recv(1) for peer in peers if _has_more(peer)]) > NUM_READERS / 2

        for _ in range(SECONDS - 1):
            have_read()
        wait_for(have_read, 60.0, "answers to most of them")
        wait_for(lambda: _num_cut(hurried) >= len(HEAVY), 60.0,
                 "the end of those who fall behind")
        wait_for(lambda: hurried.gauge("xllm:num_requests_running") <= 1, 60.0, "the end of their requests")
    assert victim.num_streams and victim.silence_s < LONGEST_SILENCE_S
    assert largest_mb - before_mb < MAX_GROWTH_MB


def _has_more(peer: socket.socket) -> bool:
    try:
        return bool(peer.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


def _num_cut(server: ServerProcess) -> float:
    series = r'^xllm:connections_closed_total\{.*reason="write_timeout".*\} (\S+)$'
    found = re.search(series, server.metrics(), re.MULTILINE)
    assert found, "the counter is not in /metrics"
    return float(found[1])
