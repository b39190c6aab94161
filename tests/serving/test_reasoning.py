"""Reasoning parsers on recorded outputs, cut everywhere, alone and in front of tool calls."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.parsers.events import Reasoning
from serving.parsers.output import OutputParser, Parsers
from serving.parsers.parser_registry import REASONING_ALIASES, REASONING_PARSERS, reasoning_parser
from tests.serving.parsers.feeding import byte_cut, make

CALL = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
KIMI_CALL = ("<|tool_calls_section_begin|><|tool_call_begin|>functions.ping:0<|tool_call_argument_begin|>{}"
             "<|tool_call_end|><|tool_calls_section_end|>")
OPEN, CLOSED, NEITHER = "<|im_start|>assistant\n<think>\n", "assistant\n<think>\n\n</think>\n\n", "assistant\n"

# parser, end of the prompt, output, reasoning, content, number of calls
CASES = {
    "r1-prompt-opens": ("deepseek_r1", OPEN, "Hm, 你好.\n</think>\n\nHi!", "Hm, 你好.", "Hi!", 0),
    "r1-opens-nothing": ("deepseek_r1", NEITHER, "Hm.</think>Hi!", "Hm.", "Hi!", 0),
    "r1-opens-itself": ("deepseek_r1", NEITHER, "<think>\nHm.\n</think>\n\nHi!", "Hm.", "Hi!", 0),
    "r1-never-ends": ("deepseek_r1", OPEN, "Hm </thin", "Hm </thin", "", 0),
    "r1-prompt-closed": ("deepseek_r1", CLOSED, "Hi <think>!", "", "Hi <think>!", 0),
    "qwen-opens": ("qwen3", NEITHER, "<think>\nHm\n\nhm.\n</think>\n\nHi 😀", "Hm\n\nhm.", "Hi 😀", 0),
    "qwen-prompt-opens": ("qwen3", OPEN, "Hm.\n</think>\n\nHi", "Hm.", "Hi", 0),
    "qwen-does-not-think": ("qwen3", NEITHER, "  Hi </think> <think>x</think>", "", "  Hi </think> <think>x</think>",
                            0),
    "qwen-thinks-nothing": ("qwen3", NEITHER, "<think>\n\n</think>\n\nHi", "", "Hi", 0),
    "qwen-thinks-of-calls": ("qwen3", NEITHER, f"<think>I'd {CALL}</think>\n{CALL}", f"I'd {CALL}", "", 1),
    "qwen-text-and-call": ("qwen3", OPEN, f"Hm\n</think>\n\nI ask.\n{CALL}", "Hm", "I ask.\n", 1),
    "glm-opens": ("glm45", NEITHER, "\n<think>Hm.</think>\nHi", "Hm.", "Hi", 0),
    "kimi-call-ends-it": ("kimi_k2", OPEN, f"Hm.{KIMI_CALL}", "Hm.", "", 1),
    "qwen-never-closes": ("qwen3", NEITHER, f"<think>\nHm.\n{CALL}\n", "Hm.", "", 1),
    "qwen-never-closes-two": ("qwen3", OPEN, f"Hm.{CALL}\n{CALL}", "Hm.", "", 2),
    "r1-only-calls": ("deepseek_r1", NEITHER, CALL, "", "", 1),
    "qwen-thinks-of-calls-only": ("qwen3", OPEN, f"I'd\n{CALL} or not.", f"I'd\n{CALL} or not.", "", 0),
    "qwen-breaks-off-in-a-call": ("qwen3", OPEN, f"Hm.\n{CALL[:-4]}", f"Hm.\n{CALL[:-4]}", "", 0),
    "qwen-thinks-of-many-calls": ("qwen3", OPEN, f"I'd\n{CALL}, {CALL}\n</think>\n{CALL}",
                                  f"I'd\n{CALL}, {CALL}", "", 1),
    "glm-never-closes": ("glm45", NEITHER, f"<think>Hm.{CALL}", "Hm.", "", 1),
    "kimi": ("kimi_k2", NEITHER, f"<think>Hm.</think>{KIMI_CALL}", "Hm.", "", 1),
}


def parser_for(name: str, prompt: str) -> OutputParser:
    return OutputParser(reasoning_parser(name)(prompt), make("kimi_k2" if name == "kimi_k2" else "hermes"))


def understood(parser: OutputParser, pieces: list[str]) -> tuple[str, str, int]:
    for piece in pieces:
        parser.feed(piece)
    parser.feed("", last=True)
    found = parser.answer()
    return found.reasoning, found.content, len(found.calls)


@pytest.mark.parametrize(("name", "prompt", "text", "reasoning", "content", "num_calls"), CASES.values(), ids=CASES)
def test_cut_anywhere(name: str, prompt: str, text: str, reasoning: str, content: str, num_calls: int) -> None:
    assert understood(parser_for(name, prompt), [text]) == (reasoning, content, num_calls)
    assert understood(parser_for(name, prompt), list(text)) == (reasoning, content, num_calls)
    for position in range(len(text.encode()) + 1):
        assert understood(parser_for(name, prompt), byte_cut(text, position)) == (reasoning, content, num_calls)


def test_reasoning_streams() -> None:
    parser = parser_for("deepseek_r1", OPEN)
    for word in ("first ", "second ", "third "):
        assert parser.feed(word) == [Reasoning(word)]


FRAGMENTS = ["<think>", "</think>", "\n", " ", "<thi", "</th", "a", "é机", "<tool_call>", CALL, KIMI_CALL,
             "<|tool_calls"]


@pytest.mark.parametrize("name", REASONING_PARSERS)
@pytest.mark.parametrize("prompt", [OPEN, CLOSED, NEITHER])
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(parts=st.lists(st.sampled_from(FRAGMENTS), max_size=12), seed=st.integers(0, 2**32 - 1))
def test_hostile(name: str, prompt: str, parts: list[str], seed: int) -> None:
    """No cut matters, and without its tags the text is all there: nothing is lost."""
    text = "".join(parts)
    parser = reasoning_parser(name)(prompt)
    rng = random.Random(seed)
    cuts = [0, *sorted(rng.randrange(len(text) + 1) for _ in range(3)), len(text)]
    found = [parser.feed(text[a:b]) for a, b in itertools.pairwise(cuts)] + [parser.finish()]
    whole = reasoning_parser(name)(prompt)
    at_once = [whole.feed(text), whole.finish()]
    thought, answered = (["".join("".join(e.text for e in events) for events, _ in run) for run in (found, at_once)],
                         ["".join(rest for _, rest in run) for run in (found, at_once)])
    assert thought[0] == thought[1]
    assert answered[0] == answered[1]
    markup = len(text) - len(thought[0]) - len(answered[0])
    assert 0 <= markup <= len("<think>\n\n</think>\n\n") + (len(text) - len(text.lstrip()) if "<think>" in text else 0)
    assert text.endswith(answered[0])
    assert parser.num_handled <= 40 * len(text) + 200


def test_work_is_linear() -> None:
    for text in ("<think>" + "\n" * 2000, "<think>" + "</think" * 300, "a" * 2000, " " * 2000):
        parser = reasoning_parser("deepseek_r1")("")
        for char in text:
            parser.feed(char)
        parser.finish()
        assert parser.num_handled <= 14 * len(text)


def test_aliases_name_parsers() -> None:
    for alias in REASONING_ALIASES:
        assert reasoning_parser(alias) is reasoning_parser(REASONING_ALIASES[alias])


@pytest.mark.parametrize(("template", "tools", "reasoning"), [
    ("<|im_start|> <tool_call> arguments <think></think>", "HermesParser", "Qwen3ThinkParser"),
    ("<|im_start|> <tool_call> <function=x> <parameter=y>", "Qwen3CoderParser", None),
    ("<|observation|> <tool_call> <arg_key> </think>", "Glm45Parser", "Glm45ThinkParser"),
    ("<|tool_calls_section_begin|> <think></think>", "KimiK2Parser", "KimiK2ThinkParser"),
    ("<｜Assistant｜> <｜tool▁sep｜> ```json </think>", "DeepSeekV3Parser", "DeepSeekR1ThinkParser"),
    ("<｜Assistant｜> <｜tool▁sep｜> thinking </think>", "DeepSeekV31Parser", "Qwen3ThinkParser"),
    ("[INST] [TOOL_CALLS]", "MistralParser", None),
    ("<|eot_id|> <|python_tag|>", "Llama3JsonParser", None),
    ("<|python_start|>", "PythonicParser", None),
    ("<|im_start|>", None, None),
])
def test_auto_knows_templates(template: str, tools: str | None, reasoning: str | None) -> None:
    found = Parsers.chosen("auto", "auto", template)
    assert [kind and kind.__name__ for kind in (found.tools, found.reasoning)] == [tools, reasoning]
    assert Parsers.chosen("none", "none", template) == Parsers(None, None)
