"""JSON schemas, one a shape: those that must be honoured, those that must be refused, and products of keywords."""

from __future__ import annotations

import itertools
from typing import Any

Schema = dict[str, Any]

INTEGER, STRING = {"type": "integer"}, {"type": "string"}
DEAD = {"type": "string", "pattern": "^a{5}$", "maxLength": 2}  # no text is of it


def closed(**properties: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def node(**inside: Any) -> Schema:
    """A schema that may refer to itself."""
    return {"$defs": {"n": inside}, "$ref": "#/$defs/n"}


SELF = {"$ref": "#/$defs/n"}
OBJECT = {"type": "object"}
ARRAY = {"type": "array"}

HONOURED: dict[str, Schema] = {
    "one-name-at-least": {**OBJECT, "properties": {"a": INTEGER}, "additionalProperties": False, "minProperties": 1,
                          "required": ["a"]},
    "open-one-name-at-least": {**OBJECT, "additionalProperties": INTEGER, "minProperties": 1},
    "required-and-another": {**OBJECT, "additionalProperties": INTEGER, "required": ["a"], "minProperties": 2},
    "one-name-at-most": {**OBJECT, "additionalProperties": INTEGER, "maxProperties": 1},
    "no-name": {**OBJECT, "maxProperties": 0},
    "patterned-names": {**OBJECT, "patternProperties": {"^[ab]$": INTEGER}, "additionalProperties": False,
                        "minProperties": 1},
    "no-quote": {"type": "string", "pattern": '^[^"]{2}$'},
    "no-backslash": {"type": "string", "pattern": r"^[^\\]{2}$"},
    "no-markup": {"type": "string", "pattern": '^[^<>"]{1,2}$'},
    "control-characters": {"type": "string", "pattern": r"^[\x00-\x1f]$"},
    "names-without-quote": {**OBJECT, "patternProperties": {'^[^"]{1,2}$': INTEGER}, "additionalProperties": False,
                            "minProperties": 1},
    "space": {"type": "string", "pattern": r"^\s$"},
    "quotes-and-slashes": {"type": "string", "pattern": r'^["/\\]{2}$'},
    "lazy": {"type": "string", "pattern": "^a*?b??$"},
    "count": {"type": "string", "pattern": "^(ab){2}$"},
    "pattern-and-length": {"type": "string", "pattern": "^a*$", "minLength": 2, "maxLength": 3},
    "two-patterns": {"allOf": [{"type": "string", "pattern": "^a"}, {"pattern": "b$"}, {"maxLength": 4}]},
    "unanchored": {"type": "string", "pattern": "x", "maxLength": 3},
    "empty-text": {"type": "string", "maxLength": 0},
    "mail": {"type": "string", "format": "email", "maxLength": 6},
    "tuple": {**ARRAY, "prefixItems": [INTEGER, {"type": "boolean"}], "items": False},
    "dead-second-of-a-tuple": {**ARRAY, "prefixItems": [INTEGER, False]},
    "only-the-empty-list": {**ARRAY, "items": False},
    "list-of-dead-ones": {**ARRAY, "items": DEAD},
    "dead-choice": {"anyOf": [DEAD, INTEGER]},
    "dead-property": {**OBJECT, "properties": {"a": DEAD, "b": INTEGER}, "additionalProperties": False},
    "dead-others": {**OBJECT, "additionalProperties": DEAD},
    "dead-patterned": {**OBJECT, "patternProperties": {"^a": DEAD}, "additionalProperties": False},
    "forbidden-property": {**OBJECT, "properties": {"a": False, "b": INTEGER}, "additionalProperties": False},
    "dead-inside": closed(x={**ARRAY, "items": closed(y=DEAD)}),
    "range-of-both": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 7}]},
    "values-of-both": {"allOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]},
    "objects-of-both": {"allOf": [closed(a=INTEGER) | {"additionalProperties": True}, {**OBJECT, "properties": {
        "b": INTEGER}, "required": ["b"]}]},
    "overlapping-choices": {"anyOf": [INTEGER, {"type": "number"}]},
    "objects-that-begin-alike": {"anyOf": [closed(a=INTEGER), closed(a={"type": "boolean"}, b=INTEGER)]},
    "told-apart": {"oneOf": [closed(k={"const": "x"}, v=INTEGER), closed(k={"const": "y"}, v={"type": "null"})]},
    "values-of-the-type": {"type": "integer", "enum": ["a", 3]},
    "values-of-the-length": {"type": "string", "enum": ["abc", "a"], "maxLength": 2},
    "whole-numbers-between": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 5},
    "one-number": {"type": "number", "minimum": 5, "maximum": 5},
    "cents": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 1},
    "list-of-itself": node(**ARRAY, items=SELF),
    "itself-or-null": node(**closed(c={"anyOf": [SELF, {"type": "null"}]})),
    "itself-if-it-likes": node(**OBJECT, properties={"c": SELF}, additionalProperties=False),
    "reference-and-more": {"$defs": {"n": INTEGER}, "$ref": "#/$defs/n", "minimum": 0, "maximum": 3},
    "unused-and-endless": {"$defs": {"n": closed(c=SELF)}, **INTEGER},
    "annotated": {**INTEGER, "title": "t", "description": "d", "default": 3, "examples": [1], "deprecated": True},
    "types": {"type": ["integer", "null"]},
    "format-for-people": closed(x={**STRING, "format": "colour", "maxLength": 3}, y={"format": "int32", "enum": [1]}),
    "items-alike": {**ARRAY, "items": INTEGER, "uniqueItems": False},
    "names-are-texts": {**OBJECT, "propertyNames": {"type": "string", "title": "N"}, "additionalProperties": INTEGER},
    "any-names": {**OBJECT, "propertyNames": True, "additionalProperties": INTEGER},
    "listed-names": {**OBJECT, "propertyNames": {"type": "string", "enum": ["a", "b"]},
                     "additionalProperties": INTEGER},
    "braces": {"type": "string", "pattern": "^{[a-c]+}$"},
    "tagged-by-default": {"$defs": {
        "a": {**OBJECT, "properties": {"k": {"const": "a", "default": "a"}, "x": INTEGER}, "required": ["x"],
              "additionalProperties": False},
        "b": {**OBJECT, "properties": {"k": {"enum": ["b", "c"]}, "y": INTEGER}, "additionalProperties": False}},
        "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "discriminator": {"propertyName": "k"}},
}

# The place that the refusal names; None: it says what is wrong of the whole, or of a part that has no place of its own.
REFUSED: dict[str, tuple[Schema, str | None]] = {
    "names-run-out": ({**OBJECT, "properties": {"a": INTEGER}, "patternProperties": {"^a$": {}},
                       "additionalProperties": False}, "/patternProperties"),
    "names-run-out-inside": (closed(x={**ARRAY, "items": {
        **OBJECT, "required": ["a", "b"], "patternProperties": {"^[ab]$": INTEGER}, "additionalProperties": False}}),
        "/properties/x/items/patternProperties"),
    "names-run-out-together": ({"allOf": [{**OBJECT, "properties": {"a": INTEGER}},
                                          {**OBJECT, "patternProperties": {"^a$": {}}, "additionalProperties": False}]},
                               None),
    "two-of-any-name": ({**OBJECT, "minProperties": 2}, "/minProperties"),
    "three-of-patterned-names": ({**OBJECT, "patternProperties": {"^[abc]$": INTEGER}, "additionalProperties": False,
                                  "minProperties": 3}, "/minProperties"),
    "names-of-a-form": ({**OBJECT, "propertyNames": {"maxLength": 3}}, None),
    "more-required-than-allowed": ({**closed(a=INTEGER, b=INTEGER), "maxProperties": 1}, None),
    "required-but-not-there": ({**OBJECT, "required": ["a"], "additionalProperties": False}, None),
    "required-but-dead": ({**OBJECT, "required": ["a"], "additionalProperties": DEAD}, None),
    "required-but-forbidden": (closed(x=closed(a=False)), "/properties/x"),
    "more-items-than-there-are": ({**ARRAY, "prefixItems": [INTEGER], "items": False, "minItems": 2}, None),
    "old-tuple-with-too-few": ({**ARRAY, "items": [INTEGER], "additionalItems": False, "minItems": 2}, None),
    "more-items-than-allowed": (closed(x={**ARRAY, "minItems": 2, "maxItems": 1}), "/properties/x"),
    "dead-items": ({**ARRAY, "items": DEAD, "minItems": 1}, None),
    "different-items": ({**ARRAY, "uniqueItems": True}, None),
    "an-item-of": ({**ARRAY, "contains": INTEGER}, None),
    "no-choice": ({"anyOf": []}, None),
    "no-value": ({"enum": []}, None),
    "all-choices-forbidden": ({"oneOf": [False, False]}, None),
    "exactly-one-of-two-alike": (closed(x={"oneOf": [INTEGER, {"type": "number"}]}), "/properties/x"),
    "two-types": ({"allOf": [INTEGER, STRING]}, None),
    "two-beginnings": ({"allOf": [{"type": "string", "pattern": "^a"}, {"pattern": "^b"}]}, None),
    "two-ranges": ({"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 3}]}, None),
    "closed-to-each-other": ({"allOf": [closed(a=INTEGER), closed(b=INTEGER)]}, None),
    "empty-range": (closed(x={"type": "integer", "minimum": 5, "maximum": 3}), "/properties/x"),
    "no-whole-number": ({"type": "integer", "minimum": 3.2, "maximum": 3.8}, None),
    "no-multiple": ({"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 6}, None),
    "pattern-too-long": ({"type": "string", "pattern": "^a{5}$", "maxLength": 3}, None),
    "format-too-long": ({"type": "string", "format": "date", "maxLength": 4}, None),
    "value-of-another-type": ({"type": "integer", "const": "x"}, None),
    "values-of-another-type": ({"type": "integer", "enum": ["a"]}, None),
    "value-out-of-range": ({"type": "integer", "const": 5, "maximum": 3}, None),
    "value-without-a-required-name": ({"type": "object", "const": {"a": 1}, "required": ["b"]}, None),
    "never-ends": (node(**OBJECT, properties={"c": SELF}, required=["c"]), "the schema"),
    "never-ends-in-a-list": (node(**ARRAY, items=SELF, minItems=1), "the schema"),
    "never-ends-in-a-tuple": (node(**ARRAY, prefixItems=[SELF], minItems=1), "the schema"),
    "neither-ends": (node(anyOf=[closed(c=SELF), {**ARRAY, "items": SELF, "minItems": 1}]), "the schema"),
    "both-never-end": ({"$defs": {"a": closed(b={"$ref": "#/$defs/b"}), "b": closed(a={"$ref": "#/$defs/a"})},
                        "$ref": "#/$defs/a"}, "the schema"),
    "never-ends-beside-a-type": (node(**OBJECT, allOf=[{"properties": {"c": SELF}, "required": ["c"]}]), "the schema"),
    "a-property-never-ends": ({"$defs": {"n": closed(c=SELF)}, **OBJECT, "properties": {"x": SELF}}, "/properties/x"),
    "a-choice-never-ends": ({"$defs": {"n": closed(c=SELF)}, "anyOf": [INTEGER, SELF]}, "/anyOf/1"),
    "leads-nowhere": ({"$ref": "#/$defs/nowhere"}, None),
    "repeated-repetition": (closed(x={"type": "string", "pattern": "^a**$"}), "/properties/x/pattern: position 3"),
    "repeated-repetition-in-a-name": ({**OBJECT, "patternProperties": {"^a+*$": {}}},
                                      "/patternProperties/^a+*$: position 3"),
    "empty-class": ({"type": "string", "pattern": "^[]$"}, "/pattern: the regular expression '^[]$'"),
    "look-ahead": ({"type": "string", "pattern": "^(?=a).*$"}, "/pattern: position 1"),
    "back-reference": ({"type": "string", "pattern": r"^(a)\1$"}, "/pattern: position 4"),
    "repeated-blanks": ({"type": "integer", "x-guidance": {"whitespace_pattern": " **"}},
                        "/x-guidance/whitespace_pattern: position 2"),
    "older-draft": ({"type": "integer", "divisibleBy": 3}, "/divisibleBy"),
    "required-of-draft-3": (closed(x={**STRING, "required": True}), "/properties/x/required"),
    "exclusive-of-draft-4": ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, "/exclusiveMinimum"),
    "nullable-without-a-type": (closed(x={"enum": ["a"], "nullable": True}), "/properties/x/nullable"),
    "tags-alike": (closed(x={"oneOf": [closed(k={"const": "x"}), closed(k={"enum": ["y", "x"]})],
                             "discriminator": {"propertyName": "k"}}), "/properties/x: oneOf: a value may be of two"),
    "no-tags": (closed(x={"oneOf": [OBJECT, {**OBJECT, "properties": {"k": {"const": "y"}}}],
                          "discriminator": {"propertyName": "k"}}), "/properties/x: oneOf: a value may be of two"),
    "not": (closed(x={"not": STRING}), "/properties/x"),
    "condition": ({"if": INTEGER, "then": INTEGER}, None),
}

_PATTERNS = {"one": "^foo$", "two": "^(foo|bar)$", "begin": "^f", "any": ".*", "word": "^[a-z]+$", "other": "^ü$"}
_OTHERS = {"open": None, "allowed": True, "closed": False, "integers": INTEGER, "dead": DEAD}
_REQUIRED = {"none": [], "known": ["foo"], "both": ["foo", "bar"]}
_PROPERTIES = {"none": [], "foo": ["foo"], "foo-bar": ["foo", "bar"]}


def products() -> dict[str, Schema]:
    """patternProperties times additionalProperties times required times properties."""
    made = {}
    for pattern, others, required, properties in itertools.product(_PATTERNS, _OTHERS, _REQUIRED, _PROPERTIES):
        schema: Schema = {**OBJECT, "patternProperties": {_PATTERNS[pattern]: INTEGER},
                          "required": _REQUIRED[required],
                          "properties": dict.fromkeys(_PROPERTIES[properties], INTEGER)}
        if others != "open":
            schema["additionalProperties"] = _OTHERS[others]
        made[f"{pattern}-{others}-{required}-{properties}"] = schema
    return made
