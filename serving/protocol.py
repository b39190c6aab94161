"""What the HTTP process and the engine process say to each other: msgpack over one private socket each way.

Down go `Submit`, `Abort`, `Control`, `Shutdown`; up come all the others. Every message is one tagged struct, so a
decoder knows the type of what it may read and nothing else is ever constructed.
"""

from __future__ import annotations

from typing import Any

import msgspec

from serving.step_log import StepReport
from xllm.config import EngineConfig
from xllm.metrics import EngineStats
from xllm.request import OutputDelta, Request


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Requests of one HTTP call; one `Admissions` answers for all of them."""

    requests: list[Request]


class Abort(msgspec.Struct, tag=True, frozen=True):
    request_ids: list[str]


class Control(msgspec.Struct, tag=True, frozen=True):
    """Do something to the engine as a whole; one `Controlled` with the same number answers.

    action: "pause" (mode keep, abort or wait), "resume", "sleep" (level 1 or 2), "wakeup", "reset_prefix_cache",
    "load_adapter" (name, folder), "unload_adapter" (name), "state".
    """

    number: int
    action: str
    mode: str = "keep"
    level: int = 1
    name: str = ""
    folder: str = ""


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Stop now; open requests are dropped."""


class EngineState(msgspec.Struct, frozen=True):
    """paused: the mode, or None. sleep_level: 0 is awake. num_open: requests that have not ended."""

    paused: str | None = None
    sleep_level: int = 0
    num_open: int = 0
    adapters: tuple[str, ...] = ()


class Rejection(msgspec.Struct, array_like=True, frozen=True):
    request_id: str
    message: str
    field: str | None = None


class Admissions(msgspec.Struct, tag=True, frozen=True):
    """What became of submitted requests."""

    accepted: list[str]
    rejected: list[Rejection]


class Controlled(msgspec.Struct, tag=True, frozen=True):
    """What came of a `Control`. error: why nothing was done; is_state: because of the state that the engine is in,
    rather than what was asked."""

    number: int
    state: EngineState
    num_blocks: int = 0  # forgotten
    error: str | None = None
    field: str | None = None
    is_state: bool = False


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """All that one engine step produced. `admitted`: (request id, `time.monotonic()`) of those that left the queue."""

    deltas: list[OutputDelta]
    admitted: list[tuple[str, float]] = []


class Phase(msgspec.Struct, tag=True, frozen=True):
    """Start-up goes on: `share` of `name` is done."""

    name: str
    share: float


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded; these facts hold as long as the engine lives."""

    config: EngineConfig
    model_path: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    adapters: tuple[str, ...] = ()

    @property
    def max_model_len(self) -> int:
        assert self.config.model.max_model_len is not None, "the engine sends a resolved config"
        return self.config.model.max_model_len


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """`step_age_s`: how long ago the last step ended (or the work began), while there is work; else None."""

    step_age_s: float | None
    stats: EngineStats
    steps: StepReport = msgspec.field(default_factory=StepReport)


class Fatal(msgspec.Struct, tag=True, frozen=True):
    """The engine stops because of this."""

    reason: str
    user_error: bool  # a setting or a checkpoint is wrong, rather than the engine


Command = Submit | Abort | Control | Shutdown
Report = Admissions | Controlled | Outputs | Phase | Ready | Heartbeat | Fatal

_ENCODER = msgspec.msgpack.Encoder()
COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
REPORTS: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(message: Command | Report) -> bytes:
    return _ENCODER.encode(message)


def config_to_json(config: EngineConfig) -> bytes:
    return msgspec.json.encode(config)


def config_from_json(text: bytes) -> EngineConfig:
    return msgspec.json.decode(text, type=EngineConfig)


def as_builtins(value: Any) -> Any:
    """A config or stats value as plain dicts and lists."""
    return msgspec.to_builtins(value)
