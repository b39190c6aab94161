"""How much to think and to say: through the variables of the chat template, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.serving.scripted_model import go, write_checkpoint
from tests.serving.server_process import ServerProcess

LOOP = "{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{%- endfor %}{{ '<|assistant|>' }}"
THINK = "{#- </think> -#}"  # tells the reasoning parser
TEMPLATES = {
    "levels": "{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}"
              "{{ 'effort: ' + reasoning_effort }}{{ 'verbosity: ' + verbosity if verbosity }}" + LOOP,
    "switch": LOOP + "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{%- endif %}"
              + THINK,
    "always": LOOP + THINK, "plain": LOOP,
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServerProcess]]:
    opened: dict[str, ServerProcess] = {}
    with ExitStack() as stack:
        for name, template in TEMPLATES.items():
            folder = write_checkpoint(tmp_path_factory.mktemp(name), {"a": "<think>Hm.</think>Yes."}, template)
            parser = "none" if name in ("levels", "plain") else "qwen3"
            opened[name] = stack.enter_context(ServerProcess(
                folder / "log.txt", str(folder), "--served-model-name", "x", "--reasoning-parser", parser))
        yield opened


def prompt_of(server: ServerProcess, **variables: Any) -> int:
    wish = {"chat_template_kwargs": variables} if variables else {}
    answer = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": go("a")}], **wish})
    return answer.json()["count"]


def asked(server: ServerProcess, path: str, body: dict[str, Any]) -> Any:
    """The number of prompt tokens, or the error's text."""
    if path == "/v1/responses":
        body = {"input": go("a"), "max_output_tokens": 2, **body}
    else:
        body = {"messages": [{"role": "user", "content": go("a")}], "max_tokens": 2, **body}
    answer = server.http.post(path, json=body)
    if answer.status_code == 200:
        usage = answer.json()["usage"]
        return usage.get("prompt_tokens") or usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["message"]


def wishes(effort: str) -> dict[str, dict[str, Any]]:
    return {"/v1/chat/completions": {"reasoning_effort": effort}, "/v1/responses": {"reasoning": {"effort": effort}}}


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max"])
def test_each_effort(servers: dict[str, ServerProcess], effort: str) -> None:
    for path, wish in wishes(effort).items():
        assert asked(servers["levels"], path, wish) == prompt_of(servers["levels"], reasoning_effort=effort)
        found = {name: asked(servers[name], path, wish) for name in ("switch", "always", "plain")}
        if effort in ("none", "medium"):
            assert found["switch"] == prompt_of(servers["switch"], enable_thinking=effort != "none")
        else:
            assert "none and medium" in found["switch"]
        if effort == "medium":  # as it does unasked
            assert found["always"] == prompt_of(servers["always"])
        else:
            assert f"'{effort}' is not supported" in found["always"]
        if effort in ("none", "medium"):  # it does not think whatever is said
            assert found["plain"] == prompt_of(servers["plain"])
        else:
            assert "effort" in found["plain"] and "no variable" in found["plain"]


def test_an_effort_is_told_back(servers: dict[str, ServerProcess]) -> None:
    for given, told in (({"effort": "high", "summary": "auto"}, "high"), (None, None), ({"effort": None}, None)):
        body = {"input": "x", "max_output_tokens": 1, "reasoning": given}
        answer = servers["levels"].http.post("/v1/responses", json=body).json()
        assert answer["reasoning"] == {"effort": told, "summary": None}


@pytest.mark.parametrize("verbosity", ["low", "medium", "high"])
def test_verbosity(servers: dict[str, ServerProcess], verbosity: str) -> None:
    for path, wish in (("/v1/chat/completions", {"verbosity": verbosity}),
                       ("/v1/responses", {"text": {"verbosity": verbosity}})):
        assert asked(servers["levels"], path, wish) == prompt_of(servers["levels"], verbosity=verbosity)
        found = asked(servers["plain"], path, wish)
        if verbosity == "medium":
            assert found == prompt_of(servers["plain"])
        else:
            assert "verbosity" in found and "not supported" in found


@pytest.mark.parametrize(("path", "wish", "says"), [
    ("/v1/chat/completions", {"reasoning_effort": "huge"}, "reasoning_effort must be one of"),
    ("/v1/chat/completions", {"verbosity": "huge"}, "verbosity must be one of"),
    ("/v1/chat/completions", {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
     "contradict"),
    ("/v1/responses", {"reasoning": {"effort": "huge"}}, "reasoning.effort must be one of"),
    ("/v1/responses", {"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ("/v1/responses", {"reasoning": {"generate_summary": "concise"}}, "reasoning.generate_summary"),
    ("/v1/responses", {"reasoning": {"context": "all_turns"}}, "reasoning.context"),
    ("/v1/responses", {"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ("/v1/responses", {"reasoning": {"depth": 1}}, "reasoning.depth"),
    ("/v1/responses", {"text": {"verbosity": "huge"}}, "text.verbosity must be one of"),
    ("/v1/responses", {"text": {"tone": "warm"}}, "text.tone"),
    ("/v1/responses", {"top_logprobs": 3}, "top_logprobs needs include"),
    ("/v1/responses", {"include": ["file_search_call.results"]}, "include.0"),
])
def test_refused_by_name(servers: dict[str, ServerProcess], path: str, wish: dict[str, Any], says: str) -> None:
    assert says in asked(servers["levels"], path, wish)


def test_messages_take_hints(servers: dict[str, ServerProcess]) -> None:
    """Clients send them to every model; where the template has a variable for it, it is set."""
    levels, switch = servers["levels"], servers["switch"]
    for effort in ("low", "medium", "high", "xhigh", "max"):
        wish = {"output_config": {"effort": effort}}
        assert asked(levels, "/v1/messages", wish) == prompt_of(levels, reasoning_effort=effort)
        assert asked(switch, "/v1/messages", wish) == prompt_of(switch)
    assert "effort" in asked(levels, "/v1/messages", {"output_config": {"effort": "huge"}})
    for thinking, on in (({"type": "enabled", "budget_tokens": 2048}, True), ({"type": "adaptive"}, True),
                         ({"type": "disabled"}, False)):
        assert asked(switch, "/v1/messages", {"thinking": thinking}) == prompt_of(switch, enable_thinking=on)
        assert asked(servers["plain"], "/v1/messages", {"thinking": thinking}) == prompt_of(servers["plain"])


def test_responses_take_variables(servers: dict[str, ServerProcess]) -> None:
    variables = {"reasoning_effort": "xhigh", "verbosity": "low"}
    found = asked(servers["levels"], "/v1/responses", {"chat_template_kwargs": variables})
    assert found == prompt_of(servers["levels"], **variables) != prompt_of(servers["levels"])
    refused = asked(servers["plain"], "/v1/responses", {"chat_template_kwargs": variables})
    assert "chat_template_kwargs.reasoning_effort" in refused
