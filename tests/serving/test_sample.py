"""`/v1/sample` says what `echo` with logprobs says at the same places."""

from __future__ import annotations

import pytest

from tests.serving.server_process import ServerProcess

PROMPT = "def add(a, b):\n    [MASK] a + b\n\ndef sub(a, b):\n    [MASK] a - b\n"


def test_every_match_is_scored(server: ServerProcess) -> None:
    answer = server.http.post("/v1/sample", json={"prompt": PROMPT, "selector": {"type": "literal", "value": "[MASK]"},
                                                  "logprobs": 3}).json()
    echoed = server.http.post("/v1/completions", json={
        "prompt": PROMPT, "max_tokens": 1, "echo": True, "logprobs": 3, "temperature": 0}).json()
    logprobs = echoed["choices"][0]["logprobs"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["selector_match"] * 2
    for choice, start in zip(answer["choices"], (PROMPT.index("[MASK]"), PROMPT.rindex("[MASK]"))):
        place = choice["token_index"]
        assert logprobs["text_offset"][place] <= start < logprobs["text_offset"][place + 1]
        found = {item["token"]: item["logprob"] for item in choice["logprobs"]["content"][0]["top_logprobs"]}
        assert len(found) == 3
        for token, logprob in found.items():
            assert logprobs["top_logprobs"][place][token] == pytest.approx(logprob, abs=1e-3)
        assert choice["text"] == max(found, key=found.__getitem__)
    assert answer["usage"]["completion_tokens"] == 0


def test_a_match_at_the_very_beginning_has_no_distribution(server: ServerProcess) -> None:
    answer = server.http.post("/v1/sample", json={"prompt": "import os", "add_special_tokens": False,
                                                  "selector": {"value": "import"}}).json()
    assert answer["choices"][0]["finish_reason"] == "empty_logprobs" and answer["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(("change", "field"), [
    ({"selector": {"value": "absent"}}, "selector"), ({"selector": {"value": ""}}, "selector"),
    ({"selector": {"type": "regex", "value": "x"}}, "selector"), ({"logprobs": 0}, "logprobs"),
    ({"logprobs": 6}, "logprobs"), ({"prompt": "[MASK]" * 2000}, "selector"), ({"temperature": 1}, "temperature"),
    ({"prompt": ""}, "selector"), ({"pooling": "mean"}, "pooling"), ({"normalize": True}, "normalize"),
    ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
])
def test_what_is_wrong_is_named(server: ServerProcess, change: dict, field: str) -> None:
    answer = server.http.post("/v1/sample", json={"prompt": PROMPT, "selector": {"value": "[MASK]"}} | change)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field
