"""The members of request bodies as the clients' packages declare them: every path of a type, at every depth."""

from __future__ import annotations

import collections.abc
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typing_extensions

LISTS = (list, collections.abc.Iterable, collections.abc.Sequence, collections.abc.Collection)
MAPPINGS = (dict, collections.abc.Mapping)
WRAPPERS = (typing.Required, typing.NotRequired, typing_extensions.Required, typing_extensions.NotRequired,
            typing.Annotated)


@dataclass(frozen=True)
class Path:
    """text: as the tables have it. kind: the type of the value there. owner: the next path above it; "" at the top."""

    text: str
    kind: Any
    owner: str


def paths(body: Any, stops: collections.abc.Container[str] = ()) -> Iterator[Path]:
    """Every path in a body type: a TypedDict, or a union of such. What is below one of `stops` is left out, and so is
    what an object holds that stands within another one of its type."""
    seen: set[str] = set()
    for variant in members_of(body):
        for path in _fields(variant, "", (), stops):
            if path.text not in seen:
                seen.add(path.text)
                yield path


def _fields(kind: Any, owner: str, above: tuple[Any, ...], stops: collections.abc.Container[str],
            label: str | None = None) -> Iterator[Path]:
    if kind in above:  # a type within itself
        return
    for name, inner in typing.get_type_hints(kind).items():
        if name == label:
            continue
        path = Path(f"{owner}.{name}" if owner else name, inner, owner)
        yield path
        if path.text not in stops:
            yield from _below(inner, path.text, (*above, kind), stops, "()")


def _below(kind: Any, owner: str, above: tuple[Any, ...], stops: collections.abc.Container[str],
           brackets: str) -> Iterator[Path]:
    """What is within a value: of a list, a mapping, or one of several objects told apart by a member."""
    variants = members_of(kind)
    objects = [variant for variant in variants if typing_extensions.is_typeddict(variant)]
    for variant in objects:
        label = label_of(variant)
        if brackets == "()" and len(objects) == 1:
            yield from _fields(variant, owner, above, stops)
            continue
        mark = brackets if label is None else f"{brackets[0]}{label[0]}={label[1]}{brackets[1]}"
        path = Path(owner + mark, variant, owner)
        yield path
        if path.text not in stops:
            yield from _fields(variant, path.text, above, stops, None if label is None else label[0])
    for variant in variants:
        origin, inside = typing.get_origin(variant) or variant, typing.get_args(variant)
        if origin in LISTS and inside:
            yield from _below(inside[0], owner, above, stops, "[]")
        elif origin in MAPPINGS and len(inside) == 2:
            yield from _below(inside[1], owner, above, stops, "{}")
        elif item := item_of(variant):
            yield from _below(item, owner, above, stops, "[]")


def item_of(kind: Any) -> Any:
    """What a protocol of sequences (`SequenceNotStr[str]`) holds; None for other types."""
    if getattr(typing.get_origin(kind), "__name__", "") == "SequenceNotStr":
        return typing.get_args(kind)[0]
    return None


def members_of(kind: Any) -> list[Any]:
    """The types of a union, or the type alone; None and what only wraps a type left out."""
    origin = typing.get_origin(kind)
    if origin in WRAPPERS:
        return members_of(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return [found for part in typing.get_args(kind) for found in members_of(part)]
    if isinstance(kind, typing.TypeAliasType if hasattr(typing, "TypeAliasType") else ()):
        return members_of(kind.__value__)
    return [] if kind is type(None) else [kind]


def label_of(kind: Any) -> tuple[str, str] | None:
    """(member, value) that tells an object from others: a `type` or `role` with one value."""
    hints = typing.get_type_hints(kind)
    for name in ("type", "role"):
        if name in hints:
            values = [value for part in members_of(hints[name]) if typing.get_origin(part) is typing.Literal
                      for value in typing.get_args(part)]
            if len(values) == 1:
                return name, str(values[0])
    return None
