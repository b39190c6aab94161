"""`StructuredOutput`: what is refused before anything is compiled, and what crosses to the engine process."""

from __future__ import annotations

import msgspec
import pytest

from xllm import SamplingParams, StructuredOutput
from xllm.errors import RequestError
from xllm.structured.spec import MAX_CHOICES, MAX_SOURCE_BYTES


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def shared(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"a": schema, "b": schema}
    return schema


@pytest.mark.parametrize(("fields", "field"), [
    ({}, None),
    ({"json": "object", "regex": "a"}, None),
    ({"json": 1}, "json"),
    ({"json": "{"}, "json"),
    ({"json": "[]"}, "json"),
    ({"json": {"enum": [float("nan")]}}, "json"),
    ({"json": {"enum": [{1, 2}]}}, "json"),
    (lambda: {"json": nested(70)}, "json"),
    (lambda: {"json": nested(100_000)}, "json"),
    ({"json": '{"a":' * 100_000}, "json"),
    (lambda: {"json": shared(60)}, "json"),
    ({"json": {"title": "\ud800"}}, "json"),
    ({"json": {"title": "x" * MAX_SOURCE_BYTES}}, "json"),
    ({"regex": ""}, "regex"),
    ({"regex": 5}, "regex"),
    ({"regex": "x" * (MAX_SOURCE_BYTES + 1)}, "regex"),
    ({"regex": "\udc00"}, "regex"),
    ({"choice": []}, "choice"),
    ({"choice": "yes"}, "choice"),
    ({"choice": ["yes", ""]}, "choice"),
    ({"choice": [1]}, "choice"),
    ({"choice": ["x"] * (MAX_CHOICES + 1)}, "choice"),
    ({"choice": ["x" * 1000 + str(i) for i in range(MAX_CHOICES)]}, "choice"),
    ({"grammar": {}}, "grammar"),
    ({"structural_tag": []}, "structural_tag"),
], ids=lambda value: f"{value!s:.30}" if isinstance(value, dict) else None)  # the deep ones have no text
def test_what_is_refused(fields, field):
    with pytest.raises(RequestError) as caught:
        StructuredOutput(**(fields() if callable(fields) else fields))
    assert caught.value.field == field


def test_forms_of_the_same_thing_are_equal():
    schema = {"type": "object", "properties": {"ä": {"type": "integer"}}}
    assert StructuredOutput(json=schema) == StructuredOutput(json='{"type": "object", "properties": {"ä": '
                                                                  '{"type":"integer"}}}')
    assert StructuredOutput(json="object") == StructuredOutput(json=True) == StructuredOutput(json={"type": "object"})
    assert StructuredOutput(choice=["a", "b", "a"]) == StructuredOutput(choice=("a", "b"))
    assert SamplingParams(structured={"regex": "a"}) == SamplingParams(structured=StructuredOutput(regex="a"))


def test_ignore_eos_is_refused_with_it():
    with pytest.raises(RequestError) as caught:
        SamplingParams(ignore_eos=True, structured=StructuredOutput(regex="a"))
    assert caught.value.field == "ignore_eos"


@pytest.mark.parametrize("structured", [5, "object", {"jsn": "object"}, {"json": "object", "regex": "a"}])
def test_sampling_params_refuse_what_is_no_structured_output(structured):
    with pytest.raises(RequestError):
        SamplingParams(structured=structured)


@pytest.mark.parametrize("spec", [StructuredOutput(json={"type": "object"}), StructuredOutput(choice=["a", "b"]),
                                  StructuredOutput(regex="a+"), StructuredOutput(grammar='start: "a"')],
                         ids=lambda spec: spec.kind)
def test_it_crosses_to_the_engine_process(spec):
    sampling = SamplingParams(structured=spec)
    assert msgspec.msgpack.Decoder(SamplingParams).decode(msgspec.msgpack.encode(sampling)) == sampling
