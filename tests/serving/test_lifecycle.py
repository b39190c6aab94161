"""Start, stop, hang and die: what clients and /health see."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from serving.commands.signals import SECOND_AFTER_S
from tests.serving.server_process import ROOT, ServerProcess, wait_for

LONG = {"prompt": "def main():", "max_tokens": 450, "ignore_eos": True}
CHOICES = 8  # of each call, so that it lasts for seconds on a fast machine too


class Calls:
    """HTTP calls in threads, with what came back."""

    def __init__(self, server: ServerProcess, number: int, *, already: int = 0, **body: Any):
        self.results: list[Any] = []
        self._threads = [threading.Thread(target=self._call, args=(server, {**LONG, "n": CHOICES, **body}))
                         for _ in range(number)]
        for thread in self._threads:
            thread.start()
        running = CHOICES * (number + already)
        wait_for(lambda: server.gauge("xllm:num_requests_running") == running, what="running requests")

    def _call(self, server: ServerProcess, body: dict[str, Any]) -> None:
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60,
                              headers={"Authorization": f"Bearer {server.key}"})
        self.results.append(response)

    def join(self, timeout_s: float = 30.0) -> list[httpx.Response]:
        for thread in self._threads:
            thread.join(timeout_s)
            assert not thread.is_alive(), "a call got no answer"
        return self.results


def test_stuck_then_killed(tmp_path: Path) -> None:
    """A frozen engine turns /health red and recovers; a killed one ends every call with one error, for good."""
    with ServerProcess(tmp_path / "log.txt", "--health-timeout", "2", "--engine-restarts", "0") as server:
        assert server.health().status_code == 200
        assert server.http.get("/ready").json() == {"status": "ready"}
        _freeze_and_thaw(server)
        whole, streams = Calls(server, 2), Calls(server, 4, already=2, stream=True)
        os.kill(server.engine_pid, signal.SIGKILL)
        for response in whole.join():
            assert response.status_code == 503
            assert "signal 9" in response.json()["error"]["message"]
        for response in streams.join():
            events = [line for line in response.text.splitlines() if line]
            assert events[-1] == "data: [DONE]"
            assert sum('"error"' in line for line in events) == 1
            assert "signal 9" in json.loads(events[-2][6:])["error"]["message"]
        health = server.health()
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        assert "signal 9" in health.json()["reason"]
        refused = server.http.post("/v1/completions", json=LONG)
        assert refused.status_code == 503
        assert server.gauge("xllm:engine_up") == 0
        assert server.stop() == 0


def _freeze_and_thaw(server: ServerProcess) -> None:
    calls = Calls(server, 1)
    os.kill(server.engine_pid, signal.SIGSTOP)
    try:
        took_s = wait_for(lambda: server.health().status_code == 503, 8.0, "a red /health")
        assert took_s <= 4.0, "2 s limit, a heartbeat, and a busy machine"
        body = server.health().json()
        assert body["status"] == "stuck"
        assert "no progress for" in body["reason"]
        assert server.http.get("/ready").status_code == 503
    finally:
        os.kill(server.engine_pid, signal.SIGCONT)
    wait_for(lambda: server.health().status_code == 200, 8.0, "a green /health")
    assert calls.join()[0].status_code == 200


def test_drain_with_api_key(tmp_path: Path) -> None:
    """Keys guard all but the open paths. SIGTERM: open calls finish, new ones get 503, the exit code is 0."""
    with ServerProcess(tmp_path / "log.txt", "--api-key", "first", "--api_key=second", "--admin-api-key", "third",
                       key="second", monitor_key="third") as server:
        _check_keys(server)
        calls = Calls(server, 2)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)  # a supervisor's, to the group: no second wish
        wait_for(lambda: "draining" in server.log, what="the drain")
        refused = server.http.post("/v1/completions", json=LONG)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert server.http.get("/ready").status_code == 503
        for response in calls.join():
            assert response.status_code == 200
            assert response.json()["usage"]["completion_tokens"] == CHOICES * LONG["max_tokens"]
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.log


def _check_keys(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url) as anonymous:
        for path in ("/health", "/ready", "/ping", "/version"):
            assert anonymous.get(path).status_code == 200
        guarded = [("GET", path) for path in ("/load", "/metrics", "/v1/models", "/v1/models/demo", "/health//",
                                              "/health/", "/nothing", "/health%2f..%2fmetrics")]
        guarded += [("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")]
        for method, path in guarded:
            response = anonymous.request(method, path)
            assert (path, response.status_code) == (path, 401)
            assert response.json()["error"]["type"] == "authentication_error"
        for value in ("Bearer wrong", "Bearer", "second", "Basic second", "Bearer second2", ""):
            assert anonymous.get("/metrics", headers={"Authorization": value}).status_code == 401
        tricky = {"Host": "x/health?", "Authorization": "Bearer no"}
        assert anonymous.get("/metrics", headers=tricky).status_code in (400, 401)
        assert anonymous.get("/v1/models", headers={"Authorization": "Bearer first"}).status_code == 200
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=f"{server.url}/v1", api_key="no") as client:
        client.models.list()


def test_drain_timeout_aborts(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log.txt", "--drain-timeout", "0.2") as server:
        calls = Calls(server, 2)
        engine = psutil.Process(server.engine_pid)
        server.process.send_signal(signal.SIGTERM)
        for response in calls.join():
            assert response.status_code == 503
            assert "aborted" in response.json()["error"]["message"]
        assert server.process.wait(10) == 0
        wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, what="the engine's end")


def test_engine_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log.txt") as server:
        engine = psutil.Process(server.engine_pid)
        folder = Path(engine.cmdline()[-2])
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        os.kill(server.process.pid, signal.SIGKILL)
        wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 5.0, "the engine's end")
        assert not folder.exists()


def _serve(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "serving.commands.cli", "serve", *flags], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)


def test_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = _serve("/no/such/folder", "--port", str(taken.getsockname()[1]))
    assert result.returncode == 1
    assert "cannot listen on 127.0.0.1:" in result.stderr
    assert "Traceback" not in result.stderr
    assert "/no/such/folder" not in result.stdout + result.stderr, "the model was not looked for"


@pytest.mark.parametrize(("flags", "says"), [
    (("/no/such/folder",), "/no/such/folder"),
    (("--generation-config", "/no/such/folder"), "generation_config"),
    (("--host", "no.such.host.invalid"), "no.such.host.invalid"),
], ids=["model", "generation-config", "host"])
def test_wrong_settings_are_one_clear_line(flags: tuple[str, ...], says: str) -> None:
    result = _serve("--port", "0", *flags)
    assert result.returncode == 1
    assert says in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_tokenizer_that_cannot_be_read_ends_the_start(tmp_path: Path) -> None:
    """The engine needs no chat template: what is wrong with it is found by the HTTP process."""
    folder = Path(shutil.copytree(ROOT / "xllm" / "bundled", tmp_path / "model"))
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    result = _serve("--port", "0", str(folder))
    assert result.returncode == 1
    assert "chat_template.jinja is not valid UTF-8" in result.stderr.splitlines()[-1]


def test_full_queue_then_second_signal(tmp_path: Path) -> None:
    """A call that does not fit into the queue is refused as a whole; a second signal does not wait for the drain."""
    with ServerProcess(tmp_path / "log.txt", "--max-num-seqs", "1", "--max-waiting-requests", "1",
                       "--max-model-len", "2048") as server:
        engine = psutil.Process(server.engine_pid)
        thread = threading.Thread(target=_ignore_errors, args=(server,))
        thread.start()
        wait_for(lambda: server.gauge("xllm:num_requests_running") == 1, what="a running request")
        refused = server.http.post("/v1/completions", json={**LONG, "n": 3})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5"), refused.text
        assert "queue is full" in refused.json()["error"]["message"]
        assert server.value('xllm:admission_rejections_total{engine="0",key_class="none",model_name="demo",'
                            'reason="queue_full"}') == 1
        wait_for(lambda: server.gauge("xllm:num_requests_waiting") == 0, what="an empty queue")
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: "draining" in server.log, what="the drain")
        time.sleep(SECOND_AFTER_S[signal.SIGINT])
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(3) == 128 + signal.SIGINT
        thread.join(5)
        wait_for(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 5.0, "the engine's end")


def _ignore_errors(server: ServerProcess) -> None:
    try:
        httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 2000}, timeout=30)
    except httpx.HTTPError:
        return
