"""An honoured member changes the answer: a real server is asked twice, with the member and without it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.members.effects import ABSENT, CHAT, COMPLETIONS, EMBEDDINGS, USER, Effect
from tests.serving.conftest import server  # noqa: F401
from tests.serving.server_process import ServerProcess

BODIES: dict[str, tuple[dict[str, Any], dict[str, Effect]]] = {
    "/v1/chat/completions": ({"messages": [USER]}, CHAT),
    "/v1/completions": ({"prompt": "def f("}, COMPLETIONS),
    "/v1/embeddings": ({"input": "x"}, EMBEDDINGS),
}
OF_THE_CALL = re.compile(r'"(?:id|created)":(?:"(?:chatcmpl-|cmpl-|embd-|call_)[0-9a-f]+"|\d+)')
CASES = [(path, member) for path, (_, effects) in BODIES.items() for member in effects]


def body_with(body: dict[str, Any], member: str, value: Any) -> dict[str, Any]:
    """The body with the member; of a path with brackets it is the value of the outermost member that is set."""
    outer, *inner = re.split(r"[\[(]", member)[0].split(".")
    if value is ABSENT:
        return body
    return {**body, outer: {inner[0]: value} if inner else value}


@pytest.mark.parametrize(("path", "member"), CASES, ids=[f"{path[4:]}-{member}" for path, member in CASES])
def test_an_honoured_member_changes_the_answer(server: ServerProcess, path: str, member: str) -> None:  # noqa: F811
    base, effects = BODIES[path]
    effect = effects[member]
    answers = []
    for value in (effect.on, effect.off):
        answer = server.http.post(path, json=body_with({**base, **effect.beside}, member, value))
        assert answer.status_code == 200, answer.text
        answers.append(OF_THE_CALL.sub("", answer.text))
    assert without_caching(answers[0]) != without_caching(answers[1])
    if "stream" in member or effect.beside.get("stream"):  # what comes in one piece is a matter of time
        return
    again = server.http.post(path, json=body_with({**base, **effect.beside}, member, effect.on))
    assert without_caching(OF_THE_CALL.sub("", again.text)) == without_caching(answers[0]), "else it proves nothing"


def without_caching(text: str) -> str:
    """How much of the prompt was cached is no effect of a member."""
    return re.sub(r'"prompt_tokens_details":\{[^{}]*(?:\{[^{}]*\})?\}', "", text)
