"""What the bundled model writes under a grammar is of that form, whatever the sampler."""

from __future__ import annotations

import json
import random
import re

import jsonschema
import pytest

from xllm import LLM, RequestOutput, SamplingParams, StructuredOutput

PERSON = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 12},
                   "age": {"type": "integer", "minimum": 0, "maximum": 150}},
}
SCHEMAS = {
    "person": PERSON,
    "array": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 5}, "minItems": 2, "maxItems": 4},
    "nested": {"type": "object",
               "properties": {"one": PERSON, "two": {"type": "array", "items": PERSON, "maxItems": 1}},
               "required": ["one", "two"], "additionalProperties": False},
    "enum": {"enum": ["red", "grün", None, 3, True, "a \"quoted\" one"]},
    "const": {"const": {"a": [1, 2, {"b": None}]}},
    "any-of": {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"type": "string", "pattern": "^[a-f]{2,5}$"}]},
    "ref": {"$defs": {"point": {"type": "object", "required": ["x", "y"], "additionalProperties": False,
                                "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9},
                                               "y": {"type": "integer", "minimum": 0, "maximum": 9}}}},
            "type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1, "maxItems": 2},
    "format": {"type": "object", "required": ["day", "id"], "additionalProperties": False,
               "properties": {"day": {"type": "string", "format": "date"}, "id": {"type": "string", "format": "uuid"}}},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 700},
    "optional": {"type": "object", "properties": {name: {"type": "boolean"} for name in "abcd"}, "required": ["b"],
                 "additionalProperties": False},
}
SAMPLERS = {"greedy": {"temperature": 0}, "seeded": {"temperature": 1.3, "seed": 7},
            "truncated": {"temperature": 0.8, "top_k": 5, "seed": 1}, "penalised": {"temperature": 0,
                                                                                     "repetition_penalty": 1.3}}
PROMPTS = ["def f(x):\n", "A person: "]


def run(llm: LLM, spec: StructuredOutput | list[StructuredOutput], prompts=PROMPTS, *, max_tokens=200,
        **sampling) -> list[RequestOutput]:
    specs = spec if isinstance(spec, list) else [spec] * len(prompts)
    params = [SamplingParams(structured=one, max_tokens=max_tokens, **sampling) for one in specs]
    return llm.generate(prompts, params, use_tqdm=False)


def texts(outputs: list[RequestOutput]) -> list[str]:
    assert {o.outputs[0].finish_reason for o in outputs} == {"stop"}
    return [o.outputs[0].text for o in outputs]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_json_is_valid(llm, schema, sampler):
    for text in texts(run(llm, StructuredOutput(json=schema), **SAMPLERS[sampler])):
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def test_any_object(llm):
    sampling = {"temperature": 1.0, "repetition_penalty": 1.2}
    outputs = [o for seed in range(8) for o in run(llm, StructuredOutput(json="object"), seed=seed, **sampling)]
    ended = [o.outputs[0].text for o in outputs if o.outputs[0].finish_reason == "stop"]
    assert len(ended) > 4
    assert all(isinstance(json.loads(text), dict) for text in ended)
    assert all(o.outputs[0].text.lstrip().startswith("{") for o in outputs)


@pytest.mark.parametrize("regex", [r"[0-9]{3}-[a-z]{4}", r"(yes|no)( and (yes|no)){2}", r"[A-ZÄÖÜ][a-zäöü]{2,9}",
                                   r"日本[0-9]", r"\{\"a\": \d\}", r"x{40}", r"(\w+ ){3}end\.", r"[^\x00-\x7f]{1,3}"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_regex_matches(llm, regex, sampler):
    outputs = run(llm, StructuredOutput(regex=regex), **SAMPLERS[sampler])
    for output in outputs:
        text, reason = output.outputs[0].text, output.outputs[0].finish_reason
        assert reason == "length" or re.fullmatch(regex, text), text
    assert sum(o.outputs[0].finish_reason == "stop" for o in outputs) or r"\w+" in regex


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_choice_is_one_of_them(llm, sampler):
    choices = ["yes", "no", "maybe so", 'a "quoted"\nline', "日本語", "yes and no", "\\d+", "🙂"]
    assert set(texts(run(llm, StructuredOutput(choice=choices), **SAMPLERS[sampler]))) <= set(choices)


@pytest.mark.parametrize("choice", ['a "quoted"\nline', "日本語", "\\d+", "🙂", " leading", "trailing ", "\t",
                                    "é" * 30])
def test_a_lone_choice_is_written_as_it_stands(llm, choice):
    assert texts(run(llm, StructuredOutput(choice=[choice]), temperature=0)) == [choice, choice]


def test_grammar_is_followed(llm):
    lark = 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,3}/'
    gbnf = 'root ::= "[" item ("," item){2} "]"\nitem ::= [a-c] [0-9]'
    for seed in range(6):
        for text in texts(run(llm, StructuredOutput(grammar=lark), temperature=2.0, seed=seed)):
            depth = text.count("(")
            assert re.fullmatch(rf"\({{{depth}}}\d{{1,3}}\){{{depth}}}", text)
        for text in texts(run(llm, StructuredOutput(grammar=gbnf), temperature=2.0, seed=seed)):
            assert re.fullmatch(r"\[[a-c]\d,[a-c]\d,[a-c]\d\]", text)


def test_structural_tag_binds_what_follows_its_trigger(llm):
    tag = {"structures": [{"begin": "self.", "schema": {"enum": [17]}, "end": ";"}], "triggers": ["self."]}
    prompt = "class A:\n    def f(self):\n        return"
    free = run(llm, StructuredOutput(regex=r"(.|\n)*"), [prompt], temperature=0, max_tokens=40)[0].outputs[0].text
    bound = run(llm, StructuredOutput(structural_tag=tag), [prompt], temperature=0, max_tokens=40)[0].outputs[0].text
    assert "self." in free and "self.17;" not in free
    assert bound.startswith(free[:free.index("self.")])
    assert bound.count("self.") == bound.count("self.17;") > 0


@pytest.mark.parametrize("form", [{"json": PERSON}, {"regex": "[0-9]{3}"}, {"choice": ["yes", "no"]},
                                  {"grammar": 'start: "(" ("x" | "y") ")"'}], ids=lambda form: next(iter(form)))
def test_free_text_comes_first_where_that_is_asked(llm, form):
    ended = 0
    for seed in range(4):
        output = run(llm, StructuredOutput(after="return", **form), ["class A:\n    def f("], temperature=0.3,
                     seed=seed, max_tokens=100)[0].outputs[0]
        head, found, body = output.text.partition("return")
        if output.finish_reason == "length":
            assert not found
            continue
        ended += 1
        assert head
        body = body.removeprefix("\n").removeprefix("\n")
        if "json" in form:
            jsonschema.validate(json.loads(body), PERSON)
        else:
            assert re.fullmatch(r"[0-9]{3}|yes|no|\([xy]\)", body)
    assert ended


def random_schema(chooser: random.Random, depth: int = 0) -> dict:
    """Small enough that a few dozen tokens write one."""
    kind = chooser.choice(["integer", "string", "boolean", "null", "enum", "array", "object", "anyOf"][: 5 if depth > 1
                                                                                                   else 8])
    if kind == "integer":
        low = chooser.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + chooser.randint(0, 200)}
    if kind == "string":
        low = chooser.randint(0, 3)
        return chooser.choice([{"type": "string", "minLength": low, "maxLength": low + chooser.randint(0, 5)},
                               {"type": "string", "pattern": chooser.choice(["^[a-z]{1,4}$", "^\\d+\\.\\d$"])}])
    if kind == "enum":
        return {"enum": chooser.sample(["a", "bc", 1, 2.5, None, True, "ü", ["x"]], chooser.randint(1, 4))}
    if kind == "array":
        low = chooser.randint(0, 2)
        return {"type": "array", "items": random_schema(chooser, depth + 1), "minItems": low,
                "maxItems": low + chooser.randint(0, 2)}
    if kind == "object":
        names = chooser.sample(["id", "name", "x y", "ü", "list"], chooser.randint(0, 3))
        return {"type": "object", "properties": {name: random_schema(chooser, depth + 1) for name in names},
                "required": chooser.sample(names, chooser.randint(0, len(names))), "additionalProperties": False}
    if kind == "anyOf":
        return {"anyOf": [random_schema(chooser, depth + 1) for _ in range(chooser.randint(1, 3))]}
    return {"type": kind}


@pytest.mark.parametrize("block", range(4))
def test_hundreds_of_random_schemas(llm, block):
    chooser = random.Random(block)
    schemas = [random_schema(chooser) for _ in range(100)]
    specs = [StructuredOutput(json=schema) for schema in schemas]
    outputs = run(llm, specs, ["x = "] * 100, temperature=1.0, seed=block, max_tokens=120)
    ended = 0
    for schema, output in zip(schemas, outputs):
        if output.outputs[0].finish_reason == "stop":
            jsonschema.validate(json.loads(output.outputs[0].text), schema)
            ended += 1
    assert ended > 80
