"""Worker messages as bytes: one byte for the type, then msgpack. Only the types of `messages.py` are ever made."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import msgspec
import numpy as np

from xllm.worker.inline import Wire
from xllm.worker.messages import Command, Report

KINDS: tuple[type, ...] = (*get_args(Command), *get_args(Report))
_TAGS = {kind: bytes([tag]) for tag, kind in enumerate(KINDS)}
_NUMBERS = "iufb"  # kinds of numpy's types that arrays may have


def _pack_array(value: object) -> object:
    """(type, shape, bytes) of an array; what msgspec does not know beside arrays is a bug."""
    assert isinstance(value, np.ndarray), f"{type(value).__name__} cannot be sent"
    return value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes()


def _unpack_array(kind: type, value: Any) -> object:
    assert kind is np.ndarray, kind
    name, shape, data = value
    dtype = np.dtype(name)
    if dtype.kind not in _NUMBERS:
        raise ValueError(f"an array of {name}")
    return np.frombuffer(data, dtype=dtype).reshape(shape).copy()


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_pack_array)


@cache
def _decoder(tag: int) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(KINDS[tag], dec_hook=_unpack_array)


def encode(message: Command | Report) -> bytes:
    """The message as bytes."""
    return _TAGS[type(message)] + _ENCODER.encode(message)


def decode(frame: bytes | memoryview) -> Any:
    """The message again, a `Command` or a `Report`. Raises ValueError if the bytes are none."""
    view = memoryview(frame)
    if not len(view) or view[0] >= len(KINDS):
        raise ValueError("a message of an unknown type")
    return _decoder(view[0]).decode(view[1:])


CODED = Wire(down=lambda command: decode(encode(command)), up=lambda report: decode(encode(report)))
