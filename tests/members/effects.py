"""For each honoured member of a request body: two values of it whose answers must differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
ABSENT = object()

GREEDY: Json = {"temperature": 0, "max_tokens": 12}
FREE: Json = {"temperature": 1.0, "max_tokens": 12, "seed": 7}
FEW: Json = {"temperature": 0, "max_tokens": 40, "allowed_token_ids": list(range(60, 90))}  # so that they come twice
PROMPT_TOO: Json = {**GREEDY, "return_token_ids": True}  # shows the prompt's tokens
STREAM: Json = {**GREEDY, "stream": True}
SCHEMA: Json = {"enum": ["yes", "no"]}


@dataclass(frozen=True)
class Effect:
    """beside: the rest of the body. on, off: values of the member; ABSENT leaves it out."""

    on: Any
    off: Any = ABSENT
    beside: Json = field(default_factory=lambda: dict(GREEDY))


# What chats and completions share.
GENERATION: dict[str, Effect] = {
    "frequency_penalty": Effect(2.0, beside=FEW),
    "presence_penalty": Effect(2.0, beside=FEW),
    "repetition_penalty": Effect(1.8, beside=FEW),
    "logit_bias": Effect({"60": 100}),
    "max_tokens": Effect(3, 5, {"temperature": 0}),
    "n": Effect(2, 1, FREE),
    "seed": Effect(1, 2, {"temperature": 1.0, "max_tokens": 12}),
    "stop": Effect(["e"]),
    "stream": Effect(True),
    "stream_options": Effect({"include_usage": True}, beside=STREAM),
    "stream_options.include_usage": Effect(True, beside=STREAM),
    "stream_options.continuous_usage_stats": Effect(True, beside=STREAM),
    "temperature": Effect(1.5, 0, {"max_tokens": 12, "seed": 7}),
    "top_p": Effect(0.01, beside={**FREE, "temperature": 2.0}),
    "top_k": Effect(1, beside={**FREE, "temperature": 2.0}),
    "min_p": Effect(1.0, beside={**FREE, "temperature": 2.0}),
    "min_tokens": Effect(12, beside={**GREEDY, "structured_outputs": {"choice": ["a"]}}),
    "stop_token_ids": Effect(list(range(60, 90)), beside=FEW),
    "bad_words": Effect(["e", "a", "i", " ", "\n"]),
    "include_stop_str_in_output": Effect(True, beside={**GREEDY, "stop": ["e"]}),
    "ignore_eos": Effect(True, beside={**GREEDY, "logit_bias": {"2": 100}}),
    "skip_special_tokens": Effect(False, beside={**GREEDY, "logit_bias": {"1": 100}}),
    "allowed_token_ids": Effect([60, 61]),
    "prompt_logprobs": Effect(1),
    "response_format": Effect({"type": "json_object", "schema": SCHEMA}),
    "response_format(type=json_object)": Effect({"type": "json_object"}),
    "response_format(type=json_schema)": Effect({"type": "json_schema", "json_schema": {"schema": SCHEMA}}),
    "structured_outputs": Effect({"choice": ["left", "right"]}),
    "return_token_ids": Effect(True),
    "return_tokens_as_token_ids": Effect(True),
    "request_id": Effect("mine"),
}

COMPLETIONS: dict[str, Effect] = {
    **GENERATION,
    "prompt": Effect("def f(", "import "),
    "echo": Effect(True),
    "logprobs": Effect(2),
    "return_tokens_as_token_ids": Effect(True, beside={**GREEDY, "logprobs": 1}),
}

FORCED: Json = {**GREEDY, "max_tokens": 60, "tools": [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {"a": {"enum": [name]}},
                                                                   "required": ["a"], "additionalProperties": False}}}
    for name in ("one", "two")]}
USER: Json = {"role": "user", "content": "How do I read a file?"}
CHAT: dict[str, Effect] = {
    **GENERATION,
    "messages": Effect([USER], [{**USER, "content": "x"}]),
    "messages[role=user]": Effect([USER], [{**USER, "role": "system"}], PROMPT_TOO),
    "messages[role=system]": Effect([{**USER, "role": "system"}, USER], [USER], PROMPT_TOO),
    "messages[role=assistant]": Effect([USER, {"role": "assistant", "content": "No."}, USER], [USER], PROMPT_TOO),
    "messages[role=user].content[type=text].text": Effect(*(
        [{**USER, "content": [{"type": "text", "text": text}]}] for text in "ab"), PROMPT_TOO),
    "tools": Effect(FORCED["tools"][:1], FORCED["tools"][1:], {**FORCED, "tool_choice": "required"}),
    "tool_choice": Effect("required", "none", FORCED),
    "tool_choice(type=function)": Effect(*(
        {"type": "function", "function": {"name": name}} for name in ("one", "two")), FORCED),
    "tool_choice(type=allowed_tools)": Effect(*(
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
            {"type": "function", "function": {"name": name}}]}} for name in ("one", "two")), FORCED),
    "max_completion_tokens": Effect(3, 5, {"temperature": 0}),
    "logprobs": Effect(True),
    "top_logprobs": Effect(2, beside={**GREEDY, "logprobs": True}),
    "return_tokens_as_token_ids": Effect(True, beside={**GREEDY, "logprobs": True}),
    "add_generation_prompt": Effect(False),
    "continue_final_message": Effect(True, beside={
        **GREEDY, "add_generation_prompt": False, "messages": [USER, {"role": "assistant", "content": "def f("}]}),
}

RESPONSE: Json = {"temperature": 0, "max_output_tokens": 12}
FREE_RESPONSE: Json = {"temperature": 2.0, "max_output_tokens": 12, "seed": 7}
LONG_RESPONSE: Json = {"temperature": 0, "max_output_tokens": 60}
ENDLESS: Json = {"temperature": 0, "max_output_tokens": 200, "ignore_eos": True}  # so that words come twice
FORCED_RESPONSE: Json = {**LONG_RESPONSE, "tools": [
    {"type": "function", **tool["function"]} for tool in FORCED["tools"]]}
LOGPROBS: Json = {"include": ["message.output_text.logprobs"]}


def form(schema: Json) -> Json:
    """The format of a response, or of a message, that has this schema."""
    return {"type": "json_schema", "schema": schema}


def flat(effects: dict[str, Effect], beside: Json, *names: str) -> dict[str, Effect]:
    """Some members' effects, beside another body."""
    return {name: Effect(effects[name].on, effects[name].off, beside) for name in names}


RESPONSES: dict[str, Effect] = {
    **flat(GENERATION, FREE_RESPONSE, "top_p", "top_k", "min_p"),
    **flat(GENERATION, ENDLESS, "frequency_penalty", "presence_penalty", "repetition_penalty"),
    "input": Effect("a", "b", RESPONSE),
    "instructions": Effect("Be brief.", beside=RESPONSE),
    "max_output_tokens": Effect(3, 5, {"temperature": 0}),
    "temperature": Effect(1.5, 0, {"max_output_tokens": 12, "seed": 7}),
    "seed": Effect(1, 2, {"temperature": 1.0, "max_output_tokens": 12}),
    "min_tokens": Effect(12, beside={**RESPONSE, "text": {"format": {**form({"enum": ["a"]}), "name": "x"}}}),
    "ignore_eos": Effect(True, beside=LONG_RESPONSE),
    "stream": Effect(True, beside=RESPONSE),
    "text": Effect({"format": {"type": "json_object"}}, beside=RESPONSE),
    "text.format": Effect({"type": "json_object"}, {"type": "text"}, RESPONSE),
    "text.format(type=json_object)": Effect({"type": "json_object"}, beside=RESPONSE),
    "text.format(type=json_schema)": Effect({**form(SCHEMA), "name": "x"}, beside=RESPONSE),
    "tools": Effect(FORCED_RESPONSE["tools"][:1], FORCED_RESPONSE["tools"][1:],
                    {**FORCED_RESPONSE, "tool_choice": "required"}),
    "tool_choice": Effect("required", "none", FORCED_RESPONSE),
    "tool_choice(type=function)": Effect(*({"type": "function", "name": name} for name in ("one", "two")),
                                         FORCED_RESPONSE),
    "tool_choice(type=allowed_tools)": Effect(*(
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": name}]}
        for name in ("one", "two")), FORCED_RESPONSE),
    "include": Effect(LOGPROBS["include"], beside=RESPONSE),
    "top_logprobs": Effect(2, beside={**RESPONSE, **LOGPROBS}),
}

HOT: Json = {"temperature": 2.0, "max_tokens": 12}
FORCED_MESSAGE: Json = {**GREEDY, "max_tokens": 60, "tools": [
    {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in FORCED["tools"]]}
MESSAGES: dict[str, Effect] = {
    **flat(CHAT, GREEDY, "messages", "messages[role=system]", "messages[role=assistant]"),
    "messages[role=user]": Effect([USER], [{**USER, "content": "x"}]),
    "system": Effect("Be brief."),
    "system[type=text]": Effect([{"type": "text", "text": "Be brief."}]),
    "max_tokens": Effect(3, 5, {"temperature": 0}),
    "stop_sequences": Effect(["e"]),
    "stream": Effect(True),
    "temperature": Effect(0, 1.5, {"max_tokens": 24}),
    "top_p": Effect(1e-6, beside=HOT),
    "top_k": Effect(1, beside=HOT),
    "tools": Effect(FORCED_MESSAGE["tools"][:1], FORCED_MESSAGE["tools"][1:],
                    {**FORCED_MESSAGE, "tool_choice": {"type": "any"}}),
    "tool_choice": Effect({"type": "any"}, {"type": "none"}, FORCED_MESSAGE),
    "tool_choice(type=tool)": Effect(*({"type": "tool", "name": name} for name in ("one", "two")), FORCED_MESSAGE),
    "output_config.format": Effect(form(SCHEMA)),
}

OFFERED: Json = {"tools": FORCED_MESSAGE["tools"]}
COUNT_TOKENS: dict[str, Effect] = {
    **flat(MESSAGES, {}, "messages", "messages[role=system]", "messages[role=assistant]"),
    **flat(MESSAGES, {}, "system", "system[type=text]"),
    "messages[role=user]": Effect([USER, USER], [USER], {}),
    "tools": Effect(OFFERED["tools"], beside={}),
    "tool_choice": Effect({"type": "none"}, {"type": "auto"}, OFFERED),
}

EMBEDDINGS: dict[str, Effect] = {
    "input": Effect("a", "b", {}),
    "encoding_format": Effect("base64", beside={}),
    "dimensions": Effect(8, beside={}),
    "pooling": Effect("mean", "last", {"input": "import os"}),
    "normalize": Effect(False, beside={}),
    "truncate_prompt_tokens": Effect(1, beside={"input": "import os"}),
    "request_id": Effect("mine", beside={}),
}

POOLED: dict[str, Effect] = {
    "pooling": Effect("mean", "last", {}),
    "truncate_prompt_tokens": Effect(1, beside={}),
    "request_id": Effect("mine", beside={}),
}
SCORE: dict[str, Effect] = {
    **POOLED, "text_1": Effect("def f(", "return", {}), "text_2": Effect("def f(", "return", {})}
RERANK: dict[str, Effect] = {
    **POOLED,
    "query": Effect("def f(", "return", {}),
    "documents": Effect(["def f("], ["return"], {}),
    "top_n": Effect(1, beside={}),
    "return_documents": Effect(False, beside={}),
}
SAMPLE: dict[str, Effect] = {
    "prompt": Effect("a b a b", "a b", {}),
    "selector": Effect({"value": "a"}, {"value": "b"}, {}),
    "logprobs": Effect(2, beside={}),
    "request_id": Effect("mine", beside={}),
}
TOKENIZE: dict[str, Effect] = {
    "prompt": Effect("a", "b", {}),
    "messages": Effect([USER], [{**USER, "content": "x"}], {}),
    "add_generation_prompt": Effect(False, beside={"messages": [USER]}),
    "continue_final_message": Effect(True, beside={
        "add_generation_prompt": False, "messages": [USER, {"role": "assistant", "content": "def f("}]}),
    "tools": Effect(FORCED["tools"], beside={"messages": [USER]}),
    "return_token_strs": Effect(True, beside={"prompt": "x"}),
}
DETOKENIZE: dict[str, Effect] = {"tokens": Effect([60], [61], {})}
