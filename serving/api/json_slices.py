"""Writes answers that are too large to be made at once slice by slice; the event loop runs between the slices.

`Slices` and `Items` stand for a JSON array in a dict; what is in them is made when its turn comes and is dropped once
it is written.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from fastapi.responses import Response

from serving.api.sse import MadeWhileSent, escape_line_ends

SLICE_VALUES = 256  # that are made and encoded without a pause: about half a millisecond's work
PART_BYTES = 2**15  # that are sent together. Chosen: few system calls, little memory
# Of an answer that is made before it is sent: clients like to know its length. Chosen: bounds the memory of one.
WHOLE_BYTES = 2**24

_PLAIN = frozenset({str, int, float, bool, type(None), list})  # most values, told at once


class Slices:
    """An array of plain values, made a list at a time. Read once."""

    def __init__(self, slices: Iterable[Sequence[Any]]):
        self.slices = slices


class Items:
    """An array of values that may hold `Slices`, made one at a time. Read once."""

    def __init__(self, items: Iterable[Any]):
        self.items = items


class Sliced(dict[str, Any]):
    """An event or a body that holds `Slices` or `Items`: it is written in parts."""


def sliced(values: Sequence[Any], width: int = 1) -> Iterator[Sequence[Any]]:
    """Cut the values into slices. width: how many plain values each stands for."""
    step = max(1, SLICE_VALUES // max(1, width))
    return (values[start : start + step] for start in range(0, len(values), step))


def json_pieces(value: Any) -> Iterator[bytes]:
    """The JSON of a value in pieces, each of which takes little time to make."""
    if isinstance(value, Slices):
        encoded = (msgspec.json.encode(values)[1:-1] for values in value.slices)
        yield from _array([piece] for piece in encoded if piece)
    elif isinstance(value, Items):
        yield from _array(map(json_pieces, value.items))
    elif isinstance(value, Mapping):
        mark, encode, plain = b"{", msgspec.json.encode, dict[str, Any]()
        for name, member in value.items():
            if _is_plain(member):
                plain[name] = member
                continue
            if plain:
                yield mark + encode(plain)[1:-1]
                mark, plain = b",", {}
            yield mark + encode(name) + b":"
            yield from json_pieces(member)
            mark = b","
        if plain:
            yield mark + encode(plain)[1:-1]
        yield b"}" if value else b"{}"
    else:
        yield msgspec.json.encode(value)


def _is_plain(value: Any) -> bool:
    """Whether it holds nothing that is to be written slice by slice."""
    if type(value) in _PLAIN:
        return True
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return not isinstance(value, (Slices, Items))


def _array(members: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    mark = b"["
    for member in members:
        yield mark
        yield from member
        mark = b","
    yield b"[]" if mark == b"[" else b"]"


async def parts(content: Any) -> AsyncGenerator[bytes, None]:
    """The JSON of `content` in parts of PART_BYTES or more; the event loop runs between them."""
    pending, num_bytes = list[bytes](), 0
    for piece in json_pieces(content):
        pending.append(piece)
        num_bytes += len(piece)
        if num_bytes >= PART_BYTES:
            yield b"".join(pending)
            pending, num_bytes = [], 0
            await asyncio.sleep(0)
    yield b"".join(pending)


async def event_parts(content: Any) -> AsyncGenerator[bytes, None]:
    """`sse.event` for what may be large."""
    yield b"data: "
    async for part in parts(content):
        yield escape_line_ends(part)
    yield b"\n\n"


async def sliced_response(content: Any) -> Response:
    """A response with `content`. Up to WHOLE_BYTES its length is sent; a larger one is made while it is sent."""
    made, ready, num_bytes = parts(content), list[bytes](), 0
    async for part in made:
        ready.append(part)
        num_bytes += len(part)
        if num_bytes > WHOLE_BYTES:
            return _SlicedResponse(_again(ready, made))
    return Response(b"".join(ready), media_type="application/json")


async def _again(ready: list[bytes], made: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """What was made already, then the rest."""
    async with contextlib.aclosing(made):
        while ready:
            yield ready.pop(0)
        async for part in made:
            yield part


class _SlicedResponse(MadeWhileSent):
    media_type = "application/json"
