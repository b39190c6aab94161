"""Nothing that a conversation holds is dropped in silence: it reaches the prompt, perhaps in another way, or is refused
by its path."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.parsers import templates
from xllm.chat_template import ChatTemplate, template_variables
from xllm.errors import ModelError, RequestError

END = "{% if add_generation_prompt %}<assistant>{% endif %}"
LOOP = "{% for m in messages %}{% if m.role in [ROLES] %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}" + END
KNOWN = LOOP.replace("ROLES", "'system', 'user', 'assistant', 'tool'")
NO_SYSTEM = LOOP.replace("ROLES", "'user', 'assistant'")
FIRST_ONLY = ("{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% endif %}"
              + LOOP.replace("ROLES", "'user', 'assistant'"))
FIRST_OR_ERROR = ("{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
                  "{{ raise_exception('system comes first') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
                  + END)
DEVELOPERS = LOOP.replace("ROLES", "'developer', 'user'")
CALLS = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
         "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}" + END)
FIRST_PART = ("{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
              "{% for p in m.content %}{% if loop.first %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}")
NAMES = "{% for m in messages %}<{{ m.role }}{{ ' ' + m.name if m.name }}>{{ m.content }}{% endfor %}" + END
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def chat(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


def render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate(source, {}).render(messages, **options)


@pytest.mark.parametrize(("source", "shown"), [
    (KNOWN, "<system>Be brief.<user>Hi<assistant>"), (DEVELOPERS, "<developer>Be brief.<user>Hi<assistant>"),
    (FIRST_ONLY, "<system>Be brief.<user>Hi<assistant>"), (FIRST_OR_ERROR, "<system>Be brief.<user>Hi<assistant>"),
], ids=["mapped", "known", "first-only", "first-or-error"])
def test_a_developer_is_heard(source: str, shown: str) -> None:
    assert render(source, chat(("developer", "Be brief."), ("user", "Hi"))) == shown


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("source", [FIRST_ONLY, FIRST_OR_ERROR], ids=["drops", "raises"])
def test_later_instructions_move_to_the_front(source: str, role: str) -> None:
    """For templates that take them nowhere else; the others get them where they are."""
    messages = chat(("system", "One."), ("user", "Hi"), (role, [{"type": "text", "text": "Two."}]), ("user", "Go"))
    assert render(source, messages) == "<system>One.\n\nTwo.<user>Hi<user>Go<assistant>"
    assert render(KNOWN, messages) == "<system>One.<user>Hi<system>Two.<user>Go<assistant>"


@pytest.mark.parametrize(("source", "messages", "options", "says"), [
    (KNOWN, chat(("user", "Hi"), ("moderator", "x")), {}, r"messages\.1\.role: .*'moderator'"),
    (KNOWN, chat(("moderator", "")), {}, r"messages\.0\.role: .*'moderator'"),
    (NO_SYSTEM, chat(("system", "x"), ("user", "Hi")), {}, r"messages\.0\.role: .*'system'"),
    (NO_SYSTEM, chat(("user", "Hi"), ("tool", "x")), {}, r"messages\.1\.role: .*'tool'"),
    (KNOWN, [*chat(("user", "Hi")), {"role": "assistant", "content": "x", "tool_calls": [CALL]}], {},
     r"messages\.1\.tool_calls"),
    (KNOWN, chat(("user", "Hi")), {"tools": TOOLS}, "tools: .*does not show tools"),
    (KNOWN, [{"role": "user", "content": "Hi", "name": "Ann"}], {}, r"messages\.0\.name"),
    (KNOWN, [{"role": "user", "content": "Hi", "mood": "good"}], {}, r"messages\.0\.mood"),
    (KNOWN, chat(("user", "Hi")), {"mood": "good"}, r"chat_template_kwargs\.mood"),
    (FIRST_PART, chat(("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])), {},
     r"messages\.0\.content\.1"),
    (KNOWN, chat(("user", [{"type": "image"}])), {}, r"messages\.0\.content\.0"),
])
def test_what_is_dropped_is_named(source: str, messages: list[dict[str, Any]], options: dict[str, Any],
                                  says: str) -> None:
    template = ChatTemplate(source, {})
    for _ in range(2):  # a refusal is no proof
        with pytest.raises(RequestError, match=says):
            template.render(messages, **options)


def test_a_proof_holds_for_its_shape_only() -> None:
    template = ChatTemplate(FIRST_ONLY, {})
    assert template.render(chat(("system", "One."), ("user", "Hi"))) == "<system>One.<user>Hi<assistant>"
    assert template.render(chat(("system", "Two."), ("user", "Yo"))) == "<system>Two.<user>Yo<assistant>"
    with pytest.raises(RequestError, match=r"messages\.1\.role"):
        template.render(chat(("system", "One."), ("tool", "Hi")))
    assert "Late." in template.render(chat(("user", "Hi"), ("system", "Late.")))


def test_words_that_stand_elsewhere_too_are_no_proof() -> None:
    with pytest.raises(RequestError, match=r"messages\.0\.role"):
        render(KNOWN, chat(("moderator", "user"), ("user", "user")))


def test_names_and_calls_that_are_shown() -> None:
    assert render(NAMES, [{"role": "user", "content": "Hi", "name": "Ann"}]) == "<user Ann>Hi<assistant>"
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    messages = [*chat(("user", "Hi")), calls, *chat(("tool", "5"))]
    assert render(CALLS, messages) == "<user>Hi<assistant>weather{}<tool>5<assistant>"
    assert render(KNOWN, chat(("user", "Hi")), tools=TOOLS, needs_tools=False) == "<user>Hi<assistant>"
    empty = {"role": "assistant", "content": "x", "annotations": [], "refusal": None, "audio": None}
    assert render(KNOWN, [*chat(("user", "Hi")), empty]) == "<user>Hi<assistant>x<assistant>"


def test_a_template_that_reads_words_is_held_to_them() -> None:
    """It cannot render marks, which its table does not hold. The words are looked for in its own text."""
    source = ("{% for m in messages %}{% if m.role == 'user' %}{{ {'one': 1}[m.content] + 1 }}{{ m.content }}"
              "{% endif %}{% endfor %}")
    assert render(source, chat(("user", "one"))) == "2one"
    with pytest.raises(RequestError, match=r"messages\.1\.role"):
        render(source, chat(("user", "one"), ("tool", "x")))


@pytest.mark.parametrize("family", templates.ALL)
def test_real_templates_show_instructions_or_refuse(family: str) -> None:
    template = templates.ALL[family][0]
    shown = 0
    for role in ("system", "developer", "moderator"):
        for messages in (chat((role, "Marked."), ("user", "Hi")), chat(("user", "Hi"), ("assistant", "x"),
                                                                       (role, "Marked."), ("user", "Hi"))):
            try:
                assert "Marked." in render(template, messages), (role, messages)
                shown += 1
            except RequestError:
                pass
    assert shown >= (0 if family == "mistral" else 4), "system and developer are heard, but by one that knows neither"


def test_variables_that_templates_read() -> None:
    source = ("{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
              "{{ reasoning_effort }}{% if enable_thinking is defined and not enable_thinking %}x{% endif %}")
    assert template_variables((source, "{{ other }}")) == {"reasoning_effort", "enable_thinking", "other"}
    with pytest.raises(ModelError):
        template_variables(("{% if %}",))
