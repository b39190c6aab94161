"""A schema is refused with the place, or every output that is drawn from its masks ends and is valid."""

from __future__ import annotations

import json
import os
import random
import time

import jsonschema
import numpy as np
import pytest

from tests.structured.schema_shapes import HONOURED, REFUSED, products
from xllm import StructuredOutput
from xllm.errors import RequestError
from xllm.structured.form_check import check_form
from xllm.structured.grammar import build_matcher, grammar_text
from xllm.structured.grammar_probe import DeadEnds

NUM_SEEDS, MAX_TOKENS = 32, 150
SEEDS_OF_A_PRODUCT = 4 if os.environ.get("HOSTILE_ALL") == "1" else 2
CHECK_CPU_S = 0.3  # a few times what a check takes; the walks alone may take 0.03


@pytest.fixture(scope="module")
def vocabulary(source):
    return source.build()


@pytest.fixture(scope="module")
def token_bytes(source):
    return np.array([bytes.fromhex(token) for token in source.token_bytes], object)


@pytest.fixture(scope="module")
def dead_ends():
    return DeadEnds()


class Writer:
    """Draws outputs of a schema from its masks, over the bundled model's byte-level tokens."""

    def __init__(self, vocabulary, token_bytes: np.ndarray, schema: dict):
        self._matcher = build_matcher(vocabulary, grammar_text(StructuredOutput(json=schema)))
        self._ends, self._bytes = vocabulary.eos_tokens, token_bytes
        self._closes = np.isin(token_bytes, [b'"', b"}", b"]", b",", b":"])  # of each token

    def write(self, seed: int) -> str | None:
        """An output; None if it has not ended after MAX_TOKENS."""
        matcher, chooser, text = self._matcher.deep_copy(), random.Random(seed), b""
        for _ in range(MAX_TOKENS):
            if matcher.is_stopped():
                return text.decode()
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
            assert not matcher.is_error() and allowed.size, f"a dead end behind {text!r}: {matcher.get_error()}"
            others = allowed[~np.isin(allowed, self._ends)]
            if not others.size or (others.size < allowed.size and chooser.random() < 0.5):
                return text.decode()
            # Short texts, so that most of them end: what closes is drawn as often as all the rest together.
            closing = others[self._closes[others]]
            token_id = int(chooser.choice(closing if closing.size and chooser.random() < 0.5 else others))
            assert matcher.consume_token(token_id)
            text += self._bytes[token_id]
        return None


def valid(text: str, schema: dict) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))


@pytest.mark.parametrize("schema", HONOURED.values(), ids=HONOURED)
def test_what_is_honoured_ends_and_is_valid(vocabulary, token_bytes, dead_ends, schema):
    check_form(StructuredOutput(json=schema), dead_ends)
    writer = Writer(vocabulary, token_bytes, schema)
    texts = [text for seed in range(NUM_SEEDS) if (text := writer.write(seed)) is not None]
    assert len(texts) > NUM_SEEDS // 3
    assert [text for text in texts if not valid(text, schema)] == []


@pytest.mark.parametrize(("schema", "place"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_names_its_place(checker, schema, place):
    with pytest.raises(RequestError) as caught:
        checker.check(StructuredOutput(json=schema))
    assert str(caught.value).startswith(f"json: {place or ''}")


PRODUCTS = products()


@pytest.mark.parametrize("others", ["open", "allowed", "closed", "integers", "dead"])
def test_names_of_patterns_beside_known_ones(vocabulary, token_bytes, dead_ends, others):
    """llguidance#265: names that a pattern allows, but that are all taken."""
    refused, honoured = {}, 0
    for name, schema in PRODUCTS.items():
        if name.split("-")[1] != others:
            continue
        try:
            check_form(StructuredOutput(json=schema), dead_ends)
        except ValueError as error:
            refused[name] = str(error)
            continue
        honoured += 1
        writer = Writer(vocabulary, token_bytes, schema)
        texts = [text for seed in range(SEEDS_OF_A_PRODUCT) if (text := writer.write(seed)) is not None]
        assert all(valid(text, schema) for text in texts), name
    assert honoured > (10 if others in ("closed", "dead") else 50)
    if others in ("closed", "dead"):
        taken = [name for name, reason in refused.items() if "matches no names" in reason or "dead end" in reason]
        assert {f"one-{others}-none-foo", f"one-{others}-known-foo", f"two-{others}-both-none",
                f"two-{others}-both-foo-bar"} <= set(taken)
        assert all(name.split("-")[0] in ("one", "two") for name in taken)
    else:
        assert not refused


def test_a_check_is_soon_done(dead_ends):
    schemas = [*HONOURED.values(), {"type": "object"}, PRODUCTS["any-open-none-none"],
               {"type": "object", "properties": {f"name{i}": {"type": "string"} for i in range(100)}}]
    slow = {}
    for schema in schemas:
        began_s = time.thread_time()
        check_form(StructuredOutput(json=schema), dead_ends)
        if (spent_s := time.thread_time() - began_s) > CHECK_CPU_S:
            slow[json.dumps(schema)] = spent_s
    assert not slow


NULLABLE = {
    "type": {"type": "boolean", "nullable": True},
    "types": {"type": ["boolean"], "nullable": True},
    "reference": {"$defs": {"b": {"type": "boolean"}}, "$ref": "#/$defs/b", "nullable": True},
    "all-of": {"$defs": {"b": {"type": "boolean"}}, "allOf": [{"$ref": "#/$defs/b"}], "nullable": True},
    "any-of": {"anyOf": [{"const": True}, {"const": False}], "nullable": True},
}


@pytest.mark.parametrize("schema", NULLABLE.values(), ids=NULLABLE)
def test_nullable_is_honoured(vocabulary, token_bytes, dead_ends, schema):
    """OpenAPI 3.0's keyword, which JSON Schema does not know."""
    check_form(StructuredOutput(json=schema), dead_ends)
    writer = Writer(vocabulary, token_bytes, schema)
    assert {writer.write(seed) for seed in range(NUM_SEEDS)} == {"true", "false", "null"}


def test_what_is_in_a_nullable_part_is_checked(dead_ends):
    schema = {"anyOf": [{"type": "string", "pattern": "^a**$"}], "nullable": True}
    with pytest.raises(ValueError, match=r"^/anyOf/0/pattern: position 3"):
        check_form(StructuredOutput(json=schema), dead_ends)


def test_a_long_chain_of_references_is_followed(dead_ends):
    links = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}, "minItems": 1} for i in range(60)}
    ending, endless = {"$defs": {**links, "d60": {"type": "null"}}}, {"$defs": {**links, "d60": {"$ref": "#/$defs/d0"}}}
    check_form(StructuredOutput(json={**ending, "$ref": "#/$defs/d0"}), dead_ends)
    with pytest.raises(ValueError, match="without end"):
        check_form(StructuredOutput(json={**endless, "$ref": "#/$defs/d0"}), dead_ends)


def test_no_refusal_names_a_switch_of_llguidance(checker):
    schema = {"oneOf": [{"type": "object"}, {"properties": {"a": {"const": 1}}}]}
    for form in ({"json": schema}, {"grammar": f"start: %json {json.dumps(schema)}"}):
        with pytest.raises(RequestError, match="say anyOf, or tell them apart") as caught:
            checker.check(StructuredOutput(**form))
        assert "coerce" not in str(caught.value)


@pytest.mark.parametrize(("tag", "reason"), [
    ({"structures": [{"begin": "<a>", "schema": {"type": "string", "pattern": "a**"}}], "triggers": ["<a"]},
     "structures.0.schema: /pattern: position 2"),
    ({"structures": [{"begin": "<a>"}, {"begin": "<ab>", "schema": REFUSED["names-run-out"][0]}], "triggers": ["<a"]},
     "structures.1.schema: /patternProperties"),
    ({"structures": [{"begin": "<a>"}], "triggers": ["<a"], "at_least_one": True}, "has no 'at_least_one'"),
    ({"structures": [{"begin": "<a>", "strict": True}], "triggers": ["<a"]}, "has no 'strict'"),
], ids=["pattern", "names", "switch", "member"])
def test_structures_of_a_tag_are_checked_as_well(checker, tag, reason):
    with pytest.raises(RequestError, match=reason):
        checker.check(StructuredOutput(structural_tag=tag, after="</think>"))
