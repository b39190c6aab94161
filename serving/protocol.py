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
from xllm.request import FinishReason, OutputDelta, Request, TokenLogprobs


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


class WireDelta(msgspec.Struct, array_like=True, omit_defaults=True):
    """`OutputDelta` as an array; the fields that most steps leave alone stand last and stay off the wire."""

    request_id: str
    token_ids: list[int]
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_preemptions: int = 0
    error: str | None = None
    cached_by_tier: dict[str, int] | None = None
    embedding: list[float] | None = None


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """All that one engine step produced. `admitted`: (request id, `time.monotonic()`) of those that left the queue."""

    deltas: list[WireDelta]
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


def wire_delta(delta: OutputDelta) -> WireDelta:
    return WireDelta(delta.request_id, delta.token_ids, delta.num_cached_tokens, delta.finish_reason,
                     delta.stop_reason, delta.logprobs, delta.prompt_logprobs, delta.num_preemptions, delta.error,
                     delta.cached_by_tier, delta.embedding)


def output_delta(wire: WireDelta) -> OutputDelta:
    delta = OutputDelta(wire.request_id, wire.token_ids, wire.num_cached_tokens)
    if wire.finish_reason is not None:
        delta.finish_reason, delta.stop_reason, delta.error = wire.finish_reason, wire.stop_reason, wire.error
    if wire.logprobs is not None:
        delta.logprobs = wire.logprobs
    if wire.prompt_logprobs is not None:
        delta.prompt_logprobs = wire.prompt_logprobs
    if wire.cached_by_tier is not None:
        delta.cached_by_tier = wire.cached_by_tier
    if wire.embedding is not None:
        delta.embedding = wire.embedding
    if wire.num_preemptions:
        delta.num_preemptions = wire.num_preemptions
    return delta


def config_to_json(config: EngineConfig) -> bytes:
    return msgspec.json.encode(config)


def config_from_json(text: bytes) -> EngineConfig:
    return msgspec.json.decode(text, type=EngineConfig)


def as_builtins(value: Any) -> Any:
    """A config or stats value as plain dicts and lists."""
    return msgspec.to_builtins(value)
