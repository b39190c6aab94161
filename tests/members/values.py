"""The smallest value of a declared type, and the smallest body that has a member."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import typing_extensions

from tests.members.sdk import LISTS, MAPPINGS, Path, item_of, label_of, members_of

Json = dict[str, Any]


def smallest(kind: Any, *, last: bool = False) -> Any:
    """A value of the type; of a union or of literals the first one, or the last one: the default is seldom there."""
    choices = members_of(kind)
    if not choices:
        return None
    chosen = choices[-1 if last else 0]
    origin, inside = typing.get_origin(chosen) or chosen, typing.get_args(chosen)
    if origin is typing.Literal:
        return inside[-1 if last else 0]
    if typing_extensions.is_typeddict(chosen):
        return smallest_object(chosen)
    if origin in LISTS:
        return [smallest(inside[0], last=last)]
    if item := item_of(chosen):
        return [smallest(item)]
    if origin in MAPPINGS:
        return {"x": smallest(inside[1])} if inside else {}
    simple: dict[Any, Any] = {bool: True, int: 2, float: 1.5, str: "x"}
    return simple.get(chosen, {})


def smallest_object(kind: Any) -> dict[str, Any]:
    """With the members that are required."""
    hints = typing.get_type_hints(kind)
    label = label_of(kind)
    named = {label[0]: label[1]} if label is not None else {}
    return {name: smallest(hints[name]) for name in required(kind)} | named


def required(kind: Any) -> list[str]:
    """`__required_keys__` does not see what is declared as text, as the packages do."""
    hints = typing.get_type_hints(kind, include_extras=True)
    needed = (typing.Required, typing_extensions.Required)
    optional = (typing.NotRequired, typing_extensions.NotRequired)
    return [name for name, hint in hints.items()
            if typing.get_origin(hint) in needed or (kind.__total__ and typing.get_origin(hint) not in optional)]


@dataclass(frozen=True)
class Made:
    """How bodies are made of paths, where their types do not say all.

    base: a body that is answered. company: by the path of an object, what it must have besides. beside: by a member of
    the body, what the body must have besides. instead: by path, the value to send instead of the smallest one.
    """

    base: Json
    company: Mapping[str, Json] = field(default_factory=dict)
    beside: Mapping[str, Json] = field(default_factory=dict)
    instead: Mapping[str, Any] = field(default_factory=dict)


def body_with(path: Path, paths: Mapping[str, Path], made: Made) -> Json:
    """The base with the smallest value of the path's type at the path, within the smallest objects around it."""
    value = made.instead.get(path.text, smallest(path.kind, last=True))
    while path.owner:
        step, owner = path.text.removeprefix(path.owner), paths[path.owner]
        if step.startswith("."):
            holder = next(kind for kind in members_of(owner.kind) if typing_extensions.is_typeddict(kind))
            value = smallest_object(holder) | made.company.get(owner.text, {}) | {step[1:]: value}
        elif step.startswith("["):
            value = [value]
        elif step.startswith("{"):
            value = {"x": value}
        path = owner
    before = made.base.get(path.text)
    if isinstance(before, list) and isinstance(value, list):
        value = [*before, *value]
    return {**made.base, **made.beside.get(path.text, {}), path.text: value}
