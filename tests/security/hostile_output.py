"""Units which, repeated, make parsers that look ahead or back again quadratic."""

HOSTILE = (
    "<", "[", "{", "(", "<tool_call>", "<tool_call", "<function=", "<function=a", "<parameter=", "[f(a=", "[f(a=[",
    "f(", "[TOOL_CALLS]", "[TOOL_CALLS", "<|tool_calls_section_begin|>", "<|tool_call_begin|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>", "<arg_key>", '{"name": "', '{"name": "f", "arguments": {', '"\\', "<think>", "</think",
    '[{"name":', "\n", " ", "[a, b, ", "A(B=\t", "é",
)
