"""`ToolSet`: the functions that a request offers, with the names and types of their parameters, for parsers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

_KIND_OF = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number",
            type(None): "null"}
_SPELLINGS = {"str": "string", "text": "string", "int": "integer", "float": "number", "bool": "boolean",
              "dict": "object", "list": "array"}
_ANY_KIND = frozenset(_KIND_OF.values())
_MAX_UNION_DEPTH = 8  # of nested anyOf and the like in a parameter's schema. Chosen: beyond it any type is assumed


class ToolSet:
    """Names and parameter types of functions. Immutable.

    functions: `function` objects of the request's tools: `name`, and `parameters` as a JSON schema.
    """

    def __init__(self, functions: Iterable[Mapping[str, Any]]):
        self._functions = {function["name"]: function.get("parameters") or {} for function in functions}

    def knows(self, name: str) -> bool:
        return name in self._functions

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._functions)

    def parameters(self, function: str) -> tuple[str, ...]:
        """The names of the parameters that the function's schema lists."""
        properties = self._functions.get(function, {}).get("properties")
        return tuple(properties) if isinstance(properties, dict) else ()

    def is_text(self, function: str, parameter: str) -> bool:
        """Whether the parameter is a string and nothing else, so that its value can be passed on as it comes."""
        return self._kinds(function, parameter) == {"string"}

    def as_json(self, function: str, parameter: str, value: str) -> str:
        """A value that was written as bare text, as the JSON that the parameter's schema asks for."""
        kinds = self._kinds(function, parameter)
        if kinds != {"string"}:
            found = _json_value(value.strip())
            if found is not None and _fits(found[0], kinds):
                return found[1]
        return json.dumps(value, ensure_ascii=False)

    def _kinds(self, function: str, parameter: str) -> frozenset[str]:
        properties = self._functions.get(function, {}).get("properties")
        schema = properties.get(parameter) if isinstance(properties, dict) else None
        return _kinds(schema, 0) if isinstance(schema, dict) else _ANY_KIND


def _kinds(schema: Any, depth: int) -> frozenset[str]:
    """The JSON types that a schema allows; all of them where it does not say."""
    if not isinstance(schema, dict) or depth > _MAX_UNION_DEPTH:
        return _ANY_KIND
    declared = schema.get("type")
    if isinstance(declared, str):
        declared = [declared]
    if isinstance(declared, list) and declared:
        found = frozenset(_SPELLINGS.get(kind, kind) for kind in declared if isinstance(kind, str))
        return found & _ANY_KIND or _ANY_KIND
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return frozenset(_KIND_OF.get(type(value), "object") for value in schema["enum"])
    if "const" in schema:
        return frozenset((_KIND_OF.get(type(schema["const"]), "object"),))
    for union in ("anyOf", "oneOf"):
        if isinstance(schema.get(union), list) and schema[union]:
            return frozenset().union(*(_kinds(member, depth + 1) for member in schema[union]))
    return _ANY_KIND


def _fits(value: Any, kinds: frozenset[str]) -> bool:
    kind = _KIND_OF[type(value)]
    return (kind in kinds and kind != "string") or (kind == "integer" and "number" in kinds)


def _json_value(text: str) -> tuple[Any, str] | None:
    """(value, its JSON); Python's words for true, false and null are read as well."""
    text = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    try:
        return json.loads(text, parse_constant=_refuse), text
    except (ValueError, RecursionError):
        return None


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")
