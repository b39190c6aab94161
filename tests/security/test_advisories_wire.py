"""Published attacks on the sockets and the HTTP side of serving engines, each against a real server process here.

The names are those of the advisories; docs/security.md lists them with what they did elsewhere.
"""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import zmq

from serving.api.auth import ROUTES, Access
from serving.security.keys import build_key_ring
from tests.security.advisories import advisory
from tests.security.wire import ALICE, BOB, ROOT_KEY, bearer, request, send
from tests.serving.server_process import ROOT, ServerProcess, wait_for

SHIPPED = ("xllm", "serving", "backends", "graph", "cuda_ops", "npu_ops")
LOADERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "jsonpickle", "yaml"}
CALLS = {"recv_pyobj", "send_pyobj", "unsafe_load", "full_load", "load_module", "send_serialized", "recv_serialized"}
EVALUATORS = {"eval", "exec", "compile", "__import__"}


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def bombs(canary: Path) -> list[bytes]:
    return [pickle.dumps(Bomb(canary), protocol) for protocol in (0, 2, 5)]


def sources() -> list[Path]:
    return [path for top in SHIPPED for path in sorted((ROOT / top).rglob("*.py"))]


def test_a_bomb_goes_off_where_pickles_are_read(tmp_path: Path) -> None:
    """That the tests below prove something."""
    for index, bomb in enumerate(bombs(tmp_path / "canary")):
        pickle.loads(bomb)
        (tmp_path / "canary").rmdir()
        assert index < 3


# --- pickle on sockets


@advisory("CVE-2025-32444", "CVE-2025-29783", "CVE-2025-30165", "CVE-2024-11041", "CVE-2024-9052", "CVE-2024-9053",
          "LMCache-MP", "vllm-ascend-metadata", "LMDeploy-zmq_rpc")
def test_no_source_file_can_unpickle(advisory_id: str) -> None:
    """No module that reads pickles is imported and no such method called, in anything that is installed."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            assert not {name.split(".")[0] for name in names} & LOADERS, path
            if isinstance(node, ast.Attribute):
                assert node.attr not in CALLS, path
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                assert (owner, node.attr) not in {("torch", "load"), ("np", "load"), ("numpy", "load")}, path


@advisory("CVE-2026-22807", "CVE-2026-27893")
def test_no_source_file_trusts_remote_code(advisory_id: str) -> None:
    """Nothing evaluates text, and `trust_remote_code` is never anything but False."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in EVALUATORS, path
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path


@advisory("CVE-2025-32444", "CVE-2026-3059", "CVE-2026-3060", "CVE-2026-3989", "CVE-2026-7301", "CVE-2025-10164")
def test_pickle_bombs_on_every_socket(advisory_id: str, tmp_path: Path) -> None:
    """On the port, raw and as a body of every kind; on the engine's private sockets, where they end the server."""
    canary = tmp_path / "canary"
    with ServerProcess(tmp_path / "log.txt") as server:
        for bomb in bombs(canary):
            send(server.url, bomb + b"\r\n\r\n")
            for kind in ("application/json", "application/octet-stream", "application/x-pickle"):
                answer = httpx.post(f"{server.url}/v1/completions", content=bomb, headers={"Content-Type": kind})
                assert answer.status_code in (400, 415)
        assert server.health().status_code == 200
        folder = Path(psutil.Process(server.engine_pid).cmdline()[-1])
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.setsockopt(zmq.LINGER, 2000)
            push.connect(f"ipc://{folder / 'reports'}")
            push.send(bombs(canary)[2])
            wait_for(lambda: server.health().status_code == 503, what="the end of a server whose engine raves")
        assert not canary.exists()
        assert "cannot be read" in server.health().json()["reason"]


@advisory("CVE-2025-47277", "CVE-2025-30202", "CVE-2025-23254")
def test_all_sockets_are_private(open_server: ServerProcess, advisory_id: str) -> None:
    """One TCP port on loopback; unix sockets in a folder that only their owner can enter; nothing in the abstract
    namespace, which has no permissions."""
    pids = (open_server.process.pid, open_server.engine_pid)
    inodes = {os.readlink(link).removeprefix("socket:[").rstrip("]") for pid in pids
              for link in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for line in Path(f"/proc/{pids[0]}/net/unix").read_text().splitlines()[1:]]
    paths = {row[7] for row in rows if len(row) > 7 and row[6] in inodes}
    folder = Path(psutil.Process(open_server.engine_pid).cmdline()[-1])
    assert {Path(path).parent for path in paths} == {folder}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.stat().st_uid == os.getuid()
    tcp = {connection.laddr for pid in pids for connection in psutil.Process(pid).net_connections("inet")
           if connection.status == psutil.CONN_LISTEN}
    assert [address.ip for address in tcp] == ["127.0.0.1"]


@advisory("CVE-2025-30202")
def test_other_addresses_of_this_machine_do_not_answer(open_server: ServerProcess, advisory_id: str) -> None:
    port = int(open_server.url.rpartition(":")[2])
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses
           if address.family == socket.AF_INET} | {"127.0.0.2"}
    for address in own - {"127.0.0.1"}:
        with pytest.raises(OSError), socket.create_connection((address, port), timeout=2):
            pass


# --- who may call


@advisory("CVE-2026-26220")
@pytest.mark.parametrize("flags", [("--api-key", ""), ("--api-key", " "), ("--admin-api-key", ""),
                                   ("--api-key-file", "/dev/null"), ("--host", "0.0.0.0")], ids=" ".join)
def test_an_empty_secret_fails_closed(advisory_id: str, flags: tuple[str, ...]) -> None:
    """An empty secret was falsy there, so nothing was checked."""
    result = subprocess.run([sys.executable, "-m", "serving.cli", "serve", "--port", "0", *flags], cwd=ROOT,
                            capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "api_key" in result.stderr or "--api-key" in result.stderr


@advisory("CVE-2026-48746")
@pytest.mark.parametrize("host", ["x/health?", "x/?", "127.0.0.1/health?", "127.0.0.1/health#", "x@127.0.0.1",
                                  "127.0.0.1:80/health?"])
def test_a_host_header_does_not_change_the_path(keyed: ServerProcess, advisory_id: str, host: str) -> None:
    for path, level in ROUTES.items():
        if level is not Access.PUBLIC:
            status, _ = request(keyed.url, "GET", re.sub(r"\{[^}]*\}", "demo", path), host=host)
            assert status == 400
    forwarded = [("X-Forwarded-Host", host), ("X-Forwarded-Prefix", "/health"), ("X-Original-URL", "/health"),
                 ("X-Rewrite-URL", "/health"), ("Forwarded", f"host={host}"), ("X-Forwarded-For", "127.0.0.1")]
    assert request(keyed.url, "GET", "/metrics", forwarded)[0] == 401


@advisory("CVE-2025-59425")
def test_keys_are_compared_in_constant_time(advisory_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By digests of one length, with the library's constant-time comparison, and every one of them."""
    import hmac

    seen: list[tuple[int, int]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append((len(a), len(b))) or real(a, b))
    ring = build_key_ring(api_keys=["first", "second", "third"])
    for key in (b"first", b"third", b"f", b"firs", b"x" * 10_000):
        seen.clear()
        ring.find(key)
        assert seen == [(32, 32)] * 3


@advisory("API-key-scope", "CVE-2025-10164", "CVE-2026-7301")
def test_every_route_has_a_level_and_what_changes_the_server_needs_an_admin(keyed: ServerProcess,
                                                                            advisory_id: str) -> None:
    """Routes of other engines that let anybody load weights, reset or stop the server: absent, or an admin's."""
    for path in ("/update_weights", "/update_weights_from_tensor", "/update_weights_from_disk",
                 "/update_weights_from_distributed", "/init_weights_update_group", "/get_weights_by_name",
                 "/release_memory_occupation", "/resume_memory_occupation", "/collective_rpc", "/start_profile",
                 "/stop_profile", "/flush_cache", "/reset_prefix_cache", "/sleep", "/wake_up", "/wakeup", "/pause",
                 "/resume", "/abort", "/abort_request", "/server_info", "/get_server_info", "/v1/load_lora_adapter",
                 "/v1/unload_lora_adapter", "/load_lora_adapter", "/set_internal_state", "/configure_logging",
                 "/shutdown", "/kv_cache", "/encode", "/docs", "/redoc", "/openapi.json", "/debug", "/invocations"):
        assert ROUTES.get(path, Access.ADMIN) is Access.ADMIN, path
        for method in ("GET", "POST", "DELETE"):
            assert request(keyed.url, method, path)[0] == 401
            assert request(keyed.url, method, path, list(bearer(BOB).items()))[0] in (403, 404)


# --- addresses that the server is asked to fetch


@advisory("CVE-2025-6242", "CVE-2026-24779", "CVE-2026-25960", "CVE-2026-33626", "CVE-2026-34753", "CVE-2026-0599")
def test_no_address_in_a_request_is_fetched(open_server: ServerProcess, advisory_id: str) -> None:
    """In media parts, file fields and Markdown: refused or plain text, and nobody connects. The fetcher itself is held
    to more in test_media_fetch.py."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.2)
        port = trap.getsockname()[1]
        urls = [f"http://127.0.0.1:{port}/", f"http://example.com\\@127.0.0.1:{port}/", f"http://[::1]:{port}/",
                f"http://2130706433:{port}/", "http://169.254.169.254/latest/meta-data/", "file:///etc/passwd"]
        for url in urls:
            parts = [{"type": kind, kind: {"url": url}} for kind in ("image_url", "video_url", "audio_url")]
            parts += [{"type": "file", "file": {"file_url": url}}, {"type": "input_image", "image_url": url}]
            for part in parts:
                body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
                answer = open_server.http.post("/v1/chat/completions", json=body)
                assert answer.status_code == 400, answer.text
            for extra in ({"file_url": url}, {"input_file": url}, {"documents": [{"url": url}]}):
                assert open_server.http.post("/v1/completions", json={"prompt": "x", **extra}).status_code == 400
            text = {"prompt": f"![image]({url}) <img src='{url}'>", "max_tokens": 1}
            assert open_server.http.post("/v1/completions", json=text).status_code == 200
        with pytest.raises(TimeoutError):
            trap.accept()


# --- resources


@advisory("CVE-2025-48956")
def test_huge_headers(open_server: ServerProcess, advisory_id: str) -> None:
    """A head of any size costs a bounded amount of memory, and the server goes on."""
    memory = psutil.Process(open_server.process.pid).memory_info().rss
    for number in range(5):
        assert send(open_server.url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
                    + b"".join(b"X-%d: %s\r\n" % (i, b"v" * 8000) for i in range(2000)) + b"\r\n")[0] in (0, 400, 431)
        send(open_server.url, b"GET /health HTTP/1.1\r\nX: " + b"v" * 20_000_000)
        assert number < 5
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


@advisory("CVE-2025-48887", "CVE-2025-46560")
def test_parsers_of_model_output_are_linear(advisory_id: str) -> None:
    """A megabyte of what each format almost is: every tool parser and reasoning parser reads it in linear time."""
    from serving.parsers.registry import TOOL_PARSERS, tool_parser
    from tests.security.hostile_output import HOSTILE

    for name in TOOL_PARSERS:
        for unit in HOSTILE:
            spent = []
            for size in (2**16, 2**18):
                parser = tool_parser(name)()
                text = unit * (size // len(unit))
                started_s = time.process_time()
                parser.feed(text)
                parser.finish()
                spent.append(time.process_time() - started_s)
            assert spent[1] < 12 * spent[0] + 0.05, (name, unit, spent)


def test_the_servers_still_work(open_server: ServerProcess, keyed: ServerProcess) -> None:
    assert open_server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert "Traceback" not in open_server.log
    assert "Traceback" not in keyed.log
    assert keyed.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert not {ALICE, BOB, ROOT_KEY} & set(keyed.log.split())
