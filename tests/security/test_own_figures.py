"""What a caller of a shared server may know: its own figures. Keys stay where they are needed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serving.security.keys import build_key_ring
from tests.serving.server_process import ServerProcess, wait_for

ALICE, MALLORY, PAGER, OPS = "sk-alice", "sk-mallory", "sk-pager", "sk-ops"
PROMPT = [7 + i % 80 for i in range(333)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "keys").write_text(f"alice {ALICE}\nmallory {MALLORY}\npager {PAGER} metrics\nops {OPS} admin\n")
    with ServerProcess(folder / "log.txt", "--api-key-file", str(folder / "keys"), key=OPS) as server:
        yield server


def get(server: ServerProcess, path: str, key: str) -> httpx.Response:
    return httpx.get(server.url + path, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def ask(server: ServerProcess, key: str) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", headers={"Authorization": f"Bearer {key}"}, timeout=30,
                        json={"prompt": PROMPT, "max_tokens": 33, "ignore_eos": True})
    assert answer.status_code == 200


def test_a_user_sees_its_own_and_an_administrator_all(shared: ServerProcess) -> None:
    before = get(shared, "/v1/stats", MALLORY).text
    ask(shared, ALICE)
    ask(shared, ALICE)  # it finds the prefix of the first
    shared.wait_idle()
    hers = get(shared, "/v1/stats", ALICE).json()
    assert hers["scope"] == "own"
    assert (hers["engine"]["prompt_tokens"], hers["engine"]["generation_tokens"]) == (666, 66)
    assert 300 < hers["engine"]["prefix_cache_hits"] <= 333
    wait_for(lambda: [666, 66] in [row[4:6] for row in get(shared, "/v1/stats", ALICE).json()["history"]["rows"]],
             what="a row")
    for key in (OPS, PAGER):
        whole = get(shared, "/v1/stats", key).json()
        assert whole["scope"] == "server" and whole["engine"]["generation_tokens"] >= 66
        assert any(step[2] == 333 for step in whole["steps"]["rows"])
    after = get(shared, "/v1/stats", MALLORY)
    for name in ("engine", "steps", "requests"):
        assert after.json()[name] == json.loads(before)[name], name
    assert set(map(tuple, (row[1:] for row in after.json()["history"]["rows"]))) <= {(0.0,) * 8}


def test_the_stream_is_the_same(shared: ServerProcess) -> None:
    ask(shared, ALICE)
    head = {"Authorization": f"Bearer {MALLORY}"}
    found: list[dict[str, Any]] = []
    with httpx.stream("GET", f"{shared.url}/v1/stats/stream?interval_ms=200", headers=head, timeout=30) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line[6:]))
            if len(found) == 4:
                break
    assert all(stats["scope"] == "own" and not stats["steps"]["rows"] for stats in found)
    assert all(stats["engine"]["prompt_tokens"] == 0 for stats in found)


def test_metrics_have_an_access_of_their_own(shared: ServerProcess) -> None:
    assert get(shared, "/metrics", ALICE).status_code == 403
    assert "option metrics" in get(shared, "/metrics", ALICE).json()["error"]["message"]
    assert get(shared, "/metrics", PAGER).status_code == get(shared, "/metrics", OPS).status_code == 200
    assert get(shared, "/pause", PAGER).status_code in (403, 405)
    assert get(shared, "/metrics", "sk-none").status_code == 401


def test_an_only_caller_has_nobody_to_hide_from() -> None:
    alone = build_key_ring(api_keys=["a"], admin_keys=["b"]).find(b"a")
    assert alone is not None and alone.may_monitor
    for key in (b"a", b"c"):
        one_of_two = build_key_ring(api_keys=["a", "c"], admin_keys=["b"]).find(key)
        assert one_of_two is not None and not one_of_two.may_monitor


def test_viewers_of_one_caller_leave_room_for_another(shared: ServerProcess) -> None:
    with contextlib.ExitStack() as open_streams:
        def watch(key: str) -> int:
            stream = httpx.stream("GET", f"{shared.url}/v1/stats/stream?interval_ms=60000", timeout=30,
                                  headers={"Authorization": f"Bearer {key}"})
            return open_streams.enter_context(stream).status_code

        assert [watch(MALLORY) for _ in range(33)] == [200] * 32 + [429]
        assert watch(ALICE) == 200


def test_keys_in_the_environment_stay_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine, its worker ranks and the processes that compile grammars of strangers do not inherit them."""
    monkeypatch.setenv("XLLM_API_KEY", "sk-env-user-1")
    monkeypatch.setenv("XLLM_ADMIN_API_KEY", "sk-env-admin-1")
    monkeypatch.setenv("HF_TOKEN", "hf-env-secret")
    with ServerProcess(tmp_path / "log.txt", "--worker", "processes", "--worker-ranks", "1",
                       key="sk-env-user-1") as run:
        answer = run.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 4,
                                                        "response_format": {"type": "json_object"}})
        assert answer.status_code == 200
        found = {}
        for child in psutil.Process(run.process.pid).children(recursive=True):
            name = next((word for word in child.cmdline() if word.startswith("xllm.")), "other")
            found[name] = Path(f"/proc/{child.pid}/environ").read_bytes()
    assert {"xllm.client.engine_process", "xllm.worker.rank", "xllm.structured.grammar_compiler"} <= found.keys()
    assert os.environb[b"PATH"] in found["xllm.structured.grammar_compiler"]
    assert not any(b"sk-env" in environment for environment in found.values())
    assert b"hf-env-secret" not in found["xllm.structured.grammar_compiler"]
