"""An engine that dies or hangs is started again: what it had fails once and clearly, what comes later is served."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from tests.adapters import write_adapter
from tests.serving.server_process import ServerProcess, wait_for
from tests.serving.test_lifecycle import LONG, Calls

SHORT = {"prompt": "def f(", "max_tokens": 8, "temperature": 0}
ADMIN = "an-admin-key-of-some-length"


def answer(server: ServerProcess, **extra: object) -> str:
    response = server.http.post("/v1/completions", json=SHORT | extra)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_killed_and_back(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapters" / "x", 1)
    flags = ("--enable-lora", "--lora-folder", str(tmp_path / "adapters"), "--admin-api-key", ADMIN,
             "--engine-restarts", "2")
    with ServerProcess(tmp_path / "log.txt", *flags) as server:
        server.http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "x"},
                         headers={"Authorization": f"Bearer {ADMIN}"})
        texts = answer(server), answer(server, model="x")
        for _ in range(2):
            calls, streams, pid = Calls(server, 2), Calls(server, 2, already=2, stream=True), server.engine_pid
            os.kill(pid, signal.SIGKILL)
            for response in calls.join():
                assert response.status_code == 503 and "signal 9" in response.text
            for response in streams.join():
                assert response.text.count('"error"') == 1 and "signal 9" in response.text
            statuses = set()

            def is_back(seen: set[str] = statuses) -> bool:
                health = server.health()
                seen.add(health.json()["status"])
                return health.status_code == 200

            refused = server.http.post("/v1/completions", json=LONG)
            assert refused.status_code == 503
            wait_for(is_back, 60.0, "a restart")
            assert statuses <= {"dead", "restarting", "ok"} and server.engine_pid != pid
            assert (answer(server), answer(server, model="x")) == texts
        assert server.gauge("xllm:engine_up") == 1
        os.kill(server.engine_pid, signal.SIGKILL)
        wait_for(lambda: "2 times within" in server.log, 20.0, "giving up")
        assert server.health().json()["status"] == "dead"
        assert server.stop() == 0


def test_a_rank_that_dies_or_stops_is_replaced_with_the_engine(tmp_path: Path) -> None:
    """Also where nobody asks anything of it meanwhile."""
    with ServerProcess(tmp_path / "log.txt", "--worker", "processes", "--worker-ranks", "2", "--log-format",
                       "json") as server:
        text = answer(server)
        for signum in (signal.SIGKILL, signal.SIGSTOP):
            engine, num_said = server.engine_pid, server.log.count("worker rank 1 ")
            ranks = [child.pid for child in psutil.Process(engine).children()]
            assert len(ranks) == 2
            os.kill(ranks[1], signum)
            wait_for(lambda: server.health().status_code != 200, 10.0, "an end of the engine")
            assert server.log.count("worker rank 1 ") > num_said
            wait_for(lambda: server.health().status_code == 200, 60.0, "a restart")
            assert answer(server) == text and server.engine_pid != engine
            assert not any(psutil.pid_exists(pid) for pid in ranks)
        assert server.stop() == 0
    lines = [json.loads(line) for line in server.log.splitlines()]  # of all processes, on stdout too
    assert {line["process"] for line in lines} == {"api", "engine"}
    assert all(list(line)[:5] == ["time", "level", "process", "logger", "message"] for line in lines)
    said = [line for line in lines if "worker rank 1 " in line["message"]]  # once where it happened, once what follows
    assert [(line["process"], line["logger"]) for line in said] == 2 * [("engine", "xllm.engine"),
                                                                        ("api", "xllm.supervisor")]
    assert not any("exception" in line for line in lines)


def test_a_step_that_hangs_is_ended(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log.txt", "--step-timeout", "2") as server:
        text, pid = answer(server), server.engine_pid
        calls = Calls(server, 1)
        os.kill(pid, signal.SIGSTOP)
        response = calls.join()[0]
        assert response.status_code == 503
        assert "no progress for" in response.text and "step_timeout 2 s" in response.text
        wait_for(lambda: server.health().status_code == 200, 60.0, "a restart")
        assert answer(server) == text and server.engine_pid != pid


def test_an_engine_that_cannot_come_back_is_given_up(tmp_path: Path) -> None:
    """Its checkpoint is gone."""
    from xllm.hub import resolve_model_path

    model = tmp_path / "model"
    model.mkdir()
    for file in resolve_model_path(None).iterdir():
        if file.is_file():
            (model / file.name).write_bytes(file.read_bytes())
    with ServerProcess(tmp_path / "log.txt", str(model), "--engine-restarts", "2") as server:
        (model / "model.safetensors").unlink()
        os.kill(server.engine_pid, signal.SIGKILL)
        wait_for(lambda: "2 times within" in server.log, 60.0, "giving up")
        health = server.health()
        assert health.status_code == 503 and "safetensors" in health.json()["reason"]
        assert str(tmp_path) not in health.text
        assert server.http.post("/v1/completions", json=SHORT).status_code == 503
        assert server.stop() == 0


@pytest.mark.parametrize(("point", "reason"), [
    ("engine.add=kill:4", "signal 9"), ("engine.step=kill:30", "signal 9"), ("engine.settled=EIO:30", "OSError"),
])
def test_faults_inside_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, reason: str) -> None:
    """Every process of the engine meets the fault anew; between two of them requests are answered."""
    monkeypatch.setenv("XLLM_FAILPOINTS", point)
    num_faults = 2 if "add" in point else 1  # that they come anew is the same for all points
    with ServerProcess(tmp_path / "log.txt", "--engine-restarts", "50") as server:
        statuses = []
        for _ in range(4 * num_faults + 1):
            response = server.http.post("/v1/completions", json=SHORT)
            statuses.append(response.status_code)
            if response.status_code == 503:
                assert reason in response.text
                wait_for(lambda: server.health().status_code == 200, 60.0, "a restart")
        assert statuses.count(503) == num_faults and set(statuses) == {200, 503}
        assert server.gauge("xllm:engine_restarts_total") == num_faults
        server.wait_idle()


@pytest.mark.parametrize("flag", ["--engine-restarts", "--step-timeout", "--engine-restart-window"])
def test_negative_numbers_are_refused(tmp_path: Path, flag: str) -> None:
    with pytest.raises(AssertionError, match=flag.strip("-").replace("-", "_")):
        ServerProcess(tmp_path / "log.txt", flag, "-1")


def test_stopping_while_it_restarts(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log.txt") as server:
        os.kill(server.engine_pid, signal.SIGKILL)
        wait_for(lambda: "is started again" in server.log, 20.0, "a restart")
        assert httpx.get(f"{server.url}/version").status_code == 200
        assert server.stop() == 0
    assert "Traceback" not in server.log
