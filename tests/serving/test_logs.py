"""The log of a real server: a line for each call that has ended, nothing of what was said in it, and no probes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.serving.server_process import ADDRESS, ROOT, ServerProcess, wait_for

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (?:INFO|WARNING|ERROR) (?P<process>\w+) [\w.]+: (?P<text>.+)")
SECRET = "zanzibar"
CHAT = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "ignore_eos": True}
PATH = "/v1/chat/completions"


def line_of(server: ServerProcess, request_id: str) -> str:
    """Its text, without what differs from time to time."""
    found: list[str] = []

    def look() -> bool:
        found[:] = [line for line in server.log.splitlines() if f"request_id={request_id} " in line]
        return bool(found)

    wait_for(look, what=f"a line about {request_id}")
    assert len(found) == 1, found
    match = LINE.fullmatch(found[0])
    assert match and match["process"] == "api", found[0]
    return re.sub(r"(ttft_s|total_s)=\d+\.\d+", r"\1=T", match["text"])


def test_a_line_for_each_call(server: ServerProcess) -> None:
    done = server.http.post(PATH, json=CHAT, headers={"X-Request-Id": "logs-whole"})
    assert (done.headers["x-request-id"], done.json()["id"]) == ("logs-whole", "chatcmpl-logs-whole")
    n = done.json()["usage"]["prompt_tokens"]
    assert line_of(server, "logs-whole") == (
        f"POST {PATH} 200 finished request_id=logs-whole finish_reason=length prompt_tokens={n} generated_tokens=4 "
        "cached_tokens=0 ttft_s=T total_s=T")
    streamed = server.http.post(PATH, json={**CHAT, "stream": True, "n": 2, "request_id": "logs-stream"},
                                headers={"X-Request-Id": "another"})
    assert streamed.headers["x-request-id"] == "logs-stream"  # the body goes before the head
    assert line_of(server, "logs-stream") == (
        f"POST {PATH} 200 finished request_id=logs-stream finish_reason=length prompt_tokens={n} generated_tokens=8 "
        "cached_tokens=0 ttft_s=T total_s=T")
    refused = server.http.post(PATH, json={**CHAT, "max_tokens": -1, "request_id": "logs-refused"})
    assert refused.status_code == 400
    given = refused.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", given)  # refused before its body was looked at any closer
    assert line_of(server, given) == f"POST {PATH} 400 refused request_id={given} total_s=T"
    assert SECRET not in server.log


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(server: ServerProcess, stream: bool) -> None:
    request_id = f"logs-left-{stream}"
    body = {**CHAT, "max_tokens": 400, "stream": stream}
    with httpx.Client(base_url=server.url, timeout=0.3) as client, contextlib.suppress(httpx.ReadTimeout), \
            client.stream("POST", PATH, json=body, headers={"X-Request-Id": request_id}):
        pass  # gone at the stream's head; the other one waits in vain
    line = line_of(server, request_id)
    status = 200 if stream else 499
    assert re.fullmatch(rf"POST {PATH} {status} client_left request_id={request_id} finish_reason=abort "
                        r"prompt_tokens=\d+ generated_tokens=\d+ cached_tokens=\d+ (ttft_s=T )?total_s=T", line), line
    server.wait_idle()


def test_probes_are_silent_and_their_errors_are_not(server: ServerProcess) -> None:
    for path in ("/health", "/ready", "/ping", "/version", "/metrics", "/load", "/v1/stats", "/"):
        answered = server.http.get(path, headers={"X-Request-Id": "logs-probe"})
        assert (answered.status_code, answered.headers["x-request-id"]) == (200, "logs-probe"), path
    wrong = server.http.put("/health", headers={"X-Request-Id": "logs-wrong"})
    assert wrong.status_code == 405
    assert line_of(server, "logs-wrong").startswith("PUT /health 405 refused ")
    assert "logs-probe" not in server.log


def test_nothing_that_is_sent_makes_a_line(server: ServerProcess) -> None:
    """CWE-117: line ends in paths, ids and queries."""
    forged = "2026-01-01 00:00:00.000 INFO api xllm.request: forged key=root"
    path = "/v1/" + "".join(f"%{byte:02x}" for byte in f"x\n{forged}\r\x1b[2J".encode())
    for name, url in (("bad id", "/v1/models"), ("logs-path", path), ("logs-query", f"/v1/models?x=%0a{forged}")):
        answered = server.http.get(url, headers={"X-Request-Id": name})
        assert (answered.headers["x-request-id"] == name) is (" " not in name)
    assert line_of(server, "logs-path").startswith(f"GET {path[:128]} 404 refused request_id=logs-path ")
    assert line_of(server, "logs-query").startswith("GET /v1/models 200 finished ")
    assert "forged" not in server.log and "bad id" not in server.log and "\x1b" not in server.log


def test_a_log_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    out = tmp_path / "out.txt"
    with out.open("wb") as stdout:
        process = subprocess.Popen([sys.executable, "-m", "serving.commands.cli", "serve", "--port", "0",
                                    "--max-model-len", "128", "--num-kv-blocks", "64"], cwd=ROOT, stdout=stdout,
                                   stderr=writer)
    os.close(writer)
    try:
        wait_for(lambda: "curl" in out.read_text() or process.poll() is not None, 90.0, "start-up")
        found = ADDRESS.search(out.read_text())
        assert found
        with httpx.Client(base_url=found[1], timeout=10) as client:
            for _ in range(60):  # three times what the pipe holds
                assert client.get("/v1/models").status_code == 200
            assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
            assert "xllm:log_lines_lost_total{" in client.get("/metrics").text
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(reader)
