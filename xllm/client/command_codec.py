"""Encodes commands and reports as bytes: a byte that names the type of the message, then its fields as msgpack.

A decoder knows the types that it may read; nothing else is ever constructed.
"""

from __future__ import annotations

import dataclasses
import operator
from array import array
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from xllm.client.reports import Fatal, Heartbeat, Ready, Report, StartPhase
from xllm.config import EngineConfig
from xllm.engine.commands import (
    Abort,
    CacheChanges,
    Command,
    Control,
    Controlled,
    Depart,
    Expect,
    Expected,
    Outputs,
    Refused,
    Shutdown,
    Submit,
    Unexpect,
)
from xllm.errors import RequestError
from xllm.request import Request
from xllm.shared_params import SharedParams, read_shared, share, without
from xllm.token_ids import TYPE, token_array

M = TypeVar("M")
_SUBMIT = b"\x00"


def _decoded(decoder: msgspec.msgpack.Decoder[M], frame: bytes) -> M:
    """What stands behind the first byte. Raises msgspec.DecodeError."""
    try:
        return decoder.decode(memoryview(frame)[1:])
    except UnicodeDecodeError as error:  # msgspec lets it through
        raise msgspec.DecodeError(f"text that is no UTF-8: {error}") from None


class Codec(Generic[M]):
    """For the messages of one direction; `first` is the byte of the first of their kinds."""

    def __init__(self, first: int, *kinds: type[M]):
        self._first = first
        self._encoder = msgspec.msgpack.Encoder()
        self._marks = {kind: bytes([first + index]) for index, kind in enumerate(kinds)}
        self._decoders = [msgspec.msgpack.Decoder(kind) for kind in kinds]

    def encode(self, message: M) -> bytes:
        """The message as one frame."""
        return self._marks[type(message)] + self._encoder.encode(message)

    def decode(self, frame: bytes) -> M:
        """The message of a frame. Raises msgspec.DecodeError (which a ValidationError is) for anything but a frame of
        one of the kinds."""
        index = frame[0] - self._first if frame else -1
        if not 0 <= index < len(self._decoders):
            raise msgspec.DecodeError("no such message")
        return _decoded(self._decoders[index], frame)


if TYPE_CHECKING:
    _RequestHead = Any
else:
    _RequestHead = without(Request, "_RequestHead", ("prompt_token_ids", "sampling"), prompt=int, variant=int)
_HEAD_FIELDS = tuple(f.name for f in dataclasses.fields(Request) if f.name not in ("prompt_token_ids", "sampling"))


_head_of = operator.attrgetter(*_HEAD_FIELDS)


@dataclasses.dataclass(frozen=True, slots=True)
class _PackedExpect:
    """An `Expect`, whose request is written as in a `Submit`."""

    number: int
    lease_s: float
    submit: bytes


class _CommandCodec:
    """As `Codec`, for commands. A `Submit` is three lists: prompts (bytes of int32) and sampling parameters, each
    written once, and the requests, which refer to them."""

    def __init__(self) -> None:
        self._codec: Codec[Any] = Codec(1, Abort, Control, Shutdown, _PackedExpect, Depart, Unexpect)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(tuple[list[bytes], SharedParams, list[_RequestHead]])

    def encode(self, command: Command) -> bytes:
        """One frame."""
        if isinstance(command, Expect):
            return self._codec.encode(_PackedExpect(command.number, command.lease_s,
                                                    self.encode(Submit([command.request]))))
        if not isinstance(command, Submit):
            return self._codec.encode(command)
        places, prompts, heads = dict[int, int](), list[bytes](), []
        params, variants = share([request.sampling for request in command.requests])
        for request, variant in zip(command.requests, variants, strict=True):
            prompt = request.prompt_token_ids
            if (place := places.get(id(prompt))) is None:
                place = places[id(prompt)] = len(prompts)
                prompts.append(token_array(prompt).tobytes())
            heads.append(_RequestHead(*_head_of(request), place, variant))
        return _SUBMIT + self._encoder.encode((prompts, params, heads))

    def decode(self, frame: bytes) -> Command:
        """See `Codec.decode`. What requests share is one object."""
        if frame[:1] != _SUBMIT:
            found = self._codec.decode(frame)
            return self._unpack(found) if isinstance(found, _PackedExpect) else found  # type: ignore[no-any-return]
        packed, params, heads = _decoded(self._decoder, frame)
        try:
            samplings, prompts = read_shared(params), [array(TYPE, ids) for ids in packed]
            return Submit([Request(prompt_token_ids=prompts[head.prompt], sampling=samplings[head.variant],
                                   **{name: getattr(head, name) for name in _HEAD_FIELDS}) for head in heads])
        except (IndexError, ValueError, RequestError) as error:  # ValueError: bytes that are no whole ids
            raise msgspec.DecodeError(f"no set of requests: {error}") from None

    def _unpack(self, packed: _PackedExpect) -> Expect:
        submit = self.decode(packed.submit) if packed.submit[:1] == _SUBMIT else None
        if not isinstance(submit, Submit) or len(submit.requests) != 1:
            raise msgspec.DecodeError("KV is expected of one request")
        return Expect(packed.number, submit.requests[0], packed.lease_s)


COMMANDS = _CommandCodec()
REPORTS: Codec[Report] = Codec(64, Refused, Controlled, Outputs, StartPhase, Ready, Heartbeat, Fatal, CacheChanges,
                              Expected)


def config_to_json(config: EngineConfig) -> bytes:
    """The config as one line of JSON."""
    return msgspec.json.encode(config)


def config_from_json(text: bytes) -> EngineConfig:
    """The config again. Raises msgspec.DecodeError."""
    return msgspec.json.decode(text, type=EngineConfig)
