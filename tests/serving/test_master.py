"""`xllm master` over two `xllm serve` processes: what a client sees as they come, one is killed, and all are gone."""

from __future__ import annotations

import concurrent.futures
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving.server_process import ROOT, START_TIMEOUT_S, ServerProcess, wait_for
from tests.serving.test_tracing import Collector, attributes

ADMIN = {"Authorization": "Bearer the-admins"}
SEEDED = {"prompt": "def quicksort(items):", "max_tokens": 400, "temperature": 0.8, "top_k": 20, "seed": 11,
          "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}


class Master:
    """`xllm master` over instances at these addresses, or over what the flags say."""

    def __init__(self, folder: Path, addresses: list[str], *flags: str):
        self._log = folder / "master.log"
        with self._log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving.commands.cli", "master", "--http_server_port", "0",
                 "--admin-api-key", "the-admins", *(["--instances", ",".join(addresses), "--cluster-secret-file",
                                                     str(folder / "secret")] if addresses else []), *flags],
                cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_for(self._ports, START_TIMEOUT_S, "listening")
        except BaseException:
            self.stop()
            raise
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self._ports()[0]}", timeout=60)

    def _ports(self) -> list[int]:
        import psutil
        return [c.laddr.port for c in psutil.Process(self.process.pid).net_connections()
                if c.status == psutil.CONN_LISTEN]

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def cluster(self) -> dict:
        return self.http.get("/cluster", headers=ADMIN).raise_for_status().json()

    def place(self) -> str | None:
        """The instance that has a request."""
        return next((member["name"] for member in self.cluster()["members"] if member.get("sent")), None)

    def metric(self, name: str) -> float:
        found = re.search(rf"^xllm:{name}(?:\{{.*\}})? (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "secret").write_text(secrets.token_hex(32))
    (folder / "secret").chmod(0o600)
    return folder


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def addresses() -> list[str]:
    return [f"127.0.0.1:{port}" for port in free_ports(2)]


@pytest.fixture
def collectors() -> Iterator[tuple[Collector, Collector]]:
    """Of the master's traces and of the instances'."""
    both = Collector(), Collector()
    yield both
    for collector in both:
        collector.shutdown()
        collector.server_close()


@pytest.fixture
def master(folder: Path, addresses: list[str], collectors: tuple[Collector, Collector]) -> Iterator[Master]:
    master = Master(folder, addresses, *collectors[0].flags)
    yield master
    master.http.close()
    assert master.stop() == 0, master.log


def text_of(master: Master, body: dict, at_chunk: int = 0, act=lambda: None) -> tuple[str, dict]:
    """The text of a streamed completion, and its usage. act: called when so many chunks have come."""
    text, usage, number = "", {}, 0
    with master.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = httpx.Response(200, text=line[6:]).json()
            assert "error" not in event, event
            number += 1
            if number == at_chunk:
                act()
            text += event["choices"][0]["text"] if event["choices"] else ""
            usage = event.get("usage") or usage
    return text, usage


def test_what_a_client_sees(master: Master, addresses: list[str], folder: Path,
                            collectors: tuple[Collector, Collector]) -> None:
    health = master.http.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "starting", "reason":
                                                         "phase: waiting for an instance", "is_master": True})
    early = master.http.post("/v1/completions", json={"prompt": "a"})
    assert early.status_code == 503 and early.headers["retry-after"] == "5"
    assert {member["state"] for member in master.cluster()["members"]} == {"suspect"}
    assert master.http.get("/cluster").status_code == 200, "as /metrics: without keys for users everybody is one"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        servers = dict(zip(addresses, pool.map(lambda address: ServerProcess(
            folder / f"{address.rpartition(':')[2]}.log", "--cluster-listen", address, "--cluster-secret-file",
            str(folder / "secret"), *collectors[1].flags), addresses), strict=True))
    try:
        wait_for(lambda: {one["state"] for one in master.cluster()["members"]} == {"active"}, what="both instances")
        wait_for(lambda: master.http.get("/health").status_code == 200, what="the tokenizer")
        assert master.http.get("/v1/models").json()["data"][0]["id"] == "demo"
        expected, usage = text_of(master, SEEDED)
        _one_is_killed(master, servers, expected, usage)
        _it_is_one_trace(*collectors)
        _all_are_gone(master, servers)
    finally:
        for server in servers.values():
            server.http.close()
            server.stop()


def _one_is_killed(master: Master, servers: dict[str, ServerProcess], expected: str, usage: dict) -> None:
    killed = []

    def kill() -> None:
        place = master.place()
        assert place is not None, "it is under way"
        os.kill(servers[place].process.pid, signal.SIGKILL)
        killed.append(place)

    text, found = text_of(master, SEEDED, 20, kill)
    assert text == expected and len(killed) == 1
    assert found["completion_tokens"] == usage["completion_tokens"] == 400
    assert found["prompt_tokens"] == usage["prompt_tokens"]
    assert (master.metric("cluster_recoveries_total"), master.metric("cluster_given_up_total")) == (1.0, 0.0)
    shown = master.cluster()
    states = {member["name"]: (member["state"], member["reason"]) for member in shown["members"]}
    (lost,) = killed
    assert states.pop(lost)[0] == "suspect" and [state for state, _ in states.values()] == ["active"]
    assert shown["decisions"][0]["instances_lost"] == 1 and shown["decisions"][0]["instance"] != lost
    assert "open requests that go on elsewhere: 1" in master.log


def _it_is_one_trace(of_master: Collector, of_instances: Collector) -> None:
    def tries() -> list:
        return [span for span in of_master.spans if span.name == "instance"]

    def served() -> dict:
        return {span.parent_span_id: span for span in of_instances.spans if span.name == "llm_request"}

    # The first answer's one try, then the two of the second; the instance that was killed may have sent nothing.
    wait_for(lambda: len(tries()) == 3 and tries()[2].span_id in served(), what="the spans")
    _, lost, last = tries()
    assert attributes(lost)["xllm.instance.outcome"] == "lost" and attributes(last)["xllm.instance.try"] == 2
    (root,) = (span for span in of_master.spans if span.span_id == last.parent_span_id == lost.parent_span_id)
    assert {root.trace_id} == {last.trace_id, lost.trace_id, served()[last.span_id].trace_id}


def _all_are_gone(master: Master, servers: dict[str, ServerProcess]) -> None:
    for server in servers.values():
        server.process.kill()
    wait_for(lambda: master.http.get("/health").status_code == 503, what="their end is seen")
    health = master.http.get("/health").json()
    assert health["status"] == "waiting" and "no instance takes requests" in health["reason"]
    refused = master.http.post("/v1/completions", json={"prompt": "a"})
    assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
    assert "no instance takes requests" in refused.json()["error"]["message"]
