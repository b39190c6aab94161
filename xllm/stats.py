"""`EngineStats`: what an engine says about itself, as plain numbers.

Counters end in `_total` and only grow; the rest are gauges. Plain types only, so that the value can
be sent anywhere as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """One tier of the KV cache, in blocks.

    missed_total: blocks that should have been there and were not good (damaged on disk), by kind. unsaved_total:
    blocks that left this tier before they were copied further down.
    """

    num_blocks: int = 0
    num_used: int = 0
    evicted_total: int = 0
    unsaved_total: int = 0
    missed_total: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStats:
    """Moves between two tiers, one way. Seconds: `busy` while bytes moved, `wait` from the order to the end."""

    queued: int = 0
    jobs_total: int = 0
    bytes_total: int = 0
    busy_s_total: float = 0.0
    wait_s_total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphStats:
    """Captured graphs. replays: steps through one, by `GraphKey.name`. fallbacks: steps that ran eagerly although the
    device has a graph mode, by reason. fed_steps: those queued before the host knew the tokens of the one before."""

    num_graphs: int = 0
    num_bytes: int = 0
    captures_total: int = 0
    evictions_total: int = 0
    replays_total: dict[str, int] = field(default_factory=dict)
    fallbacks_total: dict[str, int] = field(default_factory=dict)
    fed_steps_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadStats:
    """CPU threads that compute: now, and at most. lowered: how often there was not a core for each of them."""

    num_threads: int = 0
    max_threads: int = 0
    lowered_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """One look at a running engine. Times are seconds; `last_step_s` is on the `time.monotonic()` clock."""

    num_running: int = 0
    num_waiting: int = 0  # wherever they wait
    num_waiting_by_reason: dict[str, int] = field(default_factory=dict)  # capacity: in the queue; kv, grammar, paused
    num_blocks: int = 0
    num_free_blocks: int = 0  # free, or holding only evictable prefixes
    kv_usage: float = 0.0  # 0 to 1
    num_steps: int = 0
    last_step_s: float = 0.0
    step_time_s: float = 0.0
    oldest_waiting_s: float = 0.0
    prompt_tokens_total: int = 0
    cached_prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    preemptions_total: int = 0
    prefix_queries_total: int = 0  # tokens looked up
    prefix_hits_total: int = 0  # tokens found
    spec_drafts_total: int = 0
    spec_draft_tokens_total: int = 0
    spec_accepted_tokens_total: int = 0
    spec_accepted_tokens_by_position_total: list[int] = field(default_factory=list)  # in the draft; empty: no drafts
    requests_finished_total: dict[str, int] = field(default_factory=dict)  # by finish reason
    swaps_total: int = 0  # preemptions whose KV was copied to host memory
    cached_tokens_by_tier_total: dict[str, int] = field(default_factory=dict)  # l1, l2: device, l3: host, l4: disk
    kv_tiers: dict[str, TierStats] = field(default_factory=dict)  # by tier: device, host, disk
    kv_lanes: dict[str, LaneStats] = field(default_factory=dict)  # by lane: save, load, write, read
    prefetched_blocks_total: dict[str, int] = field(default_factory=dict)  # right: used in time; wrong: not
    kv_disk_up: bool = False  # there is a disk tier and it has not failed
    graphs: GraphStats | None = None  # None: no graph mode
    threads: ThreadStats | None = None  # None: on an accelerator
