"""What an instance's gate and a `RemoteClient` say to each other: one frame a message.

A greeting says which protocol it is of, in a form that no later protocol changes, so that two that do not understand
each other say so. Then commands go up (`command_codec.py:COMMANDS`) with signs of life between them; answers come down.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import zmq

from xllm.client.command_codec import COMMANDS, Codec
from xllm.engine.commands import CacheChanges, Command, Controlled, Expected, Outputs, Refused
from xllm.engine.facts import EngineFacts
from xllm.engine.step_log import StepReport
from xllm.stats import EngineStats

PROTOCOL = 3  # raised when either end would misread what the other one says
# Greetings: a letter, then the protocol's number (4 bytes, big-endian), then what that protocol says. A farewell: a
# letter and the reason, in UTF-8.
HELLO, WELCOME, GOODBYE = b"H", b"W", b"G"
_HEAD_BYTES = 5  # of a greeting: letter and number

_NUMBER_BYTES = 4  # behind the frames from the gate

BEAT_S = 0.5  # between signs of life, both ways. Chosen: one that is gone is noticed within a second
# Of the connection itself, so that one whose other end has vanished is closed. Chosen, as between nodes, milliseconds.
_IVL_MS, _TIMEOUT_MS = 1000, 6000
# Messages that may wait for an end that does not read. Chosen: steps of a minute on a slow device, of a second on a
# fast one; what they may hold is bounded in bytes as well.
MAX_WAITING_FRAMES = 4096
UNCHECKED = ""  # the fingerprint of a model that is known by its name alone: it goes with any other of that name
G = TypeVar("G")


@dataclass(frozen=True, slots=True)
class Hello:
    """name: what the instance's log calls who connects."""

    name: str


@dataclass(frozen=True, slots=True)
class Condition:
    """How an instance is: its sign of life. clock_s: its `time.monotonic()`, which all its times are on. silent_s:
    `WatchedEngine.silent_for_s` there. draining: it takes no more requests and is about to end."""

    clock_s: float
    silent_s: float
    stats: EngineStats
    steps: StepReport = field(default_factory=StepReport)
    adapters: tuple[str, ...] = ()
    adapter_digests: tuple[str, ...] = ()
    sleep_level: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class ServedModel:
    """names: which requests may use, the first is shown. fingerprint: of the checkpoint's files and of the settings
    that change what it answers (`serving/cluster/model_fingerprint.py`); `UNCHECKED`: nobody can compute it."""

    names: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """incarnation: a random number, in hex, of this life of the engine: another one has nothing cached and no requests.
    started_unix_s: when that began. role: of `routing/roles.py:ROLES`, as the instance was started."""

    incarnation: str
    started_unix_s: float
    model: ServedModel
    facts: EngineFacts
    condition: Condition
    role: str = "DEFAULT"


@dataclass(frozen=True, slots=True)
class Lost:
    """Requests that ended because the engine that had them is gone, while the instance goes on."""

    request_ids: list[str]
    reason: str


@dataclass(frozen=True, slots=True)
class Alive:
    """A client's sign of life. num_read_bytes: what it has read in all, so that the gate knows what waits for it.
    num_sent_bytes: what it sent before, behind its greeting, so that the gate knows whether all of it has come."""

    num_read_bytes: int
    num_sent_bytes: int


GateReport = Refused | Controlled | Outputs | CacheChanges | Condition | Lost | Expected
GATE_REPORTS: Codec[GateReport] = Codec(160, Refused, Controlled, Outputs, CacheChanges, Condition, Lost, Expected)
_SIGNS: Codec[Alive] = Codec(128, Alive)
_SIGN = bytes([128])


def encode_up(message: Command | Alive) -> bytes:
    """A frame to the gate."""
    return _SIGNS.encode(message) if isinstance(message, Alive) else COMMANDS.encode(message)


def decode_up(frame: bytes) -> Command | Alive:
    """The message of a frame to the gate. Raises msgspec.DecodeError, or what the message's own checks raise."""
    return _SIGNS.decode(frame) if frame[:1] == _SIGN else COMMANDS.decode(frame)


def numbered(frame: bytes, number: int) -> bytes:
    """A frame from the gate: the how manyth behind the greeting. CURVE tells of one that was changed or comes twice,
    not of one that was taken out on its way."""
    return frame + (number % 2**32).to_bytes(_NUMBER_BYTES, "big")


def unnumbered(frame: bytes, number: int) -> bytes | None:
    """The frame again; None if it is another one than that which was to come."""
    is_that = int.from_bytes(frame[-_NUMBER_BYTES:], "big") == number % 2**32
    return frame[:-_NUMBER_BYTES] if is_that else None


def greeting(letter: bytes, content: Hello | Welcome) -> bytes:
    """A greeting of our protocol."""
    return letter + PROTOCOL.to_bytes(4, "big") + msgspec.msgpack.encode(content)


def protocol_of(frame: bytes) -> int:
    """Of a greeting."""
    return int.from_bytes(frame[1:_HEAD_BYTES], "big")


def greeted(frame: bytes, kind: type[G]) -> G:
    """What a greeting of our protocol says. Raises msgspec.DecodeError."""
    return msgspec.msgpack.decode(memoryview(frame)[_HEAD_BYTES:], type=kind)


def farewell(reason: str) -> bytes:
    """The last frame of a connection."""
    return GOODBYE + reason.encode()


def prepare(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Set what both ends set."""
    socket.set_hwm(MAX_WAITING_FRAMES)
    for option, value in ((zmq.IPV6, "[" in endpoint), (zmq.LINGER, 0), (zmq.HEARTBEAT_IVL, _IVL_MS),
                          (zmq.HEARTBEAT_TIMEOUT, _TIMEOUT_MS), (zmq.HEARTBEAT_TTL, _TIMEOUT_MS)):
        socket.setsockopt(option, value)
