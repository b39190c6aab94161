"""Encodes commands and reports as bytes: a byte that names the type of the message, then its fields as msgpack.

A decoder knows the types that it may read; nothing else is ever constructed.
"""

from __future__ import annotations

import dataclasses
from array import array
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from xllm.client.reports import Fatal, Heartbeat, Ready, Report, StartPhase
from xllm.config import EngineConfig
from xllm.engine.commands import Abort, CacheChanges, Command, Control, Controlled, Outputs, Shutdown, Submit, Submitted
from xllm.errors import RequestError
from xllm.request import Request
from xllm.shared_params import ParamsWriter, SharedParams, read_shared, without
from xllm.token_ids import TYPE, token_array

M = TypeVar("M")


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
        return self._decoders[index].decode(memoryview(frame)[1:])


if TYPE_CHECKING:
    _RequestHead = Any
else:
    _RequestHead = without(Request, "_RequestHead", ("prompt_token_ids", "sampling"), prompt=int, variant=int)
_HEAD_FIELDS = tuple(f.name for f in dataclasses.fields(Request) if f.name not in ("prompt_token_ids", "sampling"))


@dataclasses.dataclass(frozen=True, slots=True)
class _PackedSubmit:
    """A `Submit` whose prompts and sampling parameters are written once; requests refer to them."""

    prompts: list[bytes]  # int32 each
    params: SharedParams
    heads: list[_RequestHead]


class _CommandCodec:
    """As `Codec`, for commands."""

    def __init__(self) -> None:
        self._codec: Codec[Any] = Codec(0, _PackedSubmit, Abort, Control, Shutdown)

    def encode(self, command: Command) -> bytes:
        """One frame."""
        return self._codec.encode(_packed(command.requests) if isinstance(command, Submit) else command)

    def decode(self, frame: bytes) -> Command:
        """See `Codec.decode`. What requests share is one object."""
        found: Any = self._codec.decode(frame)
        return Submit(_unpacked(found)) if isinstance(found, _PackedSubmit) else found


def _packed(requests: list[Request]) -> _PackedSubmit:
    params, places, prompts, heads = ParamsWriter(), dict[int, int](), list[bytes](), []
    for request in requests:
        prompt = request.prompt_token_ids
        if (place := places.get(id(prompt))) is None:
            place = places[id(prompt)] = len(prompts)
            prompts.append(token_array(prompt).tobytes())
        heads.append(_RequestHead(*(getattr(request, name) for name in _HEAD_FIELDS), place,
                                  params.add(request.sampling)))
    return _PackedSubmit(prompts, params.shared(), heads)


def _unpacked(packed: _PackedSubmit) -> list[Request]:
    try:
        samplings, prompts = read_shared(packed.params), [array(TYPE, ids) for ids in packed.prompts]
        return [Request(prompt_token_ids=prompts[head.prompt], sampling=samplings[head.variant],
                        **{name: getattr(head, name) for name in _HEAD_FIELDS}) for head in packed.heads]
    except (IndexError, ValueError, RequestError) as error:  # ValueError: bytes that are no whole ids
        raise msgspec.DecodeError(f"no set of requests: {error}") from None


COMMANDS = _CommandCodec()
REPORTS: Codec[Report] = Codec(64, Submitted, Controlled, Outputs, StartPhase, Ready, Heartbeat, Fatal, CacheChanges)


def config_to_json(config: EngineConfig) -> bytes:
    """The config as one line of JSON."""
    return msgspec.json.encode(config)


def config_from_json(text: bytes) -> EngineConfig:
    """The config again. Raises msgspec.DecodeError."""
    return msgspec.json.decode(text, type=EngineConfig)
