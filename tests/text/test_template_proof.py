"""Nothing that a conversation holds is dropped in silence: it reaches the prompt, perhaps in another way, or is refused
by its path."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serving.parsers import templates
from xllm.errors import ModelError, RequestError
from xllm.text.chat_template import ChatTemplate, template_variables

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
    (NO_SYSTEM, chat(("system", "x")), {}, r"messages\.0\.role: .*'system'"),
    (NO_SYSTEM, chat(("user", "Hi"), ("tool", "x")), {}, r"messages\.1\.role: .*'tool'"),
    (KNOWN, [*chat(("user", "Hi")), {"role": "assistant", "content": "x", "tool_calls": [CALL]}], {},
     r"messages\.1\.tool_calls"),
    (KNOWN, chat(("user", "Hi")), {"tools": TOOLS}, "tools: .*does not show tools"),
    (KNOWN, [{"role": "user", "content": "Hi", "mood": "good"}], {}, r"messages\.0\.mood"),
    (KNOWN, chat(("user", "Hi")), {"mood": "good"}, r"chat_template_kwargs\.mood"),
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
    assert shown >= (2 if family == "mistral" else 4), "system and developer are heard; Mistral's wants an eos_token"


def test_variables_that_templates_read() -> None:
    source = ("{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
              "{{ reasoning_effort }}{% if enable_thinking is defined and not enable_thinking %}x{% endif %}")
    assert template_variables((source, "{{ other }}")) == {"reasoning_effort", "enable_thinking", "other"}
    with pytest.raises(ModelError):
        template_variables(("{% if %}",))


# The gist of real templates that want a conversation in clothes of their own.
LAST_USER = ("{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
             "{% set chat = messages[1:] %}{% else %}{% set chat = messages %}{% endif %}"
             "{% for m in chat %}{% if m.role == 'user' %}{% if loop.last and system is defined %}"
             "[INST] {{ system }}\n\n{{ m.content }}[/INST]{% else %}[INST] {{ m.content }}[/INST]{% endif %}"
             "{% elif m.tool_calls %}[TOOL_CALLS] {% for c in m.tool_calls %}{{ c.function.name }}"
             "{{ c.function.arguments | tojson }}{% endfor %}{% elif m.role == 'tool' %}[RESULT] {{ m.content }}"
             "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
NULL_CALLS = ("{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}"
              "{% elif m.role == 'assistant' and m['content'] is none %}<A>{% for c in m.tool_calls %}"
              "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
              "{% elif m.role == 'assistant' %}<A>{{ m.content }}{% elif m.role == 'tool' %}<T>{{ m.content }}"
              "{% elif m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}")
FIRST_SYSTEM_PART = ("{% if messages[0].role == 'system' %}{% if messages[0].content is string %}"
                     "{% set prefix = messages[0].content %}{% else %}{% set prefix = messages[0].content[0].text %}"
                     "{% endif %}{% set chat = messages[1:] %}{% else %}{% set prefix = '' %}{% set chat = messages %}"
                     "{% endif %}{% for m in chat %}<{{ m.role }}>{% if loop.first %}{{ prefix }}{% endif %}"
                     "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}"
                     "{% endfor %}{% endif %}{% endfor %}")
REFUSES_SYSTEM = ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
                  "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
LOUD = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"


def called(content: str | None = "") -> list[dict[str, Any]]:
    return [*chat(("system", "Be brief."), ("user", "Hi")),
            {"role": "assistant", "content": content, "tool_calls": [CALL]}, *chat(("tool", "5"))]


@pytest.mark.parametrize("content", ["", None])
def test_calls_beside_a_null_content(content: str | None) -> None:
    assert render(NULL_CALLS, called(content)) == 'Be brief.<U>Hi<A>weather{}<T>5'


def test_instructions_that_are_shown_only_while_the_user_speaks() -> None:
    assert "[INST] Be brief.\n\nHi[/INST]" in render(LAST_USER, called()[:2])
    for messages in (called(), [*called(), *chat(("assistant", "Five."), ("user", "And?"))]):
        assert "Be brief." in render(LAST_USER, messages)
    assert "[INST] Be brief.\n\nHi[/INST]" in render(LAST_USER, called())
    going_on = [*called()[:2], *chat(("assistant", "Well"))]
    text = render(LAST_USER, going_on, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("Well") and "Be brief." in text


def test_several_parts_where_one_is_read() -> None:
    parts = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    text = render(FIRST_SYSTEM_PART, [{"role": "system", "content": parts}, *chat(("user", "Hi"))])
    assert text == "<user>Be brief.\nBe kind.Hi"
    both = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "a\nb" in render(FIRST_PART, chat(("user", both)))


def test_instructions_where_there_is_no_role_for_them() -> None:
    assert render(REFUSES_SYSTEM, chat(("system", "Be brief."), ("user", "Hi"))) == "<user>Be brief.\n\nHi"
    with pytest.raises(RequestError, match="System role not supported"):
        render(REFUSES_SYSTEM, chat(("system", "Be brief.")))


def test_what_clients_keep_beside_a_message() -> None:
    message = {"role": "assistant", "content": "x", "tool_calls": [], "id": "msg_1", "cache_control": {"type": "x"},
               "thinking_blocks": [{"thinking": "Hm."}], "provider_specific_fields": {"a": 1}}
    named = {"role": "user", "content": "Hi", "name": "Ann"}
    assert render(KNOWN, [named, message]) == "<user>Hi<assistant>x<assistant>"


def test_a_proof_by_words_is_not_kept() -> None:
    source = ("{% for m in messages %}{% if 'qx7' in m.content %}{{ raise_exception('marks') }}{% endif %}"
              "{% if m.content != 'secret' %}{{ m.content }}{% endif %}{% endfor %}")
    template = ChatTemplate(source, {})
    assert template.render(chat(("user", "hello"))) == "hello"
    with pytest.raises(RequestError, match=r"messages\.0\.role"):
        template.render(chat(("user", "secret")))
    assert render(LOUD, chat(("user", "hello"))) == "HELLO"


def test_switches_that_say_the_same_twice() -> None:
    source = "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}<quick>{% endif %}"
    assert render(source, chat(("user", "Hi")), enable_thinking=False, thinking=False) == "Hi<quick>"
    with pytest.raises(RequestError, match=r"chat_template_kwargs\.thinking"):
        render(source, chat(("user", "Hi")), enable_thinking=False, thinking=True)
    assert render(KNOWN, chat(("user", "Hi")), enable_thinking=False) == "<user>Hi<assistant>"
