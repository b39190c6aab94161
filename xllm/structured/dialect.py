"""`translate`: rewrites what schemas of pydantic, zod and OpenAPI say in keywords that llguidance honours alike."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
Refer = Callable[[str], Any]  # what a `$ref` points to

# Those that llguidance enforces. JSON Schema 2020-12 (7.2.1) has every other format as an annotation.
FORMATS = frozenset({"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"})
ANNOTATIONS = frozenset({"title", "description", "examples", "default", "deprecated", "$comment"})
# They are for the whole schema, wherever the rest of its root goes.
_OF_ROOT = ("$defs", "definitions", "$schema", "$id", "x-guidance")
_MAX_REFERENCES = 64  # in a chain, so that a circle of them ends. Chosen: far beyond any real schema


def translate(node: Schema, refer: Refer) -> Schema | None:
    """Change one schema in place. Where all that it says moves into an inner one, that is returned."""
    if node.get("uniqueItems") is False:
        del node["uniqueItems"]
    if isinstance(node.get("format"), str) and node["format"] not in FORMATS:
        del node["format"]
    if "propertyNames" in node and _says_nothing_of_names(node["propertyNames"]):
        del node["propertyNames"]
    _name_keys(node, refer)
    _tell_apart(node, refer)
    return _allow_null(node)


def _says_nothing_of_names(names: Any) -> bool:
    """A name is a string anyway."""
    if not isinstance(names, dict):
        return names is True
    left = {keyword: value for keyword, value in names.items() if keyword not in ANNOTATIONS}
    if isinstance(left.get("format"), str) and left["format"] not in FORMATS:
        del left["format"]
    return left in ({}, {"type": "string"})


def _name_keys(node: Schema, refer: Refer) -> None:
    """The names of a record that are listed are properties of an object that has no others."""
    names = node.get("propertyNames")
    if isinstance(names, dict) and names.keys() == {"$ref"} and isinstance(names["$ref"], str):
        names = refer(names["$ref"])
    if not isinstance(names, dict) or "properties" in node or "patternProperties" in node:
        return
    left = {keyword: value for keyword, value in names.items() if keyword not in ANNOTATIONS}
    listed = left.pop("enum", [left.pop("const")] if "const" in left else None)
    if not isinstance(listed, list) or left not in ({}, {"type": "string"}):
        return
    del node["propertyNames"]
    value = node.get("additionalProperties", True)
    node["properties"] = {name: value for name in listed if isinstance(name, str)}
    node["additionalProperties"] = False


def _tell_apart(node: Schema, refer: Refer) -> None:
    """`oneOf` whose branches have each values of their own for the discriminator's tag: `anyOf` with the tag required.
    OpenAPI 3.1 (4.8.25) and pydantic take no value without the tag, though its default leaves it out of `required`."""
    discriminator, branches = node.get("discriminator"), node.get("oneOf")
    tag = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    if not isinstance(tag, str) or not isinstance(branches, list) or "anyOf" in node:
        return
    values = [_tag_values(branch, tag, refer, _MAX_REFERENCES) for branch in branches]
    if not all(values) or any(one & other for one, other in itertools.combinations(values, 2)):
        return
    del node["oneOf"]
    node["anyOf"] = [{"allOf": [branch, {"required": [tag]}]} for branch in branches]


def _tag_values(branch: Any, tag: str, refer: Refer, num_left: int) -> set[str]:
    """JSON of all that the tag may be; empty where that is not known."""
    if not isinstance(branch, dict) or not num_left:
        return set()
    named = branch.get("properties")
    if isinstance(named, dict) and tag in named:
        return _constants(named[tag], refer, num_left)
    if isinstance(branch.get("$ref"), str):
        return _tag_values(refer(branch["$ref"]), tag, refer, num_left - 1)
    inner = branch.get("oneOf", branch.get("anyOf"))
    found = [_tag_values(one, tag, refer, num_left - 1) for one in inner] if isinstance(inner, list) else []
    return set().union(*found) if all(found) else set()


def _constants(node: Any, refer: Refer, num_left: int) -> set[str]:
    if not isinstance(node, dict) or not num_left:
        return set()
    if "const" in node:
        return {json.dumps(node["const"], sort_keys=True)}
    if isinstance(node.get("enum"), list):
        return {json.dumps(value, sort_keys=True) for value in node["enum"]}
    return _constants(refer(node["$ref"]), refer, num_left - 1) if isinstance(node.get("$ref"), str) else set()


def _allow_null(node: Schema) -> Schema | None:
    """OpenAPI 3.0's `nullable`: null beside the type, or beside all that a reference or a combination says."""
    if node.get("nullable") is not True:
        return None
    if any(keyword in node for keyword in ("$ref", "allOf", "anyOf", "oneOf")):
        inner = {keyword: node.pop(keyword) for keyword in list(node) if keyword not in (*_OF_ROOT, "nullable")}
        node["anyOf"] = [inner, {"type": "null"}]
        return inner
    types = node.get("type")
    if isinstance(types, (str, list)):
        types = types if isinstance(types, list) else [types]
        node["type"] = types if "null" in types else [*types, "null"]
    return None
