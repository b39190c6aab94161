"""Clients that are slow on purpose: they lose their connection, and nobody else notices."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import httpx
import pytest

from tests.serving.server_process import ServerProcess, wait_for

BODY = b'{"prompt": "x", "max_tokens": 2}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("slow") / "log.txt"
    with ServerProcess(log, "--head-timeout", "1", "--body-timeout", "1.5", "--write-timeout", "1",
                       "--max-connections", "40") as server:
        yield server
        server.wait_idle()


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("patient") / "log.txt"
    with ServerProcess(log, "--head-timeout", "200", "--max-connections", "40") as server:
        yield server
        server.wait_idle()


def connect(server: ServerProcess) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    peer = socket.create_connection((host, int(port)), timeout=10)
    return peer


def seconds_until_closed(peer: socket.socket, say: bytes = b"", every_s: float = 0.2) -> float:
    """Says one byte after the other while it waits."""
    started_s, index = time.monotonic(), 0
    peer.settimeout(every_s)
    while time.monotonic() - started_s < 15:
        try:
            if not peer.recv(4096):
                break
        except TimeoutError:
            try:
                peer.sendall(say[index:index + 1])
                index += 1
            except OSError:
                break
        except OSError:
            break
    return time.monotonic() - started_s


@pytest.mark.parametrize("say", [b"", b"GET /health HTTP/1.1\r\nX-Slow: " + b"a" * 200], ids=["silent", "dripping"])
def test_a_head_that_does_not_come(strict: ServerProcess, say: bytes) -> None:
    with connect(strict) as peer:
        assert 0.5 < seconds_until_closed(peer, say) < 6


def test_a_head_that_stops_on_a_connection_that_was_used(strict: ServerProcess) -> None:
    with connect(strict) as peer:
        peer.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in peer.recv(4096)
        assert 0.5 < seconds_until_closed(peer, b"GET /version HTTP/1.1\r\nX: " + b"a" * 200) < 6


def test_a_body_that_does_not_come(strict: ServerProcess) -> None:
    with connect(strict) as peer:
        peer.sendall(HEAD + b"Content-Length: 500\r\n\r\n{")
        assert 1 < seconds_until_closed(peer, b" " * 100) < 7


def test_a_body_that_takes_its_time_within_the_limit(strict: ServerProcess) -> None:
    with connect(strict) as peer:
        peer.sendall(HEAD + f"Content-Length: {len(BODY)}\r\nConnection: close\r\n\r\n".encode())
        for byte in range(0, len(BODY), 8):
            time.sleep(0.1)
            peer.sendall(BODY[byte:byte + 8])
        answer = b""
        while piece := peer.recv(4096):
            answer += piece
    assert b"200 OK" in answer and b'"choices"' in answer


def test_a_reader_that_does_not_read(strict: ServerProcess) -> None:
    """Its stream is far larger than what sockets hold; it ends, its KV is free, and others are served meanwhile."""
    body = (b'{"prompt": "x", "max_tokens": 480, "n": 32, "stream": true, "ignore_eos": true, "logprobs": 5,'
            b' "return_token_ids": true}')
    with connect(strict) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        peer.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: strict.gauge("xllm:num_requests_running") > 0, what="the stream")
        assert strict.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
        wait_for(lambda: strict.gauge("xllm:num_requests_running") == 0, 60.0, "the end of the stream")
        strict.wait_idle()
        wait_for(lambda: strict.http.get("/load").json()["server_load"] == 0, 10.0, "the end of the call")


def test_a_crowd_of_silent_peers_keeps_nobody_out_for_long(strict: ServerProcess) -> None:
    peers = [connect(strict) for _ in range(60)]
    try:
        wait_for(lambda: _is_served(strict), 10.0, "a place")
    finally:
        for peer in peers:
            peer.close()
    assert strict.http.get("/health").status_code == 200


def _is_served(server: ServerProcess) -> bool:
    try:
        with connect(server) as peer:
            peer.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return b"200 OK" in peer.recv(4096)
    except OSError:
        return False


def test_a_newcomer_takes_the_place_of_the_longest_silent_peer(patient: ServerProcess) -> None:
    peers = [connect(patient) for _ in range(39)]
    try:
        for peer in peers:
            peer.sendall(b"GET /version HTTP/1.1\r\n")
        patient.http.get("/version")  # it keeps its connection: the fortieth, and the last that waits
        for _ in range(5):
            peers.append(connect(patient))
            peers[-1].sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in peers[-1].recv(4096)
        assert all(_is_gone(peer, 2.0) for peer in peers[:5]), "the oldest"
        assert not any(_is_gone(peer, 0.01) for peer in peers[5:])
    finally:
        for peer in peers:
            peer.close()


def test_health_is_told_while_every_place_is_in_use(patient: ServerProcess) -> None:
    """Forty bodies are on their way: further callers are turned away with a word, a look at the health is not."""
    patient.http.close()  # its kept connection would be one of the forty
    patient.http = httpx.Client(base_url=patient.url, timeout=60)
    peers = [connect(patient) for _ in range(40)]
    try:
        for peer in peers:
            peer.sendall(HEAD + b"Content-Length: 500\r\n\r\n{")
        time.sleep(0.5)  # until their heads are read
        assert patient.http.get("/health").status_code == 200
        refused = httpx.get(f"{patient.url}/v1/models")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "too many connections" in refused.json()["error"]["message"]
    finally:
        for peer in peers:
            peer.close()
    wait_for(lambda: httpx.get(f"{patient.url}/v1/models").status_code == 200, what="a place")
    patient.wait_idle()


def test_a_slow_reader_who_reads(strict: ServerProcess) -> None:
    """It takes an answer of 2 MB in four times the write time-out."""
    body = json.dumps({"prompt": [list(range(5, 105))] * 32, "max_tokens": 1, "prompt_logprobs": 20}).encode()
    with connect(strict) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        peer.sendall(HEAD + f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answer, started_s = HTTPResponse(peer), time.monotonic()
        answer.begin()
        content = b""
        while piece := answer.read(32768):
            content += piece
            time.sleep(0.02)
    assert len(json.loads(content)["choices"]) == 32, "all of it"
    assert len(content) > 2_000_000 and time.monotonic() - started_s > 2


def test_few_files_for_many_peers(tmp_path: Path) -> None:
    """The limit of open files is below max_connections: it says so, and a crowd neither shuts it nor fills its log."""
    with ServerProcess(tmp_path / "log.txt", max_files=512) as server:
        assert "at most 224 connections" in server.log
        peers = [connect(server) for _ in range(700)]
        try:
            for peer in peers:
                with contextlib.suppress(OSError):
                    peer.sendall(b"GET /version HTTP/1.1\r\n")
            assert all(_is_served(server) for _ in range(10))
            assert server.http.get("/health").status_code == 200
        finally:
            for peer in peers:
                peer.close()
        assert len(server.log) < 5000


def _is_gone(peer: socket.socket, within_s: float) -> bool:
    peer.settimeout(within_s)
    try:
        return not peer.recv(1)
    except TimeoutError:
        return False
    except OSError:
        return True


def test_a_message_with_two_lengths(strict: ServerProcess) -> None:
    """RFC 9112, 6.1: what follows is not read as a request."""
    with connect(strict) as peer:
        peer.sendall(HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY) + BODY
                     + b"\r\n0\r\n\r\nGET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b"".join(iter(lambda: peer.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1 ") == 1
    assert b"Content-Length" in answer and b"Transfer-Encoding" in answer


def test_what_is_no_http_is_answered_as_json(strict: ServerProcess) -> None:
    with connect(strict) as peer:
        peer.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = b"".join(iter(lambda: peer.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400") and b'"error"' in answer and b"application/json" in answer


def test_many_pipelined_requests_are_all_answered(strict: ServerProcess) -> None:
    with connect(strict) as peer:
        peer.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        found, lock = b"", threading.Lock()
        while found.count(b"200 OK") < 20:
            piece = peer.recv(65536)
            assert piece, "closed early"
            with lock:
                found += piece
