"""Commands and reports as bytes: a byte that says which message it is, then its fields as msgpack.

A decoder knows the type of what it may read; nothing else is ever constructed.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from xllm.client.reports import Fatal, Heartbeat, Phase, Ready, Report
from xllm.config import EngineConfig
from xllm.engine.commands import Abort, Command, Control, Controlled, Outputs, Shutdown, Submit, Submitted

M = TypeVar("M")


class Codec(Generic[M]):
    """For the messages of one direction; `first` is the byte of the first of their kinds."""

    def __init__(self, first: int, *kinds: type[M]):
        self._first = first
        self._encoder = msgspec.msgpack.Encoder()
        self._marks = {kind: bytes([first + index]) for index, kind in enumerate(kinds)}
        self._decoders = [msgspec.msgpack.Decoder(kind) for kind in kinds]

    def encode(self, message: M) -> bytes:
        """One frame."""
        return self._marks[type(message)] + self._encoder.encode(message)

    def decode(self, frame: bytes) -> M:
        """Raises msgspec.DecodeError (which a ValidationError is) for anything but a frame of one of the kinds."""
        index = frame[0] - self._first if frame else -1
        if not 0 <= index < len(self._decoders):
            raise msgspec.DecodeError("no such message")
        return self._decoders[index].decode(memoryview(frame)[1:])


COMMANDS: Codec[Command] = Codec(0, Submit, Abort, Control, Shutdown)
REPORTS: Codec[Report] = Codec(64, Submitted, Controlled, Outputs, Phase, Ready, Heartbeat, Fatal)


def config_to_json(config: EngineConfig) -> bytes:
    """One line."""
    return msgspec.json.encode(config)


def config_from_json(text: bytes) -> EngineConfig:
    """Raises msgspec.DecodeError."""
    return msgspec.json.decode(text, type=EngineConfig)
