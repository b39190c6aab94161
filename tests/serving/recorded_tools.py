"""What the scripted model says, and the template and tools that go with it."""

# ruff: noqa: E501 - outputs are easier to read unbroken

from __future__ import annotations

from typing import Any

SCRIPTS = {
    "calls": 'Let me look – one moment.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 😀", "days": '
             '3}}\n</tool_call>\n<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>',
    "thinks": "<think>\nHm … \n</tool_call> 机器, let me see.\n</think>\n\nThe answer is 42.",
    "thinks-then-calls": '<think>\nI need the weather.\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": '
                         '{"city": "Bern"}}\n</tool_call>',
    "wrong": 'I ask.\n<tool_call>\n{"name": "get_weather", "arguments": {"town": [1], "city": false, "days": 99, "x": {}}}'
             "\n</tool_call>",
    "opened<think>": "Let me think {of} it.\n</think>\n\nJust this.",
    "text": "Just <b>text</b>, no <tool.",
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {
        "name": "get_weather", "description": "Weather, by city",
        "parameters": {"type": "object", "required": ["city"], "additionalProperties": False, "properties": {
            "city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 0, "maximum": 9}}}}},
    {"type": "function", "function": {"name": "ping"}},
    {"type": "function", "function": {
        "name": "find", "parameters": {
            "type": "object", "required": ["kind"], "additionalProperties": False,
            "properties": {"kind": {"$ref": "#/$defs/kind"}}, "$defs": {"kind": {"enum": ["a", "b"]}}}}},
]
# In the manner of Qwen's: tools first, calls and results between tags, no opened `<think>`.
TEMPLATE = (
    "{%- if tools %}{{- '<tools>' }}{% for tool in tools %}{{- tool | tojson }}{% endfor %}{{- '</tools>\\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}{{- '<tool_response>' + message.content + '</tool_response>' }}"
    "{%- else %}{{- message.content }}{% for call in message.tool_calls or [] %}"
    "{{- '<tool_call>{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}"
    "{{- call.function.arguments | tojson }}{{- '}</tool_call>' }}{% endfor %}{% endif %}"
    "{%- endfor %}{#- </think> <|im_start|> -#}"
)
