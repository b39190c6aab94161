"""The engine as a whole, over HTTP: paused, asleep, woken, its cache forgotten, its requests aborted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving.server_process import ServerProcess, wait_for

ADMIN, USER = "an-admin-key-of-some-length", "a-user-key-of-some-length"
BODY = {"prompt": "def f(", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
ROUTES = ("/pause", "/resume", "/sleep", "/wakeup", "/abort", "/reset_prefix_cache")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("admin") / "log.txt"
    with ServerProcess(log, "--api-key", USER, "--admin-api-key", ADMIN, "--enable-prefix-caching", key=USER) as server:
        yield server
        server.wait_idle()


@pytest.fixture(scope="module")
def admin(keyed: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=keyed.url, timeout=60, headers={"Authorization": f"Bearer {ADMIN}"}) as client:
        yield client


def answer_of(keyed: ServerProcess, **extra: object) -> httpx.Response:
    return keyed.http.post("/v1/completions", json={**BODY, **extra})


def in_background(keyed: ServerProcess, **extra: object) -> tuple[threading.Thread, list[httpx.Response]]:
    found: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: found.append(answer_of(keyed, **extra)))
    thread.start()
    return thread, found


def test_only_an_admin_may(keyed: ServerProcess, server: ServerProcess) -> None:
    for path in ROUTES:
        assert keyed.http.post(path).status_code == 403
        assert server.http.post(path).status_code == 403, "closed on a server without an admin key"
    assert keyed.http.get("/server_info").status_code == 403


@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_a_paused_engine_holds_new_requests(keyed: ServerProcess, admin: httpx.Client, mode: str) -> None:
    text = answer_of(keyed).json()["choices"][0]["text"]
    assert admin.post("/pause", json={"mode": mode}).json()["is_paused"]
    thread, found = in_background(keyed)
    wait_for(lambda: admin.get("/is_sleeping").json()["num_open"] == 1)
    assert not found
    assert admin.post("/resume").json()["is_paused"] is False
    thread.join()
    assert found[0].json()["choices"][0]["text"] == text


def test_pausing_with_abort_ends_what_runs(keyed: ServerProcess, admin: httpx.Client) -> None:
    thread, found = in_background(keyed, max_tokens=480)
    wait_for(lambda: admin.get("/is_sleeping").json()["num_open"] == 1)
    admin.post("/pause", params={"mode": "abort"})
    thread.join()
    assert found[0].status_code == 503
    admin.post("/resume")
    assert answer_of(keyed).status_code == 200


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_and_woken(keyed: ServerProcess, admin: httpx.Client, level: int) -> None:
    text = answer_of(keyed).json()["choices"][0]["text"]
    assert admin.post("/sleep", params={"level": level}).json()["sleep_level"] == level
    refused = answer_of(keyed)
    assert refused.status_code == 503 and "sleeps" in refused.text
    assert keyed.http.get("/health").status_code == 200
    assert admin.post("/wake_up").json()["is_sleeping"] is False
    assert answer_of(keyed).json()["choices"][0]["text"] == text


def test_asleep_only_when_idle(keyed: ServerProcess, admin: httpx.Client) -> None:
    thread, found = in_background(keyed, max_tokens=400)
    wait_for(lambda: admin.get("/is_sleeping").json()["num_open"] == 1)
    refused = admin.post("/sleep")
    assert refused.status_code == 409 and "open" in refused.text
    thread.join()
    assert found[0].status_code == 200


def test_named_calls_are_aborted(keyed: ServerProcess, admin: httpx.Client) -> None:
    thread, found = in_background(keyed, max_tokens=480, request_id="mine")
    wait_for(lambda: admin.get("/is_sleeping").json()["num_open"] == 1)
    assert admin.post("/abort", json={"request_ids": ["another"]}).json() == {"aborted": 0}
    assert admin.post("/abort_requests", json={"request_ids": ["cmpl-mine"]}).json() == {"aborted": 1}
    thread.join()
    assert found[0].status_code == 503


def test_the_cache_is_forgotten(keyed: ServerProcess, admin: httpx.Client) -> None:
    prompt = "import os\n" * 20
    for expected in (False, True):
        usage = answer_of(keyed, prompt=prompt).json()["usage"]
        assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) == expected
    assert admin.post("/reset_prefix_cache").json()["num_blocks"] > 0
    assert answer_of(keyed, prompt=prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_facts_without_paths(admin: httpx.Client) -> None:
    facts = admin.get("/server_info").json()
    assert facts["num_kv_blocks"] == 1024 and facts["config"]["model"]["max_model_len"] == 512
    assert str(Path.home()) not in str(facts) and "site-packages" not in str(facts)


@pytest.mark.parametrize(("path", "body"), [("/pause", {"mode": "now"}), ("/sleep", {"level": 7}),
                                            ("/sleep", {"depth": 1}), ("/abort", {}), ("/pause", {"mode": 3})])
def test_what_is_wrong_is_named(admin: httpx.Client, path: str, body: dict) -> None:
    answer = admin.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"]
