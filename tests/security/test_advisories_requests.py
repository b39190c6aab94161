"""Published attacks by requests that are too much: headers, numbers, lists, schemas, connections; each against a real
server process, which goes on.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

import httpx
import psutil
import pytest

from serving.parsers.tools.tool_parser import ToolParser
from tests.security.advisories import advisory
from tests.security.wire import send
from tests.serving.server_process import ServerProcess, wait_for


@advisory("CVE-2025-48956")
def test_huge_headers(open_server: ServerProcess, advisory_id: str) -> None:
    """A head of any size costs a bounded amount of memory, and the server goes on."""
    memory = psutil.Process(open_server.process.pid).memory_info().rss
    for _ in range(5):
        assert send(open_server.url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
                    + b"".join(b"X-%d: %s\r\n" % (i, b"v" * 8000) for i in range(2000)) + b"\r\n")[0] in (0, 400, 431)
        send(open_server.url, b"GET /health HTTP/1.1\r\nX: " + b"v" * 20_000_000)
    assert open_server.health().status_code == 200
    assert psutil.Process(open_server.process.pid).memory_info().rss - memory < 64 * 2**20


@advisory("CVE-2026-34756", "CVE-2024-8939")
@pytest.mark.parametrize("body", [
    {"n": 10**9}, {"n": 2**63}, {"n": 10**400}, {"n": -1}, {"n": 0}, {"best_of": 10**9},
    {"n": 128, "prompt": ["a"] * 9}, {"prompt": ["a"] * 10**5},
    {"prompt": [[5]] * 10**5}, {"num_return_sequences": 10**9}, {"beam_width": 10**9}])
def test_fan_out_is_bounded(open_server: ServerProcess, advisory_id: str, body: dict[str, Any]) -> None:
    memory = psutil.Process(open_server.process.pid).memory_info().rss
    answer = open_server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **body})
    assert answer.status_code == 400, answer.text
    assert psutil.Process(open_server.process.pid).memory_info().rss - memory < 32 * 2**20


@advisory("CVE-2024-8768")
@pytest.mark.parametrize(("prompt", "status"), [
    ("", 400), ([], 400), ([[]], 400), ([""], 400), (["a", ""], 400), (None, 400), ([0], 200), ([5] * 511, 200),
    ([5] * 512, 400), ([5] * 513, 400), ([0, 1, 2, 3], 200), ([4095], 200), ([4096], 400), ([-1], 400), (" ", 200)])
def test_prompts_at_the_edges(open_server: ServerProcess, advisory_id: str, prompt: Any, status: int) -> None:
    answer = open_server.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
    assert answer.status_code == status, answer.text
    assert open_server.health().status_code == 200


@advisory("logprobs-stop-abuse")
@pytest.mark.parametrize("body", [
    {"logprobs": 10**9}, {"prompt_logprobs": 10**9}, {"max_tokens": 2**62}, {"min_tokens": 2**62},
    {"stop": ["x"] * 65}, {"stop": "x" * 10**6}, {"stop": ["x" * 10**5] * 64}, {"bad_words": ["x"] * 1025},
    {"stop_token_ids": [1] * 257}, {"logit_bias": {str(i): 1 for i in range(4097)}}, {"truncate_prompt_tokens": -2},
    {"n_discard": -1}, {"top_k": -10**18}, {"seed": 2**65}, {"priority": -2**40},
], ids=lambda body: next(iter(body)))
def test_every_list_and_number_is_bounded(open_server: ServerProcess, advisory_id: str, body: dict[str, Any]) -> None:
    answer = open_server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **body})
    assert answer.status_code == 400, answer.text
    assert len(answer.content) < 2000, "an error does not echo megabytes"


@advisory("CVE-2025-48942", "CVE-2025-48943", "CVE-2025-48944", "CVE-2025-29770", "CVE-2025-32381")
def test_hostile_schemas_harm_nobody(open_server: ServerProcess, advisory_id: str) -> None:
    """Invalid, exploding and endless schemas, patterns and grammars: answered as the client's mistake or honoured, in
    bounded time, and the server's other callers do not notice. No disk is filled."""
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(25):
        deep = {"type": "object", "properties": {"a": deep}}
    schemas: list[Any] = [
        {"type": "something"}, {"type": ["x", 5]}, {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "["},
        {"type": "string", "pattern": "((a{1,500}){1,500}){1,500}"}, {"type": "string", "pattern": "(?<=x)y"},
        {"type": "string", "maxLength": -1}, {"type": "array", "minItems": 2**31, "items": {"type": "string"}},
        {"$ref": "#"}, {"$ref": "http://127.0.0.1:9/x"}, {"$ref": "file:///etc/passwd"}, {"anyOf": []}, {"enum": []},
        {"allOf": [{"$ref": "#/allOf/0"}]}, [], 5, "x", None, True, deep]
    before = _written_bytes(open_server)
    reference = open_server.http.post("/v1/completions", json={"prompt": "def f(", "max_tokens": 8, "temperature": 0})
    for schema in schemas:
        for extra in ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
                      {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}):
            body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **extra}
            answer = httpx.post(f"{open_server.url}/v1/chat/completions", json=body, timeout=30)
            assert answer.status_code in (200, 400), (schema, answer.text)
    for form in ({"regex": "("}, {"regex": "(a|a)*" * 50}, {"grammar": "start: start"}, {"choice": []},
                 {"grammar": "x" * 10**5}):
        body = {"prompt": "x", "max_tokens": 2, "structured_outputs": form}
        answer = open_server.http.post("/v1/completions", json=body)
        assert answer.status_code in (200, 400), (form, answer.text)
    again = open_server.http.post("/v1/completions", json={"prompt": "def f(", "max_tokens": 8, "temperature": 0})
    assert again.json()["choices"] == reference.json()["choices"]
    assert _written_bytes(open_server) - before < 16 * 2**20
    assert open_server.health().status_code == 200


def _written_bytes(server: ServerProcess) -> int:
    """By the server and all its children."""
    parent = psutil.Process(server.process.pid)
    return sum(process.io_counters().write_bytes for process in (parent, *parent.children(recursive=True)))


@advisory("CVE-2026-9540")
def test_a_storm_of_connections_leaves_nothing(open_server: ServerProcess, advisory_id: str) -> None:
    """Calls that are broken off at every stage: descriptors, threads, tasks and KV blocks return to where they were."""
    processes = [psutil.Process(open_server.process.pid), psutil.Process(open_server.engine_pid)]
    baseline: list[tuple[int, int]] = []
    for _ in range(2):  # the first round warms pools up
        _storm(open_server)
        open_server.wait_idle()
        wait_for(lambda: len(processes[0].net_connections("tcp")) <= 3, what="closed connections")
        now = [(process.num_fds(), process.num_threads()) for process in processes]
        for (fds, threads), (old_fds, old_threads) in zip(now, baseline or now, strict=True):
            assert fds <= old_fds + 2
            assert threads <= old_threads + 1
        baseline = now


def _storm(server: ServerProcess) -> None:
    body = b'{"prompt": "def f(", "max_tokens": 400, "stream": true, "ignore_eos": true}'
    head = (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body))
    port = int(server.url.rpartition(":")[2])

    def break_off(cut: int) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall((head + body)[:cut])
            if cut > len(head + body):
                connection.recv(300)

    threads = [threading.Thread(target=break_off, args=(cut,))
               for cut in [0, 1, 20, len(head), len(head) + 5, len(head + body) + 1] * 10]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def reads_in_linear_time(kind: type[ToolParser], unit: str) -> bool:
    """Four times the text in less than twelve times the time; quadratic would be sixteen."""
    spent = []
    for size in (2**16, 2**18):
        parser, text = kind(), unit * (size // len(unit))
        started_s = time.process_time()
        parser.feed(text)
        parser.finish()
        spent.append(time.process_time() - started_s)
    return spent[1] < 12 * spent[0] + 0.05


@advisory("CVE-2025-48887", "CVE-2025-46560")
def test_parsers_of_model_output_are_linear(advisory_id: str) -> None:
    """A megabyte of what each format almost is: every tool parser and reasoning parser reads it in linear time."""
    from serving.parsers.parser_registry import TOOL_PARSERS, tool_parser
    from tests.security.hostile_output import HOSTILE

    for name in TOOL_PARSERS:
        for unit in HOSTILE:
            # More than once: python's collector may take its turn, which is long in a long test run.
            assert any(reads_in_linear_time(tool_parser(name), unit) for _ in range(3)), (name, unit)


def test_the_server_still_works(open_server: ServerProcess) -> None:
    assert open_server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert "Traceback" not in open_server.log
