"""An honoured member changes the answer: a real server is asked twice, with the member and without it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.members.bodies import BODIES, RANKED, SAMPLED, SCORED
from tests.members.effects import ABSENT, USER
from tests.serving.server_process import ServerProcess

BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER]}, "/v1/completions": {"prompt": "def f("},
    "/v1/embeddings": {"input": "x"}, "/v1/responses": {"input": [USER]}, "/v1/messages": {"messages": [USER]},
    "/v1/messages/count_tokens": {"messages": [USER]}, "/v1/score": SCORED, "/v1/rerank": RANKED,
    "/v1/sample": SAMPLED, "/tokenize": {}, "/detokenize": {},
}
EFFECTS = {body.path: body.effects for body in BODIES.values()}
OF_THE_CALL = re.compile(r'"(?:id|created|call_id)":(?:"[a-z]+[-_][0-9a-f]{24,}"|\d+)')
CASES = [(path, member) for path, effects in EFFECTS.items() for member in effects]
# Where tools are shown to the model and not forced on it.
NEEDS_TOOLS = {("/tokenize", "tools"), *(("/v1/messages/count_tokens", name) for name in ("tools", "tool_choice"))}


def body_with(body: dict[str, Any], member: str, value: Any) -> dict[str, Any]:
    """The body with the member; of a path with brackets it is the value of the outermost member that is set."""
    outer, *inner = re.split(r"[\[(]", member)[0].split(".")
    if value is ABSENT:
        return body
    return {**body, outer: {inner[0]: value} if inner else value}


@pytest.mark.parametrize(("path", "member"), CASES, ids=[f"{path[1:]}-{member}" for path, member in CASES])
def test_an_honoured_member_changes_the_answer(server: ServerProcess, showing: ServerProcess,
                                               path: str, member: str) -> None:
    base, effect = BASES[path], EFFECTS[path][member]
    asked = showing if (path, member) in NEEDS_TOOLS else server

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
    return re.sub(r'"(?:prompt|input)_tokens_details":\{[^{}]*(?:\{[^{}]*\}[^{}]*)?\}', "", OF_THE_CALL.sub("", text))
