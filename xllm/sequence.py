"""`SequenceState`: the state of one request in the scheduler, and the changes of status that are allowed.

Per-step counters of running sequences do not live here but in the scheduler's row table, as numpy arrays; this object
is touched only when a sequence changes state.
"""

from __future__ import annotations

import enum

import numpy as np

from xllm.request import FinishReason, Request


class Status(enum.Enum):
    """WAITING: queued. WAITING_KV: its prefix is on its way up from host memory or disk. RUNNING: owns a row.
    PREEMPTED: lost its blocks while a step that it takes part in is still running; goes back to WAITING when that
    step settles. HANDED_OVER: it goes on at another instance, which has its KV; final here. FINISHED: final."""

    WAITING = "waiting"
    WAITING_KV = "waiting_kv"
    RUNNING = "running"
    PREEMPTED = "preempted"
    HANDED_OVER = "handed_over"
    FINISHED = "finished"


ALLOWED_MOVES: dict[Status, frozenset[Status]] = {
    Status.WAITING: frozenset({Status.RUNNING, Status.WAITING_KV, Status.FINISHED}),
    Status.WAITING_KV: frozenset({Status.WAITING, Status.FINISHED}),
    Status.RUNNING: frozenset({Status.PREEMPTED, Status.WAITING, Status.HANDED_OVER, Status.FINISHED}),
    Status.PREEMPTED: frozenset({Status.WAITING, Status.FINISHED}),
    Status.HANDED_OVER: frozenset(),
    Status.FINISHED: frozenset(),
}


class SequenceState:
    """One sequence from `Scheduler.add` to its terminal output. Written by the scheduler only."""

    __slots__ = ("arrival_index", "finish_reason", "num_cached_tokens", "num_disk_tokens", "num_host_tokens",
                 "num_preemptions", "num_prompt_tokens", "num_store_tokens", "prompt_logprobs", "request", "row",
                 "status", "token_ids")

    def __init__(self, request: Request, arrival_index: int):
        self.request = request
        self.arrival_index = arrival_index
        self.status = Status.WAITING
        self.row = -1
        # All known tokens while it waits; while it runs they live in the row table.
        self.token_ids = np.asarray(request.prompt_token_ids, dtype=np.int32)
        self.num_prompt_tokens = len(self.token_ids)
        if request.generated_token_ids:
            self.token_ids = np.concatenate([self.token_ids, np.array(request.generated_token_ids, dtype=np.int32)])
        self.num_cached_tokens = 0  # prompt tokens found in the cache at first admission
        self.num_host_tokens = 0  # of those, brought up from host memory for it
        self.num_disk_tokens = 0  # and from disk
        self.num_store_tokens = 0  # and from the shared store
        self.num_preemptions = 0
        self.prompt_logprobs: list | None = None  # collected chunk by chunk; the first token has none
        self.restart_prompt_logprobs()
        self.finish_reason: FinishReason | None = None

    def restart_prompt_logprobs(self) -> None:
        """Drop the prompt log-probabilities collected so far: the first chunk is computed again."""
        self.prompt_logprobs = None if self.request.sampling.prompt_logprobs is None else [None]

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def session_key(self) -> str | None:
        """The conversation that this request is a turn of, or None. It includes the cache salt, because tenants may use
        the same session ids."""
        salt, session_id = self.request.cache_salt, self.request.session_id
        return None if session_id is None else f"{len(salt)}:{salt}:{session_id}"

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it here."""
        return not ALLOWED_MOVES[self.status]

    def move(self, status: Status) -> None:
        """Change the status; asserts that `ALLOWED_MOVES` lists the change."""
        assert status in ALLOWED_MOVES[self.status], f"{self.request_id}: {self.status} -> {status}"
        self.status = status
