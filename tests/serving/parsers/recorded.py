"""Outputs in the grammar of each model family, and what they mean. `calls` are (name, arguments as data)."""

# ruff: noqa: E501 - outputs are easier to read unbroken

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {
    "city": {"type": "string"}, "days": {"type": "integer"}, "units": {"enum": ["C", "F"]},
    "where": {"anyOf": [{"type": "object"}, {"type": "null"}]}, "limit": {"type": "number"}}}}
WRITE = {"name": "write_file", "parameters": {"type": "object", "properties": {
    "path": {"type": "string"}, "text": {"type": "string"}, "lines": {"type": "array"}, "force": {"type": "boolean"}}}}
PING = {"name": "ping"}
FUNCTIONS = (WEATHER, WRITE, PING)


@dataclass(frozen=True)
class Recorded:
    parser: str
    text: str
    calls: list[tuple[str, Any]] = field(default_factory=list)
    content: str = ""


HARD = 'a "quoted" \\ back, {nested {braces}} [x]; naïve 机器 😀\n\ttab </tool_call> <tool_call> <think>'
HARD_JSON = ('"a \\"quoted\\" \\\\ back, {nested {braces}} [x]; naïve 机器 😀\\n\\ttab </tool_call> <tool_call> '
             '<think>"')
PARIS = {"city": "Paris", "days": 3}

HERMES = {
    "one": Recorded("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n'
                    '</tool_call>', [("get_weather", PARIS)]),
    "text-around-parallel": Recorded(
        "hermes", 'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n'
        '</tool_call>\n<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>\nDone – voilà.',
        [("get_weather", PARIS), ("ping", {})], "Let me look.\n\nDone – voilà."),
    "arguments-first": Recorded("hermes", '<tool_call>{"arguments": {"city": "Paris", "days": 3}, "name": '
                                '"get_weather"}</tool_call>', [("get_weather", PARIS)]),
    "no-arguments": Recorded("hermes", '<tool_call>{"name": "ping"}</tool_call>', [("ping", {})]),
    "null-arguments": Recorded("hermes", '<tool_call>{"name": "ping", "arguments": null}</tool_call>', [("ping", {})]),
    "arguments-as-text": Recorded("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\",'
                                  ' \\"days\\": 3}"}</tool_call>', [("get_weather", PARIS)]),
    "hard-text": Recorded("hermes", '<tool_call>\n{"name": "write_file", "arguments": {"path": "/tmp/x", "text": '
                          + HARD_JSON + ', "lines": [[], {}, {"a": [1, -2.5e3, true, null]}]}}\n</tool_call>',
                          [("write_file", {"path": "/tmp/x", "text": HARD,
                                           "lines": [[], {}, {"a": [1, -2500.0, True, None]}]})]),
    "bare-line-break": Recorded("hermes", '<tool_call>{"name": "write_file", "arguments": {"text": "one\ntwo\t\\d"}}'
                                '</tool_call>', [("write_file", {"text": "one\ntwo\t\\d"})]),
    "other-members": Recorded("hermes", '<tool_call>{"id": "x1", "type": "function", "name": "ping", "arguments": {}, '
                              '"more": [1, {"a": "b"}]}</tool_call>', [("ping", {})]),
    "no-call": Recorded("hermes", "Just <b>text</b> with </tool_call> and <tool", [],
                        "Just <b>text</b> with </tool_call> and <tool"),
    "prose-in-markers": Recorded("hermes", "<tool_call>not json</tool_call> ok", [],
                                 "<tool_call>not json</tool_call> ok"),
    "missing-end": Recorded("hermes", '<tool_call>{"name": "ping", "arguments": {}}\n<tool_call>{"name": "get_weather", '
                            '"arguments": {"city": "Paris", "days": 3}}', [("ping", {}), ("get_weather", PARIS)]),
    "junk-before-end": Recorded("hermes", '<tool_call>{"name": "ping", "arguments": {}} oops</tool_call> fine',
                                [("ping", {})], " oops fine"),
    "only-blank": Recorded("hermes", " \n\n ", [], " \n\n "),
}
CODER = {
    "one": Recorded("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
                    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>", [("get_weather", PARIS)]),
    "types": Recorded("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\n42\n</parameter>\n"
                      "<parameter=days>\nthree\n</parameter>\n<parameter=units>\nC\n</parameter>\n<parameter=where>\n"
                      "None\n</parameter>\n<parameter=limit>\n2\n</parameter>\n<parameter=other>\n[1, 2]\n</parameter>"
                      "\n</function>\n</tool_call>",
                      [("get_weather", {"city": "42", "days": "three", "units": "C", "where": None, "limit": 2,
                                        "other": [1, 2]})]),
    "hard-text": Recorded("qwen3_coder", "I write.\n<tool_call>\n<function=write_file>\n<parameter=text>\n" + HARD
                          + " </function> <parameter=\n\n</parameter>\n<parameter=force>\nTrue\n</parameter>\n"
                          "</function>\n</tool_call>",
                          [("write_file", {"text": HARD + " </function> <parameter=\n", "force": True})],
                          "I write.\n"),
    "no-wrapper": Recorded("qwen3_coder", "<function=ping>\n</function>", [("ping", {})]),
    "parallel": Recorded("qwen3_coder", "<tool_call>\n<function=ping>\n</function>\n</tool_call>\n<tool_call>\n"
                         "<function=ping>\n</function>\n</tool_call>", [("ping", {}), ("ping", {})]),
    "junk-inside": Recorded("qwen3_coder", "<tool_call><function=ping>eh</function></tool_call>", [("ping", {})], "eh"),
    "not-a-function": Recorded("qwen3_coder", "<tool_call>\nhello</tool_call>", [], "<tool_call>\nhello</tool_call>"),
    "function-not-ended": Recorded("qwen3_coder", "<tool_call><function=ping></tool_call>x", [("ping", {})], "x"),
}
LLAMA = {
    "one": Recorded("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}',
                    [("get_weather", PARIS)]),
    "parallel": Recorded("llama3_json", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris", "days": '
                         '3}}; {"name": "ping", "parameters": {}}', [("get_weather", PARIS), ("ping", {})]),
    "typed": Recorded("llama3_json", '\n\n{"type": "function", "name": "ping", "parameters": {"x": "}{;"}}',
                      [("ping", {"x": "}{;"})]),
    "an-answer-in-json": Recorded("llama3_json", '{"name": "Bob", "parameters": {"age": 3}}', [],
                                  '{"name": "Bob", "parameters": {"age": 3}}'),
    "code": Recorded("llama3_json", "<|python_tag|>print(1)", [], "<|python_tag|>print(1)"),
    "text": Recorded("llama3_json", 'Sure: {"name": "ping", "parameters": {}}', [],
                     'Sure: {"name": "ping", "parameters": {}}'),
    "text-after": Recorded("llama3_json", '{"name": "ping", "parameters": {}} - there', [("ping", {})], " - there"),
}
PYTHONIC = {
    "one": Recorded("pythonic", '[get_weather(city="Paris", days=3)]', [("get_weather", PARIS)]),
    "parallel": Recorded("pythonic", "[ping(), get_weather(city='Paris', days=3,),\nping()]",
                         [("ping", {}), ("get_weather", PARIS), ("ping", {})]),
    "values": Recorded("pythonic", "[write_file(text='it\\'s \\\\ \\x41\\u00e9\\U0001F600 \\d \"q\" 机', lines=[1, -2.5, "
                       "(True, None), {'a': [], \"b\": {'c': .5}}, 1e3, +4], force=False)]",
                       [("write_file", {"text": "it's \\ Aé😀 \\d \"q\" 机",
                                        "lines": [1, -2.5, [True, None], {"a": [], "b": {"c": 0.5}}, 1000.0, 4],
                                        "force": False})]),
    "llama4": Recorded("pythonic", "<|python_start|>[ping()]<|python_end|>", [("ping", {})]),
    "unknown-name": Recorded("pythonic", "<|python_start|>[other(x=1)]<|python_end|>", [("other", {"x": 1})]),
    "a-list": Recorded("pythonic", "[1, 2, 3] are numbers", [], "[1, 2, 3] are numbers"),
    "a-link": Recorded("pythonic", "[ping](http://x) is a link", [], "[ping](http://x) is a link"),
    "an-expression": Recorded("pythonic", "[ping(x=1+1)]", [], "[ping(x=1+1)]"),
    "code-in-it": Recorded("pythonic", "[ping(x=__import__('os').system('id'))]", [],
                           "[ping(x=__import__('os').system('id'))]"),
    "second-broken": Recorded("pythonic", "[ping(), ping(x=]", [("ping", {})], ", ping(x=]"),
}
MISTRAL = {
    "list": Recorded("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}, '
                     '{"name": "ping", "arguments": {}, "id": "abcdefghi"}]', [("get_weather", PARIS), ("ping", {})]),
    "v11": Recorded("mistral", 'Hm.[TOOL_CALLS]get_weather{"city": "Paris", "days": 3}[TOOL_CALLS]ping{}',
                    [("get_weather", PARIS), ("ping", {})], "Hm."),
    "v13": Recorded("mistral", '[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris", "days": 3}'
                    '[TOOL_CALLS]ping[ARGS]{}', [("get_weather", PARIS), ("ping", {})]),
    "markers-in-text": Recorded("mistral", '[TOOL_CALLS]write_file[ARGS]{"text": "[TOOL_CALLS] ] [ARGS]"}',
                                [("write_file", {"text": "[TOOL_CALLS] ] [ARGS]"})]),
    "no-call": Recorded("mistral", "[TOOL_CALLS] hm [TOOL", [], "[TOOL_CALLS] hm [TOOL"),
}
_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
DEEPSEEK = {
    "v3": Recorded("deepseek_v3", 'Yes.<｜tool▁calls▁begin｜>' + _V3 + 'get_weather\n```json\n{"city": "Paris", "days": '
                   '3}\n```<｜tool▁call▁end｜>\n' + _V3 + 'ping\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
                   [("get_weather", PARIS), ("ping", {})], "Yes."),
    "v3-fence-in-text": Recorded("deepseek_v3", "<｜tool▁calls▁begin｜>" + _V3 + 'write_file\n```json\n{"text": "\\n```'
                                 '<｜tool▁call▁end｜>"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
                                 [("write_file", {"text": "\n```<｜tool▁call▁end｜>"})]),
    "v31": Recorded("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
                    '{"city": "Paris", "days": 3}<｜tool▁call▁end｜><｜tool▁call▁begin｜>ping<｜tool▁sep｜>{}'
                    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", [("get_weather", PARIS), ("ping", {})]),
    "v31-empty": Recorded("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>ping<｜tool▁sep｜><｜tool▁call▁end｜>"
                          "<｜tool▁calls▁end｜>", [("ping", {})]),
    "v31-no-call": Recorded("deepseek_v31", "<｜tool▁calls▁begin｜>oh<｜tool▁calls▁end｜>", [],
                            "<｜tool▁calls▁begin｜>oh<｜tool▁calls▁end｜>"),
}
KIMI = {
    "parallel": Recorded("kimi_k2", "I'll check.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
                         '<|tool_call_argument_begin|>{"city": "Paris", "days": 3}<|tool_call_end|><|tool_call_begin|>'
                         "functions.ping:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
                         [("get_weather", PARIS), ("ping", {})], "I'll check."),
    "spaced": Recorded("kimi_k2", "<|tool_calls_section_begin|> <|tool_call_begin|> functions.ping:0 "
                       "<|tool_call_argument_begin|> {} <|tool_call_end|> <|tool_calls_section_end|>", [("ping", {})]),
    "no-index": Recorded("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>ping<|tool_call_argument_begin|>{}",
                         [], "<|tool_calls_section_begin|><|tool_call_begin|>ping<|tool_call_argument_begin|>{}"),
}
GLM = {
    "one": Recorded("glm45", "Sure.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
                    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>", [("get_weather", PARIS)],
                    "Sure.\n"),
    "4.7": Recorded("glm45", "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days"
                    "</arg_key><arg_value>3</arg_value></tool_call><tool_call>ping</tool_call>",
                    [("get_weather", PARIS), ("ping", {})]),
    "hard-text": Recorded("glm45", "<tool_call>write_file\n<arg_key>text</arg_key>\n<arg_value>" + HARD
                          + "</arg_key></arg_value>\n<arg_key>lines</arg_key>\n<arg_value>[1, \"a\"]</arg_value>\n"
                          "</tool_call>", [("write_file", {"text": HARD + "</arg_key>", "lines": [1, "a"]})]),
    "not-quite-json": Recorded("glm45", "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>NaN</arg_value>\n<arg_key>b</arg_key>"
                               "\n<arg_value> [1, 2] </arg_value>\n</tool_call>", [("f", {"a": "NaN", "b": [1, 2]})]),
    "prose": Recorded("glm45", "<tool_call>hello there</tool_call>", [], "<tool_call>hello there</tool_call>"),
    "key-without-value": Recorded("glm45", "<tool_call>ping\n<arg_key>a</arg_key>no</tool_call>", [("ping", {})],
                                  "<arg_key>a</arg_key>no"),
}
ALL = {f"{sample.parser}-{name}": sample for group in (HERMES, CODER, LLAMA, PYTHONIC, MISTRAL, DEEPSEEK, KIMI, GLM)
       for name, sample in group.items()}
