"""`read_body`: what is read, where it is checked, and what becomes of a body that is too large or never ends."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

import pydantic
import pytest
from starlette.requests import Request
from starlette.types import Message

from serving.api.body import DISCARD_FACTOR, LARGE_BODY_BYTES, declares_too_much, read_body
from serving.api.errors import ApiError
from serving.api.sse import ClientGone
from serving.api.text_work import TextWork
from serving.api.types import StrictBody
from serving.limits import LimitSettings

LIMITS = dataclasses.replace(LimitSettings(), max_body_bytes=100)
THREADS: list[str] = []


class Note(StrictBody):
    text: str = "none"
    level: int = 0

    @pydantic.field_validator("text")
    @classmethod
    def where(cls, text: str) -> str:
        THREADS.append(threading.current_thread().name)
        return text


class Sender:
    """A client that sends parts, and then leaves or waits."""

    def __init__(self, *parts: bytes, ends: bool = True):
        self.left, self._ends = list(parts), ends

    async def __call__(self) -> Message:
        if not self.left:
            return {"type": "http.disconnect"}
        body = self.left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(self.left) or not self._ends}


async def read(sender: Sender, limits: LimitSettings | None = LIMITS, kind: str = "application/json",
               **options: Any) -> Note:
    scope = {"type": "http", "headers": [(b"content-type", kind.encode())], "xllm.limits": limits,
             "xllm.text_work": TextWork()}
    return await read_body(Request(scope, sender), Note, 8, **options)


async def test_a_short_body_is_read_at_once_and_a_long_one_beside_the_loop() -> None:
    for length, is_beside in ((10, False), (LARGE_BODY_BYTES, True)):
        THREADS.clear()
        body = json.dumps({"text": "x" * length}).encode()
        assert len((await read(Sender(body[:5], body[5:]), None)).text) == length
        assert ([threading.current_thread().name] != THREADS) is is_beside
    with pytest.raises(ApiError) as found:
        await read(Sender(json.dumps({"text": "x" * LARGE_BODY_BYTES, "level": "high"}).encode()), None)
    assert (found.value.status, found.value.param) == (400, "level")


async def test_what_stands_beside_a_body() -> None:
    beside = {"level": 1, "text": "beside"}
    assert await read(Sender(b""), kind="", beside=beside) == Note(level=1, text="beside")
    assert await read(Sender(b'{"level": 2}'), beside=beside) == Note(level=2, text="beside")
    for options, status in (({"beside": beside, "kind": "text/plain"}, 415), ({}, 400)):
        with pytest.raises(ApiError) as found:
            await read(Sender(b"{" if options else b""), **options)
        assert found.value.status == status


@pytest.mark.parametrize(("num_parts", "num_left"), [(3, 0), (40, 40 - 3 - DISCARD_FACTOR * 2)])
async def test_the_rest_of_a_body_that_is_too_large_is_dropped_within_reason(num_parts: int, num_left: int) -> None:
    sender = Sender(*[b"x" * 50] * num_parts)
    with pytest.raises(ApiError) as found:
        await read(sender)
    assert (found.value.status, found.value.headers) == (413, {"Connection": "close"})
    assert len(sender.left) == num_left


async def test_a_client_that_leaves_in_the_middle() -> None:
    with pytest.raises(ClientGone):
        await read(Sender(b'{"level"', ends=False))


@pytest.mark.parametrize(("length", "is_too_much"), [
    (None, False), (b"100", False), (b"101", True), (b"9" * 21, True), (b"many", False)])
def test_what_a_head_says(length: bytes | None, is_too_much: bool) -> None:
    headers = [] if length is None else [(b"content-length", length)]
    assert declares_too_much({"headers": headers}, LIMITS) is is_too_much
