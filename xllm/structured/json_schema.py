"""Finds mistakes in a JSON schema that llguidance does not: what it accepts but cannot or should not honour.

llguidance finds by itself what it does not know and most of what no value fulfils. It does not find values that contain
themselves without end, or names that run out (llguidance#265).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from xllm.structured.dialect import Schema, translate
from xllm.structured.ecma import rust_pattern
from xllm.structured.regexes import RegexError, check_regex

# Whether an object with these names, and no others but those of these patterns, has room for one more.
HasMoreNames = Callable[[list[str], list[str]], bool]

ONE = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else",
       "unevaluatedItems", "unevaluatedProperties")
MANY = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "dependentSchemas")
SCALARS = frozenset({"string", "number", "integer", "boolean", "null"})
TYPES = SCALARS | {"object", "array"}
# Of older drafts. llguidance takes them for annotations, so the schema would be honoured without them, in silence.
FOREIGN = {"divisibleBy": "multipleOf says it", "extends": "allOf says it", "disallow": "it cannot be honoured"}


class SchemaError(ValueError):
    """What is wrong, with the JSON pointer to it."""


def prepared(schema: Schema, has_more_names: HasMoreNames | None = None) -> Schema:
    """A copy of the schema as llguidance must be given it; checked if has_more_names is given. Raises SchemaError."""
    schema = copy.deepcopy(schema)
    nodes = list(reachable(schema))
    for pointer, node in nodes:
        _check_dialect(pointer, node)
    for pointer, node in nodes[:]:
        if (inner := translate(node, lambda reference: referred(schema, reference))) is not None:
            nodes.append((pointer, inner))
    if has_more_names is not None:
        for pointer, node in nodes:
            _check_node(pointer, node, has_more_names)
        for pointer in _endless(schema, nodes):
            raise _error(pointer, "a value of this form contains another one of it, without end")
    for pointer, node in nodes:
        _rewrite(pointer, node)
    return schema


def reachable(root: Schema) -> Iterator[tuple[str, Schema]]:
    """Every schema that a value may meet, each once, with a pointer to it."""
    waiting: list[tuple[str, Any]] = [("", root)]
    seen: set[int] = set()
    while waiting:
        pointer, node = waiting.pop()
        if not isinstance(node, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        yield pointer, node
        waiting += _children(pointer, node)
        reference = node.get("$ref")
        if isinstance(reference, str):
            waiting.append((reference.removeprefix("#"), referred(root, reference)))


def _children(pointer: str, node: Schema) -> Iterator[tuple[str, Any]]:
    for keyword in ONE:
        if isinstance(node.get(keyword), dict):
            yield f"{pointer}/{keyword}", node[keyword]
    for keyword in MANY:
        if isinstance(node.get(keyword), list):
            yield from ((f"{pointer}/{keyword}/{index}", child) for index, child in enumerate(node[keyword]))
    for keyword in NAMED:
        if isinstance(node.get(keyword), dict):
            yield from ((f"{pointer}/{keyword}/{_escaped(name)}", child) for name, child in node[keyword].items())


def referred(root: Schema, reference: str) -> Any:
    """What a local reference points to; None if it is no JSON pointer or there is nothing."""
    if not reference.startswith("#"):
        return None
    node: Any = root
    for part in unquote(reference[1:]).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(part)
        else:
            node = node[int(part)] if isinstance(node, list) and part.isdecimal() and int(part) < len(node) else None
    return node if reference[1:2] in ("", "/") else None


def _check_dialect(pointer: str, node: Schema) -> None:
    """Refuse what other drafts and OpenAPI say without effect here."""
    for keyword, instead in FOREIGN.items():
        if node.get(keyword):
            raise _error(f"{pointer}/{keyword}", f"it is no keyword of JSON Schema any more: {instead}")
    if node.get("required") is True:
        raise _error(f"{pointer}/required", "it must be a list of names, beside properties; true is of draft 3")
    for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
        if node.get(keyword) is True:
            raise _error(f"{pointer}/{keyword}", "it must be a number; true is of draft 4")
    if node.get("nullable") is True and "type" not in node and ("enum" in node or "const" in node):
        raise _error(f"{pointer}/nullable", "it has no effect without a type beside it; null belongs among the values")


def _check_node(pointer: str, node: Schema, has_more_names: HasMoreNames) -> None:
    required = node.get("required")
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    least = node.get("minProperties")
    if isinstance(least, int) and least > len(names) + 1:
        raise _error(f"{pointer}/minProperties", f"more than the {len(names)} required names and another one cannot be "
                     "promised, since a name may come twice")
    patterns = node.get("patternProperties")
    if isinstance(patterns, dict) and patterns and _is_never(node.get("additionalProperties")):
        known = node.get("properties")
        names |= set(known) if isinstance(known, dict) else set()
        for pattern in patterns:
            _regex(f"{pointer}/patternProperties/{_escaped(pattern)}", pattern, rust_pattern)
        allowed = [pattern for pattern, child in patterns.items() if not _is_never(child)]
        if names and allowed and not has_more_names(sorted(names), allowed):
            raise _error(f"{pointer}/patternProperties", "it matches no names but those of properties and required; "
                         "what it says of them belongs there")


def _is_never(node: Any) -> bool:
    return node is False


def _rewrite(pointer: str, node: Schema) -> None:
    """Give its patterns the form that llguidance honours. Raises SchemaError."""
    pattern, patterns, guidance = node.get("pattern"), node.get("patternProperties"), node.get("x-guidance")
    if isinstance(pattern, str):
        node["pattern"] = _regex(f"{pointer}/pattern", pattern, rust_pattern)
    if isinstance(patterns, dict):
        node["patternProperties"] = {
            _regex(f"{pointer}/patternProperties/{_escaped(name)}", name, rust_pattern): child
            for name, child in patterns.items()}
    if isinstance(guidance, dict) and isinstance(guidance.get("whitespace_pattern"), str):
        _regex(f"{pointer}/x-guidance/whitespace_pattern", guidance["whitespace_pattern"], check_regex)


def _regex(pointer: str, pattern: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(pattern)
    except RegexError as error:
        raise _error(pointer, str(error)) from None


def _endless(root: Schema, nodes: list[tuple[str, Schema]]) -> list[str]:
    """Pointers to schemas none of whose values ends. What no value fulfils for another reason counts as ending."""
    endings = _Endings(root)
    while True:
        before, endings.visited = endings.num_known, set()
        endless = [pointer for pointer, node in nodes if not endings.look(node, TYPES)]
        if endings.num_known == before:
            return endless


class _Endings:
    """Which schemas have a value that ends: the least fixed point, in which whatever contains itself does not.

    visited: in this pass; a schema that is met again counts as what is known of it.
    """

    def __init__(self, root: Schema):
        self.visited: set[tuple[int, frozenset[str]]] = set()
        self._root = root
        self._known: set[tuple[int, frozenset[str]]] = set()

    @property
    def num_known(self) -> int:
        return len(self._known)

    def look(self, node: Any, types: frozenset[str]) -> bool:
        """types: those that a value may have for what stands around the schema."""
        if not isinstance(node, dict):
            return True
        own = node.get("type")
        if isinstance(own, (str, list)):
            types = types & frozenset([own] if isinstance(own, str) else map(str, own))
        key = id(node), types
        if key in self._known:
            return True
        if key in self.visited:
            return False
        self.visited.add(key)
        if self._ends(node, types):
            self._known.add(key)
        return key in self._known

    def _ends(self, node: Schema, types: frozenset[str]) -> bool:
        if "const" in node or "enum" in node:
            return True
        reference = node.get("$ref")
        if isinstance(reference, str) and not self.look(referred(self._root, reference), types):
            return False
        if not all(self.look(child, types) for child in _listed(node, "allOf")):
            return False
        for keyword in ("anyOf", "oneOf"):
            choices = _listed(node, keyword)
            if choices and not any(self.look(child, types) for child in choices):
                return False
        return not types or bool(types & SCALARS) or self._object_ends(node, types) or self._array_ends(node, types)

    def _object_ends(self, node: Schema, types: frozenset[str]) -> bool:
        known = node.get("properties")
        known = known if isinstance(known, dict) else {}
        others = node.get("additionalProperties")
        return "object" in types and all(self.look(known.get(name, others), TYPES)
                                         for name in _listed(node, "required") if isinstance(name, str))

    def _array_ends(self, node: Schema, types: frozenset[str]) -> bool:
        least, items = node.get("minItems"), node.get("items")
        least = least if isinstance(least, int) else 0
        first = items if isinstance(items, list) else _listed(node, "prefixItems")
        others = node.get("additionalItems") if isinstance(items, list) else items
        needed = [*first[:least], *([others] if least > len(first) else [])]
        return "array" in types and all(self.look(child, TYPES) for child in needed)


def _listed(node: Schema, keyword: str) -> list[Any]:
    found = node.get(keyword)
    return found if isinstance(found, list) else []


def _escaped(name: str) -> str:
    return re.sub("[~/]", lambda found: "~0" if found[0] == "~" else "~1", name)[:64]


def _error(pointer: str, reason: str) -> SchemaError:
    return SchemaError(f"{pointer or 'the schema'}: {reason}")
