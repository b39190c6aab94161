"""Calls whose closing tags are missing: in every format, every choice of tags, cut anywhere; and text like them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from serving.parsers.parser_registry import tool_parser
from serving.parsers.tool_set import ToolSet
from serving.parsers.tools.tool_parser import ToolParser
from tests.serving.parsers.feeding import answer, byte_cut

EDIT = {"name": "edit", "parameters": {"type": "object", "properties": {
    "old": {"type": "string"}, "new": {"type": "string"}, "count": {"type": "integer"}}}}
TOOLS = ToolSet((EDIT, {"name": "ping"}))
Calls = list[tuple[str, dict[str, Any]]]

HARD = "a <b> 机\n\n  </b> <parameter= x </function> y </tool_call> <tool_call> z"


def make(name: str) -> ToolParser:
    return tool_parser(name)(TOOLS)


def calls_in(name: str, text: str) -> tuple[Calls, str]:
    """What the text means, which no cut may change."""
    whole = answer(lambda: make(name), [text])
    assert answer(lambda: make(name), text) == whole  # one character at a time
    for position in range(len(text.encode()) + 1):
        assert answer(lambda: make(name), byte_cut(text, position)) == whole, position
    return [(call.name, json.loads(call.arguments)) for call in whole.calls], whole.content


class Tagged:
    """Writes calls in a format, without the closing tags in `dropped`."""

    def __init__(self, dropped: tuple[str, ...], br: str):
        self.dropped, self.br = dropped, br

    def text(self, calls: Calls) -> str:
        """All of them; the last one ends, as the text would else look cut off."""
        closed = type(self)(tuple(tag for tag in self.dropped if tag != "</tool_call>"), self.br)
        return "".join([*(self.call(*call) for call in calls[:-1]), closed.call(*calls[-1])])

    def call(self, name: str, values: dict[str, Any]) -> str:
        raise NotImplementedError

    def end(self, tag: str, *, br: str) -> str:
        return "" if tag in self.dropped else tag + br


class Coder(Tagged):
    ends = ("</parameter>", "</function>", "</tool_call>")

    def call(self, name: str, values: dict[str, Any]) -> str:
        br = self.br
        text = f"<tool_call>{br}<function={name}>{br}"
        for key, value in values.items():
            text += f"<parameter={key}>{br}{value}{br}" + self.end("</parameter>", br=br)
        return text + self.end("</function>", br=br) + self.end("</tool_call>", br=br)


class Glm(Tagged):
    ends = ("</arg_key>", "</arg_value>", "</tool_call>")

    def call(self, name: str, values: dict[str, Any]) -> str:
        br = self.br
        text = f"<tool_call>{name}{br}"
        for key, value in values.items():
            text += f"<arg_key>{key}" + self.end("</arg_key>", br=br) + f"<arg_value>{value}"
            text += self.end("</arg_value>", br="") + br
        return text + self.end("</tool_call>", br=br)


def subsets(tags: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [kept for num in range(len(tags) + 1) for kept in itertools.combinations(tags, num)]


SEQUENCES: dict[str, Calls] = {
    "one": [("edit", {"old": "alpha"})],
    "all": [("edit", {"old": "alpha", "count": 3, "new": "beta"})],
    "number-last": [("edit", {"old": "alpha", "count": 3})],
    "two": [("edit", {"old": "alpha", "count": 1}), ("edit", {"count": 2, "old": "beta"})],
    "three": [("edit", {"old": "alpha"}), ("ping", {}), ("edit", {"new": "机\nb"})],
    "hard": [("edit", {"old": HARD, "count": 1}), ("edit", {"new": HARD})],
}


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("br", ["\n", ""], ids=["lines", "inline"])
@pytest.mark.parametrize(("name", "form", "dropped"),
                         [("qwen3_coder", Coder, dropped) for dropped in subsets(Coder.ends)]
                         + [("glm45", Glm, dropped) for dropped in subsets(Glm.ends)])
def test_every_choice_of_closing_tags(name: str, form: type[Coder | Glm], dropped: tuple[str, ...], br: str,
                                      sequence: Calls) -> None:
    writer = form(dropped, br)
    if any(function == "ping" for function, _ in sequence) and name == "glm45" and "</tool_call>" in dropped and not br:
        sequence = [call for call in sequence if call[0] != "ping"]  # nothing then ends the name
    if ("</parameter>" in dropped and not br) or ("</arg_value>" in dropped and not br):
        sequence = [(function, {key: value for key, value in values.items() if value != HARD})
                    for function, values in sequence]  # inline, the next tag ends a value
    calls, content = calls_in(name, writer.text(sequence))
    assert calls == sequence
    assert not content.strip()


@pytest.mark.parametrize("last", ["</function>", "</function>\n", "</function>\n</tool_call>", "</tool_call>", ""])
def test_text_before_and_after(last: str) -> None:
    head = "I edit.\n<tool_call>\n<function=edit>\n<parameter=old>\nalpha\n"
    if last.endswith("</tool_call>") and "</function>" in last:
        assert calls_in("qwen3_coder", head + last + "\nDone.") == ([("edit", {"old": "alpha"})], "I edit.\n\nDone.")
    found = answer(lambda: make("qwen3_coder"), [head + last])
    assert found.content == "I edit.\n"
    assert found.calls[0].arguments == ('{"old": "alpha"}' if last else '{"old": "alpha\\n')


VALUES = {
    "a-closed-example": "see\n<tool_call>\n<function=other>\n</function>\n</tool_call>\nabove",
    "a-function-of-xml": "<x>\n</function>\n</x>",
    "an-unknown-parameter": "<x>\n<parameter=other>\n1",
    "a-known-parameter-in-a-line": "write <parameter=new> or </function> or </tool_call> here",
    "a-parameter-that-is-there": "<x>\n<parameter=old>\n1",
    "an-unknown-function": "<x>\n<function=other>\n</x>",
    "an-end-and-more": "<x>\n</tool_call>\nmore",
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_that_speak_of_tags(value: str) -> None:
    text = f"<tool_call>\n<function=edit>\n<parameter=old>\n{value}\n</parameter>\n</function>\n</tool_call>"
    assert calls_in("qwen3_coder", text) == ([("edit", {"old": value})], "")


@pytest.mark.parametrize("value", ["a </tool_call> b", "<arg_key>other</arg_key>", "<tool_call>other\n",
                                   "<tool_call> edit it", "<arg_key>old</arg_key>", "a\n</tool_call>\nmore"])
def test_values_that_speak_of_tags_glm(value: str) -> None:
    text = f"<tool_call>edit\n<arg_key>old</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    assert calls_in("glm45", text) == ([("edit", {"old": value})], "")


GOOD = '{"city": "Paris"}'
BROKEN = '{"city": Paris'
_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>edit\n```json\n"
JSON_FORMATS = {
    "hermes": ("", '<tool_call>\n{"name": "edit", "arguments": ', "}\n", "</tool_call>\n", ""),
    "deepseek_v3": ("<｜tool▁calls▁begin｜>", _V3, "\n```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    "deepseek_v31": ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>edit<｜tool▁sep｜>", "", "<｜tool▁call▁end｜>",
                     "<｜tool▁calls▁end｜>"),
    "kimi_k2": ("<|tool_calls_section_begin|>",
                "<|tool_call_begin|>functions.edit:0<|tool_call_argument_begin|>", "", "<|tool_call_end|>",
                "<|tool_calls_section_end|>"),
}


@pytest.mark.parametrize("first", [GOOD, BROKEN], ids=["good", "broken"])
@pytest.mark.parametrize("keeps_last", [True, False], ids=["closed", "open"])
@pytest.mark.parametrize("name", JSON_FORMATS)
def test_json_between_tags(name: str, keeps_last: bool, first: str) -> None:
    """A call that is not closed ends where the next one begins, whether or not its arguments are JSON."""
    begin, head, foot, end, last = JSON_FORMATS[name]
    text = begin + head + first + foot + head + GOOD + foot + (end + last if keeps_last else "")
    whole = answer(lambda: make(name), [text])
    assert answer(lambda: make(name), text) == whole
    for position in range(len(text.encode()) + 1):
        assert answer(lambda: make(name), byte_cut(text, position)) == whole, position
    assert [call.name for call in whole.calls] == ["edit", "edit"]
    assert whole.calls[0].arguments.startswith(first) and json.loads(whole.calls[1].arguments) == json.loads(GOOD)
    if first is GOOD:
        assert whole.calls[0].arguments == GOOD and not whole.content.strip()
