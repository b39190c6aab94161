"""The commands that an engine's loop takes and its answers, the same whether the loop runs in this process or
another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xllm.request import OutputDelta, Request

Action = Literal["pause", "resume", "sleep", "wakeup", "reset_prefix_cache", "load_adapter", "unload_adapter", "state"]
# At most, for storing the KV cache on disk when the engine stops. Chosen: what is not stored by then is computed again.
FLUSH_S = 10.0


@dataclass(frozen=True, slots=True)
class Submit:
    """Run requests: all of them or, if one is refused, none. One `Submitted` answers; outputs follow."""

    requests: list[Request]


@dataclass(frozen=True, slots=True)
class Abort:
    """End requests; each still gets its terminal output. Unknown ids are ignored."""

    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class Control:
    """Do something to the engine as a whole; one `Controlled` with the same number answers.

    action: "pause" (mode keep, abort or wait), "resume", "sleep" (level 1 or 2), "wakeup", "reset_prefix_cache",
    "load_adapter" (name, folder), "unload_adapter" (name), "state".
    """

    number: int
    action: Action
    mode: str = "keep"
    level: int = 1
    name: str = ""
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Stop after the step in progress; open requests are dropped. With a disk the KV cache is stored then, which takes
    up to `FLUSH_S`: a client that kills the engine if it does not end waits longer than that."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """The answer to a `Submit`. request_id: of its first request. error: why none of its requests runs; field: the
    parameter that is at fault, None where the queue is."""

    request_id: str
    error: str | None = None
    field: str | None = None


@dataclass(frozen=True, slots=True)
class EngineState:
    """paused: the mode, or None. sleep_level: 0 is awake. num_open: requests that have not ended."""

    paused: str | None = None
    sleep_level: int = 0
    num_open: int = 0
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Controlled:
    """The answer to a `Control`. error: why nothing was done; is_state: because of the state that the engine is in,
    rather than what was asked. num_blocks: KV blocks that were dropped from the prefix cache."""

    number: int
    state: EngineState
    num_blocks: int = 0
    error: str | None = None
    field: str | None = None
    is_state: bool = False


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of one step. admitted: (request id, `time.monotonic()`) of the requests that left the queue."""

    deltas: list[OutputDelta]
    admitted: list[tuple[str, float]] = field(default_factory=list)


Command = Submit | Abort | Control | Shutdown
CommandReply = Submitted | Controlled | Outputs
