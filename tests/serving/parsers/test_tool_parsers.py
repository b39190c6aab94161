"""Every format of tool calls on recorded outputs, cut everywhere, and on hostile ones."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.parsers.events import CallArguments, CallStart
from serving.parsers.parser_registry import TOOL_PARSERS
from serving.parsers.tools.forced import NamedParser, RequiredParser
from tests.serving.parsers.feeding import TOOLS, answer, byte_cut, make, run
from tests.serving.parsers.recorded import ALL, Recorded

BARE_VALUES = ("qwen3_coder", "glm45")
SENTINEL = 0xE000  # private use: a character that occurs nowhere else


@pytest.mark.parametrize("sample", ALL.values(), ids=ALL)
def test_meaning(sample: Recorded) -> None:
    found = answer(lambda: make(sample.parser), [sample.text])
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == sample.calls
    assert found.content == sample.content


@pytest.mark.parametrize("sample", ALL.values(), ids=ALL)
def test_no_cut_changes_anything(sample: Recorded) -> None:
    whole = answer(lambda: make(sample.parser), [sample.text])
    for position in range(len(sample.text.encode()) + 1):
        assert answer(lambda: make(sample.parser), byte_cut(sample.text, position)) == whole, position
    assert answer(lambda: make(sample.parser), sample.text) == whole  # one character at a time


@pytest.mark.parametrize("sample", ALL.values(), ids=ALL)
def test_cut_off_anywhere(sample: Recorded) -> None:
    """An answer that ends early (max_tokens) gives a beginning of the whole one, and loses nothing."""
    whole = answer(lambda: make(sample.parser), [sample.text])
    for length in range(len(sample.text)):
        found = answer(lambda: make(sample.parser), [sample.text[:length]])
        assert found == answer(lambda: make(sample.parser), sample.text[:length])
        if not found.calls:
            assert found.content == sample.text[:length]
        for early, late in zip(found.calls, whole.calls, strict=False):
            assert early.name == late.name
            # What was cut may be part of an end marker, of an escape, or a value that is not converted yet.
            sure = early.arguments.rpartition('": ')[0] if sample.parser in BARE_VALUES else early.arguments[:-7]
            assert late.arguments.startswith(sure), (early, late)


@pytest.mark.parametrize("sample", [s for s in ALL.values() if s.calls and not s.content], ids=lambda s: s.parser)
def test_blanks_beside_calls_are_no_content(sample: Recorded) -> None:
    """As sentencepiece models write one before their first token."""
    for before in (" ", "\n", " \n "):
        for pieces in ([before + sample.text], before + sample.text):
            found = answer(lambda: make(sample.parser), pieces)
            assert (found.content, len(found.calls)) == ("", len(sample.calls))


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_arguments_stream(name: str) -> None:
    """A long argument comes out while it comes in; only the pythonic format waits for the closing bracket."""
    if name == "pythonic":
        return
    text = next(s.text for s in ALL.values() if s.parser == name and s.calls and s.calls[0][1].get("city") == "Paris")
    head, _, tail = text.partition("Paris")
    parser = make(name)
    parser.feed(head)
    for piece in ("lorem ipsum dolor ", "sit amet, consectetur "):
        events = parser.feed(piece)
        assert "".join(e.text for e in events if isinstance(e, CallArguments)).strip(), events
    events = parser.feed(tail) + parser.finish()
    assert not any(isinstance(e, CallStart) and e.index == 0 for e in events)


def test_ids() -> None:
    kimi = run(make("kimi_k2"), [ALL["kimi_k2-parallel"].text])
    assert [e.id for e in kimi if isinstance(e, CallStart)] == ["functions.get_weather:0", "functions.ping:1"]
    mistral = [e for e in run(make("mistral"), [ALL["mistral-v13"].text]) if isinstance(e, CallStart)]
    assert mistral[0].id == "abcdefghi"
    assert len(mistral[1].id) == 9
    assert mistral[1].id.isalnum()
    hermes = [e for e in run(make("hermes"), [ALL["hermes-text-around-parallel"].text]) if isinstance(e, CallStart)]
    assert hermes[0].id.startswith("call_")
    assert hermes[0].id != hermes[1].id


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<function=", "<function=ping>", "</function>", "<parameter=", "<parameter=city>",
    "</parameter>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "function", "\n```json\n",
    "\n```", "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    "<|tool_calls_section_end|>", "functions.ping:0", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    '{"name": "ping", "arguments": {', '{"name": "ping", ', '"parameters": ', '"arguments": "', '{"arguments": [1, {',
    '"name": "ping"', "}", "}}", "]", "[", "{", '"', "\\", '\\"', "\\u00", ",", ", ", ":", ";", "ping", "ping(", "(",
    ")", "x=", "'", "1", "-", "true", "null", "1e999", "\n", " ", "\x00", "\x0b", "é", "机", "😀", "<", "|", "<|",
    "<tool", "</", "[TOOL", "<｜", "<think>", "</think>", "text ", "<|python_start|>", "<|python_end|>", "S", "S",
]


@st.composite
def hostile(draw: st.DrawFn) -> tuple[str, str]:
    """A text of markup in disorder, and the sentinels that stand in it."""
    parts = draw(st.lists(st.sampled_from(FRAGMENTS), max_size=24))
    sentinels = [chr(SENTINEL + index) for index, part in enumerate(parts) if part == "S"]
    return "".join(chr(SENTINEL + i) if part == "S" else part for i, part in enumerate(parts)), "".join(sentinels)


PARSERS = {**{name: (lambda name=name: make(name)) for name in TOOL_PARSERS},
           "required": lambda: RequiredParser(TOOLS), "named": lambda: NamedParser(TOOLS, "ping")}


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(text=hostile(), seed=st.integers(0, 2**32 - 1))
def test_hostile_texts(name: str, text: tuple[str, str], seed: int) -> None:
    """Nothing raises, no cut matters, no character that is not markup is lost or shown twice."""
    source, sentinels = text
    whole = answer(PARSERS[name], [source])
    assert answer(PARSERS[name], source) == whole
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(len(source) + 1) for _ in range(4))
    assert answer(PARSERS[name], [source[a:b] for a, b in zip([0, *cuts], [*cuts, len(source)])]) == whole
    shown = whole.content + "".join(call.name + call.arguments for call in whole.calls)
    for sentinel in sentinels:
        assert shown.count(sentinel) == 1 or _in_envelope(source, sentinel), (source, whole)
    if not whole.calls:
        assert whole.content == source


def _in_envelope(source: str, sentinel: str) -> bool:
    """Whether the character may be part of a call's markup: members of the call object other than its arguments."""
    return '"' in source[:source.index(sentinel)]


@pytest.mark.parametrize("opening", [
    "", "<tool_call>", '<tool_call>{"name": "', '<tool_call>{"name": "ping", "arguments": {"x": "', "[TOOL_CALLS][",
    '<tool_call>{"name": "ping", "arguments": ', '<tool_call>{"arguments": ', "<function=ping><parameter=x>",
    "[ping(x=", "<tool_call>ping\n<arg_key>x</arg_key><arg_value>", "<|tool_calls_section_begin|><|tool_call_begin|>",
    "[ping(x='",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>ping<｜tool▁sep｜>", '<|python_tag|>{"x": ', "[",
])
@pytest.mark.parametrize("filler", ["a", " ", "<", "<tool_call>", "[[", '{"a":', '\\"', "\\", "<｜tool▁", "</parameter",
                                    "</tool_call", "1", "\n```", "(", "'", '{"name": "ping", "arguments": {}}'])
def test_work_is_linear(opening: str, filler: str) -> None:
    """Characters handled, not seconds: in one piece and one by one, never more than a marker's length for each."""
    for name in TOOL_PARSERS:
        for pieces_of, bound in ((lambda text: [text], 5), (lambda text: text, 36)):
            text = opening + filler * (600 // len(filler))
            parser = make(name)
            run(parser, pieces_of(text))
            assert parser.source.num_handled <= bound * len(text) + 200, (name, parser.source.num_handled / len(text))
