"""The request fields, through the real OpenAI client and a real server."""

from __future__ import annotations

import json
import re
import threading
import time

import jsonschema
import openai
import pydantic
import pytest

from tests.serving.server_process import ServerProcess

MESSAGES = [{"role": "user", "content": "Write a Python function `is_empty`."}]
OPTIONS = {"model": "demo", "temperature": 0}


class Step(pydantic.BaseModel):
    kind: str = pydantic.Field(max_length=8)
    size: int = pydantic.Field(ge=0, le=99)


class Plan(pydantic.BaseModel):
    steps: list[Step] = pydantic.Field(min_length=1, max_length=2)
    final: bool


def schema_format(schema: dict, **more) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


SCHEMA = {"type": "object", "required": ["a"], "additionalProperties": False,
          "properties": {"a": {"type": "array", "items": {"enum": [1, 22]}, "minItems": 2, "maxItems": 4}}}


def test_parse_gives_the_pydantic_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(messages=MESSAGES, response_format=Plan, **OPTIONS)
    assert isinstance(answer.choices[0].message.parsed, Plan)


def test_parsed_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(messages=MESSAGES, response_format=Plan, **OPTIONS) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Plan)
    assert sum(event.type == "content.delta" for event in events) > 3


TOGETHER = {"type": "json_object", "schema": SCHEMA}


@pytest.mark.parametrize("stream", [False, True])
def test_json_object_with_a_schema(client: openai.OpenAI, stream: bool) -> None:
    """llama.cpp's, Together's and Anyscale's way to say json_schema."""
    for seed in range(3):
        arguments = {"model": "demo", "temperature": 1.3, "seed": seed, "extra_body": {"response_format": TOGETHER}}
        if stream:
            chunks = client.completions.create(prompt="x = ", stream=True, max_tokens=60, **arguments)
            text = "".join(chunk.choices[0].text for chunk in chunks)
        else:
            text = client.chat.completions.create(messages=MESSAGES, **arguments).choices[0].message.content
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(("wish", "member"), [
    ({"type": "json_schema"}, "response_format.json_schema "),
    ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema "),
    ({"type": "json_schema", "json_schema": {"name": "x", "schema": None}}, "response_format.json_schema.schema "),
    ({"type": "json_schema", "json_schema": {"name": "x"}, "schema": SCHEMA}, "response_format.schema is unknown"),
    ({"type": "json_schema", "schema": SCHEMA}, "response_format.schema is unknown"),
    ({"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": "yes"}},
     "response_format.json_schema.strict "),
    ({"type": "json_schema", "json_schema": {"schema": SCHEMA, "name": 5}}, "response_format.json_schema.name "),
    ({"type": "json_schema", "json_schema": {"schema": SCHEMA, "description": []}},
     "response_format.json_schema.description "),
    ({"type": "json_schema", "json_schema": {"schema": SCHEMA, "shema": {}}}, "response_format.json_schema.shema "),
    ({"type": "json_object", "schema": "{}"}, "response_format.schema "),
    ({"type": "json_object", "json_schema": {"schema": SCHEMA}}, "response_format.json_schema is unknown"),
    ({"type": "json_object", "strict": True}, "response_format.strict is unknown"),
    ({"type": "text", "schema": SCHEMA}, "response_format.schema is unknown"),
    ({"type": "structural_tag", "format": {"type": "json_schema"}}, "response_format.format is unknown"),
    ({"type": ["json_object"]}, "response_format.type "),
], ids=lambda value: json.dumps(value)[:70] if isinstance(value, dict) else None)
def test_members_of_a_format_are_honoured_or_refused_by_name(server: ServerProcess, wish: dict, member: str) -> None:
    """vllm#11363: a json_schema without its schema."""
    for path, prompt in (("/v1/chat/completions", {"messages": MESSAGES}), ("/v1/completions", {"prompt": "x"})):
        response = server.http.post(path, json={**OPTIONS, **prompt, "response_format": wish})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"].startswith(member)
        assert response.json()["error"]["param"] == "response_format"


def test_what_fails_midway_by_its_own_parameters_is_not_the_server_s_fault(server: ServerProcess) -> None:
    body = {**OPTIONS, "prompt": "x", "structured_outputs": {"regex": "xy"}, "allowed_token_ids": [5]}
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 422
    assert "no token is left" in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("strict", [True, False, None])
def test_json_schema(client: openai.OpenAI, strict: bool | None) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, response_format=schema_format(SCHEMA, strict=strict),
                                            **OPTIONS)
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


def test_streamed_text_is_the_whole(client: openai.OpenAI) -> None:
    arguments = {"messages": MESSAGES, "response_format": schema_format(SCHEMA), "n": 3, "seed": 1,
                 "model": "demo", "temperature": 1.2}
    whole = client.chat.completions.create(**arguments)
    texts = [""] * 3
    for chunk in client.chat.completions.create(**arguments, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=60,
                                            logit_bias={"60": -5}, frequency_penalty=1.0, **OPTIONS)
    text = answer.choices[0].message.content
    assert text.startswith("{")
    assert answer.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict)


@pytest.mark.parametrize(("wish", "pattern"), [
    ({"regex": r"\d{3}-[a-f]{4}"}, r"\d{3}-[a-f]{4}"),
    ({"choice": ["left", "right"]}, "left|right"),
    ({"grammar": 'root ::= "go " ("north" | "south")'}, "go (north|south)"),
    ({"grammar": 'start: "go " WHERE\nWHERE: "north" | "south"'}, "go (north|south)"),
    ({"json": {"enum": [5, 6]}}, "5|6"),
    ({"json": '{"const": "x"}', "disable_any_whitespace": False}, '"x"'),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else None)
def test_structured_outputs_of_both_apis(client: openai.OpenAI, wish: dict, pattern: str) -> None:
    body = {"structured_outputs": wish}
    chat = client.chat.completions.create(messages=MESSAGES, extra_body=body, **OPTIONS)
    plain = client.completions.create(prompt=["def f(", "x = "], extra_body=body, max_tokens=20, **OPTIONS)
    for text in [chat.choices[0].message.content, *(choice.text for choice in plain.choices)]:
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(("body", "param"), [
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": []}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"shema": {}}}}, "response_format"),
    ({"response_format": schema_format({"type": "strin"})}, "response_format"),
    ({"response_format": schema_format({"$ref": "#"})}, "response_format"),
    ({"response_format": schema_format({"not": {}})}, "response_format"),
    ({"response_format": {"type": "structural_tag"}}, "response_format"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "((a{1000}){1000}){1000}"}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"regx": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "foo**"}}, "structured_outputs"),
    ({"response_format": schema_format({"type": "string", "pattern": "foo**"})}, "response_format"),
    ({"response_format": schema_format({"type": "object", "properties": {"a": {}}, "additionalProperties": False,
                                        "patternProperties": {"^a$": {}}})}, "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {
        "properties": {"a": {"type": "string", "pattern": "foo**"}}}}}], "tool_choice": "required"}, "tools"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": "b"}}, "structured_outputs"),
    ({"structured_outputs": ["a"]}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
], ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None)
def test_a_wrong_one_is_a_400_that_names_the_field(server: ServerProcess, body: dict, param: str) -> None:
    response = server.http.post("/v1/chat/completions", json={**OPTIONS, "messages": MESSAGES, **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert len(response.text) < 800


@pytest.mark.parametrize("body", [{"response_format": {"type": "text"}}, {"response_format": None},
                                  {"structured_outputs": {}}, {"structured_outputs": None},
                                  {"structured_outputs": {"json": None}}])
def test_what_asks_for_nothing_changes_nothing(server: ServerProcess, body: dict) -> None:
    answers = [server.http.post("/v1/chat/completions", json={**OPTIONS, "messages": MESSAGES, "max_tokens": 8, **more})
               for more in (body, {})]
    texts = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0] == texts[1]


def test_a_hostile_one_delays_nobody(server: ServerProcess, client: openai.OpenAI) -> None:
    ended: list[tuple[int, str, int]] = []

    def attack(number: int) -> None:
        schema = {"type": "integer", "multipleOf": 9_999_000 + number}
        answer = server.http.post("/v1/chat/completions", json={**OPTIONS, "messages": MESSAGES,
                                                                "response_format": schema_format(schema)})
        ended.append((answer.status_code, answer.json()["error"]["param"], len(answer.text)))

    attackers = [threading.Thread(target=attack, args=(number,)) for number in range(2)]
    for thread in attackers:
        thread.start()
    began_s, num_answers = time.monotonic(), 0
    while not ended:
        client.chat.completions.create(messages=MESSAGES, max_tokens=4, **OPTIONS)
        num_answers += 1
    waited_s = time.monotonic() - began_s
    for thread in attackers:
        thread.join()
    assert [each[:2] for each in ended] == [(400, "response_format")] * 2 and max(each[2] for each in ended) < 800
    assert num_answers > waited_s, "others were held up"
    server.wait_idle()
