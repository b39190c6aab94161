"""The commands that an engine's loop takes and its answers, the same whether the loop runs in this process or
another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xllm.kv_offer import KVOffer
from xllm.request import OutputDelta, Request

Action = Literal["pause", "resume", "sleep", "wakeup", "reset_prefix_cache", "load_adapter", "unload_adapter", "state"]
# At most, for storing the KV cache on disk when the engine stops. Chosen: what is not stored by then is computed again.
FLUSH_S = 10.0


@dataclass(frozen=True, slots=True)
class Submit:
    """Run requests: all of them, which `Outputs.taken` says, or none, which `Refused` says. Outputs follow."""

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
class Expect:
    """Make room for the KV of a request that another instance computes; one `Expected` with the same number answers.

    request: as it will be submitted later, with the answer's `landing`; its prompt and `generated_token_ids` are what
    KV is expected of. lease_s: for how long the room is kept.
    """

    number: int
    request: Request
    lease_s: float


@dataclass(frozen=True, slots=True)
class Unexpect:
    """The KV that was expected under this landing is not wanted any more: free its room, and let nobody write there.
    Blocks that have come whole stay cached. Unknown landings are ignored, and those that are over."""

    landing: int


@dataclass(frozen=True, slots=True)
class Depart:
    """Send the KV of an open request to another instance; once it is there the request ends with `HANDED_OVER`. If it
    cannot be sent the request stays. Unknown ids are ignored, and requests that are leaving already."""

    request_id: str
    offer: KVOffer


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Stop after the step in progress; open requests are dropped. With a disk the KV cache is stored then, which takes
    up to `FLUSH_S`: a client that kills the engine if it does not end waits longer than that."""


@dataclass(frozen=True, slots=True)
class Refused:
    """None of a `Submit`'s requests runs. request_id: of its first request. error: why; field: the parameter that is at
    fault, None where the queue is."""

    request_id: str
    error: str
    field: str | None = None


@dataclass(frozen=True, slots=True)
class EngineState:
    """paused: the mode, or None. sleep_level: 0 is awake. num_open: requests that have not ended."""

    paused: str | None = None
    sleep_level: int = 0
    num_open: int = 0
    adapters: tuple[str, ...] = ()
    adapter_digests: tuple[str, ...] = ()  # of their files, in the same order


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
class Expected:
    """The answer to an `Expect`. offer: None if there is no room, or nothing to send; reason: why. landing: what the
    request that comes later has as its `landing`."""

    number: int
    offer: KVOffer | None = None
    landing: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What became of requests, in one step or when they came. taken: of each `Submit` whose requests all run, the id of
    the first. admitted: (request id, `time.monotonic()`) of those that left the queue. staying: those that were to go
    on elsewhere and do not, since their KV cannot be sent."""

    deltas: list[OutputDelta] = field(default_factory=list)
    admitted: list[tuple[str, float]] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    staying: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """Which KV blocks a tier (a place in `kv/block.py:TIERS`) no longer has since the last report, and which it has
    got: their digests (`kv/block.py`), joined. It comes before the outputs of the step that changed them."""

    tier: int
    stored: bytes
    removed: bytes


Command = Submit | Abort | Control | Expect | Unexpect | Depart | Shutdown
CommandReply = Refused | Controlled | Expected | Outputs | CacheChanges
