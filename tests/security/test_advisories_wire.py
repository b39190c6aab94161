"""Published attacks on the sockets and the HTTP side of serving engines, each against a real server process here.

The names are those of the advisories; docs/security.md lists them with what they did elsewhere.
"""

from __future__ import annotations

import ast
import os
import pickle
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import zmq

from serving.api.app import ROUTES
from serving.api.gate import Access
from serving.api.route import access_table
from serving.security.keys import build_key_ring
from tests.security.advisories import advisory
from tests.security.wire import ALICE, BOB, ROOT_KEY, bearer, request, send
from tests.serving.server_process import ROOT, ServerProcess, wait_for

LEVELS = access_table(ROUTES)
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
    for bomb in bombs(tmp_path / "canary"):
        pickle.loads(bomb)
        assert (tmp_path / "canary").is_dir()
        (tmp_path / "canary").rmdir()


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
        folder = Path(psutil.Process(server.engine_pid).cmdline()[-2])
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
    folder = Path(psutil.Process(open_server.engine_pid).cmdline()[-2])
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
    result = subprocess.run([sys.executable, "-m", "serving.commands.cli", "serve", "--port", "0", *flags], cwd=ROOT,
                            capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "api_key" in result.stderr or "--api-key" in result.stderr


@advisory("CVE-2026-48746")
@pytest.mark.parametrize("host", ["x/health?", "x/?", "127.0.0.1/health?", "127.0.0.1/health#", "x@127.0.0.1",
                                  "127.0.0.1:80/health?"])
def test_a_host_header_does_not_change_the_path(keyed: ServerProcess, advisory_id: str, host: str) -> None:
    for path, level in LEVELS.items():
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
                 "/shutdown", "/kv_cache", "/encode", "/docs", "/redoc", "/debug", "/invocations"):
        assert LEVELS.get(path, Access.ADMIN) is Access.ADMIN, path
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


def test_the_keyed_server_still_works(keyed: ServerProcess) -> None:
    assert keyed.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert "Traceback" not in keyed.log
    assert not {ALICE, BOB, ROOT_KEY} & set(keyed.log.split())
