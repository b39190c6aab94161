"""Templates of the real families against transformers' own renderer, and hostile ones against the bounds."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from serving.parsers.parser_registry import guess_tool_parser
from tests.serving.parsers import templates
from xllm.errors import ModelError, RequestError
from xllm.text.chat_template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "It's <b>weather</b> & naïve 机器", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["a", "b"], "description": "of \"it\""}},
        "required": ["city"]}}}]
ARGUMENTS = {"city": "Zürich \"x\" 😀", "days": 3, "more": [1, {"a": None}], "off": False}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def conversation(arguments: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "weather?\n"},
            {"role": "assistant", "content": "", "tool_calls": [call(arguments)], "reasoning_content": " hm "},
            {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"sun": true}'}]


CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ([{"role": "user", "content": "Hi <b> & 你好 😀"}], {}),
    "system": ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nx\n</think>\n\nb"},
                {"role": "user", "content": "c"}], {"add_generation_prompt": False}),
    "tools": ([{"role": "user", "content": "a"}], {"tools": TOOLS}),
    "quick": ([{"role": "user", "content": "a"}], {"enable_thinking": False}),
}


def reference(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    options = {"add_generation_prompt": True, **options}
    rendered, _ = render_jinja_template([messages], chat_template=template, **SPECIAL, **options)
    return rendered[0]


def ours(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """Some of the templates here show no tools, which is refused unless `needs_tools` says otherwise."""
    return ChatTemplate(template, SPECIAL).render(messages, **{"needs_tools": False, **options})


@pytest.mark.parametrize("family", templates.ALL)
@pytest.mark.parametrize("chat", CHATS)
def test_as_transformers(family: str, chat: str) -> None:
    messages, options = CHATS[chat]
    template = templates.ALL[family][0]
    if "enable_thinking" in options and "enable_thinking" not in template:
        with pytest.raises(RequestError, match=r"chat_template_kwargs\.enable_thinking"):
            ours(template, messages, enable_thinking=True)
        if "think" in template:  # it thinks, and nothing turns that off
            with pytest.raises(RequestError, match=r"chat_template_kwargs\.enable_thinking"):
                ours(template, messages, **options)
            return
    assert ours(template, messages, **options) == reference(template, messages, **options)


@pytest.mark.parametrize("family", templates.ALL)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no-tools", "tools"])
def test_arguments_as_text_and_as_object(family: str, tools: Any) -> None:
    """The API's text gives what transformers gives for the form that the template reads; an object the same."""
    template, form = templates.ALL[family]
    text = json.dumps(ARGUMENTS, separators=(",", ":"), ensure_ascii=False)  # not as `tojson` spaces it
    expected = reference(template, conversation(text if form == "text" else ARGUMENTS), tools=tools)
    assert ours(template, conversation(text), tools=tools) == expected
    if family != "deepseek_v3":  # which cannot read objects, there as here
        expected = reference(template, conversation(ARGUMENTS), tools=tools)
        assert ours(template, conversation(ARGUMENTS), tools=tools) == expected


def test_arguments_that_are_no_object_stay_text() -> None:
    for text in ("not json", "[1]", '"x"', "[" * 5000):
        assert ours(templates.QWEN3, conversation(text)) == reference(templates.QWEN3, conversation(text))
    assert '"arguments": {}' in ours(templates.HERMES_TOJSON, conversation(""))


PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two 😀"}]}]


def test_parts_and_text() -> None:
    """Templates that read parts get parts, others the joined text; those that read both get what was sent."""
    text = [{"role": "user", "content": "one\ntwo 😀"}]
    for family in ("kimi_k2", "glm45"):
        template = templates.ALL[family][0]
        assert ours(template, PARTS) == reference(template, PARTS)
    for family in ("qwen3", "hermes", "llama31", "mistral", "deepseek_v3", "qwen3_coder"):
        template = templates.ALL[family][0]
        assert ours(template, PARTS) == reference(template, text)
    assert ours(templates.PARTS_ONLY, PARTS) == reference(templates.PARTS_ONLY, PARTS)
    whole = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert ours(templates.PARTS_ONLY, [{"role": "user", "content": "hello"}]) == reference(templates.PARTS_ONLY, whole)


def test_generation_blocks_and_globals() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n"}]
    assert ours(templates.GENERATION, messages) == reference(templates.GENERATION, messages)


def test_continuing_the_last_message() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the answer is"}]
    for template in (templates.KIMI_K2, templates.PARTS_ONLY):
        text = ours(template, messages, add_generation_prompt=False, continue_final_message=True)
        assert text.endswith("the answer is")


def test_templates_tell_their_format() -> None:
    found = {family: guess_tool_parser(text) for family, (text, _) in templates.ALL.items()}
    assert found == {"qwen3": "hermes", "hermes": "hermes", "qwen3_coder": "qwen3_coder", "llama31": "llama3_json",
                     "mistral": "mistral", "deepseek_v3": "deepseek_v3", "kimi_k2": "kimi_k2", "glm45": "glm45"}


HOSTILE = {
    "loops": templates.ENDLESS,
    "macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "output": "{% for a in range(9999) %}{{ 'x' * 10000 }}{% endfor %}",
    "repeat": "{{ 'x' * 10 ** 10 }}",
    "repeat-list": "{{ ([0] * 10 ** 9) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "square": "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "double": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "double-block": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}"
                    "{% endset %}{% endfor %}",
    "double-plus": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "tree": "{% set ns = namespace(s=[1]) %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
            "{{ ns.s }}",
    "tree-json": "{% set ns = namespace(s={}) %}{% for i in range(40) %}{% set ns.s = {'a': ns.s, 'b': ns.s} %}"
                 "{% endfor %}{{ ns.s | tojson }}",
    "tree-concat": "{% set ns = namespace(s=[1]) %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
                   "{% set x = '' ~ ns.s %}",
    "center": "{{ 'x' | center(10 ** 9) }}",
    "ljust": "{{ 'x'.ljust(10 ** 9) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent-star": "{{ '%*d' % (10 ** 9, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format-filter": "{{ '%1000000000d' | format(1) }}",
    "replace": "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "replace-filter": "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "join": "{{ ('y' * 100000).join(['x'] * 100000) }}",
    "join-filter": "{{ (['x'] * 100000) | join('y' * 100000) }}",
    "indent": "{{ ('x\n' * 100000) | indent(100000) }}",
    "lipsum": "{{ lipsum(n=99999) }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates_end_soon(source: str) -> None:
    started = time.process_time()
    with pytest.raises((RequestError, ModelError)):
        ours(source, [{"role": "user", "content": "x"}], max_seconds=0.3)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("source", ["{{ " + "(" * 20_000, "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
                                    "{{ 1" + " + 1" * 50_000 + " }}"], ids=["parentheses", "ifs", "sum"])
def test_what_breaks_compilers_is_a_model_error(source: str) -> None:
    with pytest.raises(ModelError, match="does not compile"):
        ours(source, [{"role": "user", "content": "x"}])


def test_bounds_do_not_touch_long_chats() -> None:
    messages = [{"role": ("user", "assistant")[n % 2], "content": "word " * 400} for n in range(1001)]
    for family in ("qwen3", "glm45"):
        template = templates.ALL[family][0]
        assert ours(template, messages) == reference(template, messages)
