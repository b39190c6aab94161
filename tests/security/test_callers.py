"""Callers of one server: quotas, names, and that nobody forgets who calls."""

from __future__ import annotations

import asyncio
import math

import httpx
import pytest

from serving.security.caller import CALLER, check_signed, num_prompt_tokens, signature
from serving.security.keys import NOBODY, Caller
from serving.security.quotas import Bucket, Quota
from tests.security.wire import ALICE, CAROL, ROOT_KEY, bearer
from tests.serving.server_process import ServerProcess
from xllm.errors import IntegrityError
from xllm.request import Request


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_fills_continuously() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert bucket.wait_s(1) == pytest.approx(1.0)
    clock.now_s = 30.0
    assert bucket.level() == pytest.approx(30.0)
    clock.now_s = 10_000.0
    assert bucket.level() == 60.0, "no more than it holds"
    bucket.take(90)
    assert bucket.wait_s(1) == pytest.approx(31.0), "a debt delays"


def test_requests_per_minute() -> None:
    clock = Clock()
    quota = Quota(requests_per_minute=6, clock=clock)
    assert [quota.enter() for _ in range(6)] == [None] * 6
    assert quota.enter() == ("6 requests per minute", 10)
    clock.now_s = 9.0
    assert quota.enter() == ("6 requests per minute", 1)
    clock.now_s = 10.0
    assert quota.enter() is None


def test_tokens_per_minute_are_paid_when_they_are_known() -> None:
    clock = Clock()
    quota = Quota(requests_per_minute=100, tokens_per_minute=600, clock=clock)
    assert quota.enter() is None
    quota.charge_tokens(1200)  # one call may overdraw, as far as a call can go
    what, wait_s = quota.enter() or ("", 0)
    assert (what, wait_s) == ("600 tokens per minute", math.ceil(60.1))
    clock.now_s = 60.0
    assert quota.enter() is not None
    clock.now_s = 60.2
    assert quota.enter() is None
    assert Quota().enter() is None


async def test_the_caller_reaches_threads_and_tasks_of_its_call_only() -> None:
    async def one(name: str) -> list[str]:
        CALLER.set(Caller(name))
        await asyncio.sleep(0)
        return [CALLER.get().name, await asyncio.to_thread(lambda: CALLER.get().name),
                await asyncio.create_task(_name())]

    found = await asyncio.gather(*(asyncio.create_task(one(name)) for name in "abc"))
    assert found == [["a"] * 3, ["b"] * 3, ["c"] * 3]
    assert CALLER.get() is NOBODY


async def _name() -> str:
    return CALLER.get().name


def test_salts_tell_callers_and_their_users_apart() -> None:
    wishes = [None, "", "a", "b", "-", "+", "1:a:-"]
    salts = [Caller(name).cache_salt(wish) for name in ("a", "b", "ab", "1", "1:a") for wish in wishes]
    assert len(set(salts)) == len(salts)
    assert NOBODY.cache_salt(None) == ""
    assert Caller("a").cache_salt(None) == Caller("a", weight=3.0).cache_salt(None), "it outlives a restart"


def test_signed_requests() -> None:
    prompt, other, caller = [1, 2, 3], [1, 2, 3], Caller("a", weight=2.0)
    given = [(prompt, ""), (prompt, "s"), (other, "")]
    plain, signed = ([Request(request_id=str(i), prompt_token_ids=ids, **signature(whose, 0, salt))
                      for i, (ids, salt) in enumerate(given)] for whose in (NOBODY, caller))
    assert [(request.tenant, request.cache_salt) for request in plain] == [("", salt) for _, salt in given]
    assert [(request.tenant, request.tenant_weight) for request in signed] == [("a", 2.0)] * 3
    assert len({request.cache_salt for request in signed}) == 2
    assert num_prompt_tokens(signed) == 6, "two choices of one prompt pay for it once"
    check_signed(plain, NOBODY)
    check_signed(signed, caller)
    for requests, other_caller in ((plain, caller), (signed, NOBODY), ([*signed, plain[0]], caller)):
        with pytest.raises(IntegrityError):
            check_signed(requests, other_caller)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_nobody_goes_before_others_unasked(keyed: ServerProcess, path: str) -> None:
    """A negative priority would overtake, and in an overload displace, what other callers have sent."""
    body = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    for key, priority, status in ((ALICE, -1, 400), (ALICE, 0, 200), (ALICE, 5, 200), (ROOT_KEY, -1, 200)):
        answer = httpx.post(f"{keyed.url}{path}", json={**body, "max_tokens": 1, "priority": priority},
                            headers=bearer(key), timeout=30)
        assert answer.status_code == status, answer.text
        if status == 400:
            assert answer.json()["error"]["param"] == "priority"


def test_a_quota_on_a_real_server(keyed: ServerProcess) -> None:
    """Three calls a minute: reading does not count, the fourth is refused before its body is looked at, and nobody else
    is."""
    with httpx.Client(base_url=keyed.url, headers=bearer(CAROL), timeout=30) as carol:
        for _ in range(10):
            assert carol.get("/v1/models").status_code == 200
        ok = [carol.post("/v1/completions", json={"prompt": "hi", "max_tokens": 1}).status_code for _ in range(3)]
        assert ok == [200] * 3
        refused = carol.post("/v1/completions", content=b"{not json", headers={"Content-Type": "application/json"})
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "3 requests per minute" in refused.json()["error"]["message"]
        assert carol.get("/health").status_code == 200
    assert httpx.post(f"{keyed.url}/v1/completions", json={"prompt": "hi", "max_tokens": 1},
                      headers=bearer(ALICE)).status_code == 200


def test_tokens_on_a_real_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prompt and output are paid, streamed or not; what a call overdraws delays the next."""
    folder = tmp_path_factory.mktemp("quota")
    (folder / "keys").write_text("dave dave-key tokens_per_minute=100\nerin erin-key tokens_per_minute=100\n")
    with ServerProcess(folder / "log.txt", "--api-key-file", str(folder / "keys"), key="dave-key") as server:
        body = {"prompt": [5] * 90, "max_tokens": 60, "ignore_eos": True}
        assert server.http.post("/v1/completions", json=body).status_code == 200
        refused = server.http.post("/v1/completions", json=body)
        assert refused.status_code == 429
        assert 20 <= int(refused.headers["retry-after"]) <= 31, "50 tokens of debt at 100 a minute"
        erin = bearer("erin-key")
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, headers=erin,
                          timeout=30) as answer:
            assert answer.status_code == 200
            assert answer.read().endswith(b"[DONE]\n\n")
        again = httpx.post(f"{server.url}/v1/completions", json=body, headers=erin)
        assert again.status_code == 429
        assert 20 <= int(again.headers["retry-after"]) <= 31
