"""An honoured member changes the answer: a real server is asked twice, with the member and without it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.members.effects import (
    ABSENT,
    CHAT,
    COMPLETIONS,
    COUNT_TOKENS,
    EMBEDDINGS,
    MESSAGES,
    RESPONSES,
    USER,
    Effect,
)
from tests.serving.conftest import server  # noqa: F401
from tests.serving.server_process import ServerProcess

BODIES: dict[str, tuple[dict[str, Any], dict[str, Effect]]] = {
    "/v1/chat/completions": ({"messages": [USER]}, CHAT),
    "/v1/completions": ({"prompt": "def f("}, COMPLETIONS),
    "/v1/embeddings": ({"input": "x"}, EMBEDDINGS),
    "/v1/responses": ({"input": [USER]}, RESPONSES),
    "/v1/messages": ({"messages": [USER]}, MESSAGES),
    "/v1/messages/count_tokens": ({"messages": [USER]}, COUNT_TOKENS),
}
OF_THE_CALL = re.compile(r'"(?:id|created|call_id)":(?:"(?:chatcmpl-|cmpl-|embd-|call_|msg_|fc_|rs_)[0-9a-f]+"|\d+)')
CASES = [(path, member) for path, (_, effects) in BODIES.items() for member in effects]


def body_with(body: dict[str, Any], member: str, value: Any) -> dict[str, Any]:
    """The body with the member; of a path with brackets it is the value of the outermost member that is set."""
    outer, *inner = re.split(r"[\[(]", member)[0].split(".")
    if value is ABSENT:
        return body
    return {**body, outer: {inner[0]: value} if inner else value}


@pytest.mark.parametrize(("path", "member"), CASES, ids=[f"{path[4:]}-{member}" for path, member in CASES])
def test_an_honoured_member_changes_the_answer(server: ServerProcess, showing: ServerProcess,  # noqa: F811
                                               path: str, member: str) -> None:
    base, effects = BODIES[path]
    effect = effects[member]
    asked = showing if path.endswith("count_tokens") else server  # whose template shows what is counted

    def answer_to(value: Any) -> str:
        answer = asked.http.post(path, json=body_with({**base, **effect.beside}, member, value))
        assert answer.status_code == 200, answer.text
        return own_part(answer.text)

    found = answer_to(effect.on)
    assert found != answer_to(effect.off)
    if "stream" in member or effect.beside.get("stream"):  # what comes in one piece is a matter of time
        return
    assert answer_to(effect.on) == found, "else it proves nothing"


def own_part(text: str) -> str:
    """What of an answer is due to the model: no ids and times, no echo of the request, nothing of what was cached."""
    if text.startswith("{"):
        answer = json.loads(text)
        if answer.get("object") == "response":
            answer = {name: answer[name] for name in ("status", "output", "usage")}
        if answer.get("type") == "message":
            answer["usage"]["input_tokens"] += answer["usage"].pop("cache_read_input_tokens")
        text = json.dumps(answer, separators=(",", ":"))
    return re.sub(r'"(?:prompt|input)_tokens_details":\{[^{}]*(?:\{[^{}]*\})?\}', "", OF_THE_CALL.sub("", text))
