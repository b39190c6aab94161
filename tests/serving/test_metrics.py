"""`/metrics` of a real server: what was turned away, drafts by position, adapters, sleep; under vLLM's names too."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.adapters import write_adapter
from tests.serving.server_process import ServerProcess, wait_for

ADMIN, ALICE, BOB = "an-admin-key-of-some-length", "alice-has-a-key-of-some-length", "bob-has-a-key-of-some-length"
NUM_DRAFTS = 3
BODY = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
Series = dict[tuple[str, ...], float]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "keys").write_text(f"alice {ALICE} weight=2 metrics\nbob {BOB} requests_per_minute=2\n"
                                 f"ops {ADMIN} admin\n")
    write_adapter(folder / "first", 0)
    with ServerProcess(folder / "log.txt", "--api-key-file", str(folder / "keys"), "--max-queue-tokens", "100",
                       "--speculative-method", "ngram", "--num-speculative-tokens", str(NUM_DRAFTS), "--max-num-seqs",
                       "1", "--lora-modules", f"first={folder / 'first'}", "--max-loras", "3", key=ALICE) as running:
        yield running


@pytest.fixture(scope="module")
def admin(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {ADMIN}"}) as client:
        yield client


def series(server: ServerProcess, name: str, *labels: str) -> Series:
    """Label values -> value, of one name; the same under both prefixes."""
    text = server.http.get("/metrics").text
    found = [{tuple(sample.labels[label] for label in labels): sample.value
              for family in text_string_to_metric_families(text) for sample in family.samples
              if sample.name == f"{prefix}:{name}"} for prefix in ("xllm", "vllm")]
    assert found[0] and found[0].keys() == found[1].keys()
    return found[0]


def refusals(server: ServerProcess) -> Series:
    return series(server, "admission_rejections_total", "reason", "key_class")


def complete(server: ServerProcess, num_tokens: int = 5, key: str = ALICE, **extra: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json={**BODY, "prompt": [5] * num_tokens, **extra}, timeout=60,
                      headers={"Authorization": f"Bearer {key}"})


def in_background(server: ServerProcess, *args: int, **extra: object) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(complete(server, *args, **extra)))
    thread.start()
    return thread, answers


def grown(server: ServerProcess, before: Series) -> Series:
    return {key: value - before[key] for key, value in refusals(server).items() if value != before[key]}


def test_every_reason_is_there_before_it_happens(server: ServerProcess) -> None:
    assert refusals(server).keys() == {(reason, kind) for reason in ("quota", "queue_full", "overload", "unavailable")
                                       for kind in ("user", "admin")}


def test_a_quota_that_is_used_up(server: ServerProcess) -> None:
    before = refusals(server)
    assert [complete(server, key=BOB).status_code for _ in range(4)] == [200, 200, 429, 429]
    assert grown(server, before) == {("quota", "user"): 2}


def test_a_queue_that_is_full(server: ServerProcess) -> None:
    before = refusals(server)
    assert complete(server, 101).status_code == complete(server, 101, key=ADMIN, n=2).status_code == 503
    assert grown(server, before) == {("queue_full", "user"): 1, ("queue_full", "admin"): 1}, "calls, not sequences"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_had_to_make_room(server: ServerProcess, admin: httpx.Client, stream: bool) -> None:
    before = refusals(server)
    admin.post("/pause")
    try:
        thread, answers = in_background(server, 70, priority=5, stream=stream)
        wait_for(lambda: server.gauge("xllm:queue_tokens") == 70)
        other, others = in_background(server, 90)
        thread.join(30)
    finally:
        admin.post("/resume")
    other.join(30)
    assert "overloaded" in answers[0].text and others[0].status_code == 200
    assert grown(server, before) == {("overload", "user"): 1}


def test_sleep(server: ServerProcess, admin: httpx.Client) -> None:
    """vLLM's names of the states; what is asked of a sleeping engine is turned away."""
    before = refusals(server)
    for level, name in ((1, "weights_offloaded"), (2, "discard_all"), (0, "awake")):
        admin.post("/sleep", json={"level": level}) if level else admin.post("/wakeup")
        states = series(server, "engine_sleep_state", "sleep_state")
        assert states == {(state,): float(state == name) for state in ("awake", "weights_offloaded", "discard_all")}
        assert complete(server).status_code == (503 if level else 200)
        if level:
            admin.post("/wakeup")
    assert grown(server, before) == {("unavailable", "user"): 2}


def test_no_key_and_no_name_is_shown(server: ServerProcess) -> None:
    text = server.http.get("/metrics").text
    assert not [word for word in (ADMIN, ALICE, BOB, "alice", "bob", "ops") if word in text]


def test_accepted_drafts_by_position(server: ServerProcess) -> None:
    def totals() -> tuple[list[float], float, float]:
        positions = series(server, "spec_decode_num_accepted_tokens_per_pos_total", "position")
        assert list(positions) == [(str(place),) for place in range(NUM_DRAFTS)]
        return (list(positions.values()), server.gauge("xllm:spec_decode_num_accepted_tokens_total"),
                server.gauge("xllm:spec_decode_num_drafts_total"))

    before = totals()
    assert complete(server, prompt="for i in range(10):\n    print(i)\n" * 5, max_tokens=60).status_code == 200
    server.wait_idle()
    wait_for(lambda: totals()[1] > before[1], what="an accepted draft")
    by_position, accepted, drafts = totals()
    assert sum(by_position) == accepted
    assert by_position == sorted(by_position, reverse=True) and by_position[0] <= drafts, "the first ones first"


def test_threads_that_compute(server: ServerProcess) -> None:
    ((now,), (most,)) = (series(server, name).values() for name in ("cpu_threads", "cpu_threads_max"))
    assert 1 <= now <= most
    assert server.gauge("xllm:cpu_threads_lowered_total") >= 0


def test_adapters_of_open_requests(server: ServerProcess, admin: httpx.Client) -> None:
    """vLLM's form: names in labels, the value is the time."""
    labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")

    def info() -> tuple[str, ...]:
        (found, time_s), = series(server, "lora_requests_info", *labels).items()
        assert abs(time_s - time.time()) < 60
        return found

    assert info() == ("3", "", "")
    thread, answers = in_background(server, model="first", max_tokens=200, n=8)
    wait_for(lambda: info() == ("3", "first", "first"), what="one that runs and others that wait")
    thread.join(60)
    assert answers[0].status_code == 200 and info() == ("3", "", "")
