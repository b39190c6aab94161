"""Too much work: who can wait is refused first, who waits gives way to whoever cannot; every call gets its answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.waiting import LOW, OFFLINE, ONLINE, WaitingTokens, rank_of
from tests.serving.server_process import ServerProcess, wait_for
from xllm.client.engine_client import EngineBusyError
from xllm.request import Request

# Seconds of work: the gauges are asked for meanwhile.
BLOCKER = {"prompt": [1, 2], "max_tokens": 2000, "ignore_eos": True}
PROMPT = list(range(3, 33))  # 30 tokens
CLASSES = {ONLINE: {}, LOW: {"priority": 1}, OFFLINE: {"offline": True}}


def request(name: str, num_tokens: int, kind: int = ONLINE, priority: int = 0) -> Request:
    return Request(request_id=name, prompt_token_ids=[1] * num_tokens, offline=kind == OFFLINE,
                   priority=priority or int(kind == LOW))


def test_watermarks_refuse_what_can_wait() -> None:
    waiting = WaitingTokens(100, low_share=0.8, offline_share=0.5)
    waiting.enter([request("a", 45)])
    with pytest.raises(EngineBusyError, match="over the 50 for offline"):
        waiting.enter([request("b", 6, OFFLINE)])
    waiting.enter([request("c", 5, OFFLINE)])
    waiting.enter([request("d", 30, LOW)])
    with pytest.raises(EngineBusyError, match="over the 80 for low priority"):
        waiting.enter([request("e", 1, LOW)])
    waiting.enter([request("f", 20)])
    assert waiting.num_tokens == 100 and waiting.num_refused == [0, 1, 1]


def test_the_worst_and_latest_make_room() -> None:
    gone: list[str] = []
    waiting = WaitingTokens(100, shed=gone.extend)
    for name, size, kind, priority in (("o1", 10, OFFLINE, 0), ("l5", 10, LOW, 5), ("o2", 10, OFFLINE, 0),
                                       ("l1", 10, LOW, 1), ("n", 60, ONLINE, 0)):
        waiting.enter([request(name, size, kind, priority)])
    waiting.enter([request("x", 25)])
    assert gone == ["o2", "o1", "l5"] and waiting.num_shed == [0, 1, 2]
    with pytest.raises(EngineBusyError):
        waiting.enter([request("y", 30)])
    assert gone == ["o2", "o1", "l5"], "nobody goes for a request that still would not fit"
    with pytest.raises(EngineBusyError):
        waiting.enter([request("z", 10, LOW, 1)])


@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from((ONLINE, LOW, OFFLINE)), st.booleans()), max_size=60))
def test_the_queue_never_holds_more_than_its_limit(steps: list[tuple[int, int, bool]]) -> None:
    open_ids: dict[str, Request] = {}

    def shed(names: list[str]) -> None:
        for name in names:
            del open_ids[name]

    waiting = WaitingTokens(100, low_share=0.8, offline_share=0.5, shed=shed)
    for index, (size, kind, leaves) in enumerate(steps):
        made = request(str(index), size, kind)
        before = dict(open_ids)
        try:
            waiting.enter([made])
            open_ids[made.request_id] = made
        except EngineBusyError:
            assert open_ids == before
        for name in before.keys() - open_ids.keys():
            assert rank_of(before[name]) > rank_of(made)
        if leaves and open_ids:
            waiting.leave(next(iter(open_ids)))
            del open_ids[next(iter(open_ids))]
        assert waiting.num_tokens == sum(len(r.prompt_token_ids) for r in open_ids.values()) <= 100


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("overload") / "log.txt"
    flags = ("--max-model-len", "2048", "--max-num-seqs", "1", "--max-queue-tokens", "100",
             "--no-online-preempts-offline")
    with ServerProcess(log, *flags) as server:
        yield server
        server.wait_idle()


class Call(threading.Thread):
    """One completion, in a thread of its own."""

    def __init__(self, server: ServerProcess, **body: object):
        super().__init__()
        self._server, self._body = server, body
        self.response: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.response = self._server.http.post("/v1/completions", json=self._body)

    def answer(self) -> httpx.Response:
        self.join(60)
        assert self.response is not None
        return self.response


def busy(server: ServerProcess, **changes: object) -> Call:
    blocker = Call(server, **{**BLOCKER, **changes})
    wait_for(lambda: server.gauge("xllm:num_requests_running") == 1, what="a busy engine")
    return blocker


def waits(server: ServerProcess, number: int) -> None:
    wait_for(lambda: server.gauge("xllm:num_requests_waiting") == number, what=f"{number} waiting")


def test_the_ladder_on_a_server(narrow: ServerProcess) -> None:
    blocker = busy(narrow)
    body = {"prompt": PROMPT, "max_tokens": 2}
    offline = Call(narrow, **body, offline=True)  # 30 of 50
    waits(narrow, 1)
    refused = narrow.http.post("/v1/completions", json={**body, "offline": True})
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
    low = Call(narrow, **body, priority=3)  # 60 of 80
    waits(narrow, 2)
    assert narrow.http.post("/v1/completions", json={**body, "priority": 1}).status_code == 503
    online = [Call(narrow, **body)]  # 90 of 100
    waits(narrow, 3)
    online.append(Call(narrow, **body))  # takes the place of the offline one
    assert offline.answer().status_code == 503 and "gave its place" in offline.answer().text
    online.append(Call(narrow, **body))  # of the low one
    assert low.answer().status_code == 503 and "gave its place" in low.answer().text
    waits(narrow, 3)
    assert narrow.http.post("/v1/completions", json=body).status_code == 503
    for call in (blocker, *online):
        assert call.answer().status_code == 200


def test_a_call_that_takes_too_long_fails_and_frees_its_place(narrow: ServerProcess) -> None:
    started_s = time.monotonic()
    late = narrow.http.post("/v1/completions", json={**BLOCKER, "timeout_s": 0.05})
    assert late.status_code == 504 and late.json()["error"]["type"] == "timeout_error"
    assert time.monotonic() - started_s < 10
    blocker = busy(narrow, max_tokens=600)
    waiting = narrow.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "timeout_s": 0.05})
    assert waiting.status_code == 504
    assert blocker.answer().status_code == 200
    with narrow.http.stream("POST", "/v1/completions", json={**BLOCKER, "stream": True, "timeout_s": 0.2}) as stream:
        text = stream.read().decode()
    assert text.count('"error"') == 1 and text.endswith("data: [DONE]\n\n")
    narrow.wait_idle()
    for wrong in (0, -1):
        answer = narrow.http.post("/v1/completions", json={"prompt": "x", "timeout_s": wrong})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "timeout_s"
