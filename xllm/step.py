"""The messages of a step: `ScheduleOutput` goes down to the runner, `StepOutput` comes up.

Both hold plain values and numpy arrays only, never tensors, so that they can cross into another process
(`worker/message_codec.py`). Rows: every admitted sequence owns one row index until it finishes or is preempted; the
runner keeps per-row state under that index, so a plan carries only what is new.

Letters: S rows scheduled in the step, B blocks appended in the step, R tokens sampled at most per row (1 + drafts).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from xllm.pooling import PoolingParams
from xllm.request import SamplingParams, TokenLogprobs

_NO_INTS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRow:
    """A sequence that enters (or re-enters after preemption) the runner at `row`.

    `token_ids` int32: the prompt, and what had been generated before a preemption.
    `block_ids` int32: the blocks it owns so far. `num_computed_tokens`: how many of its tokens
    already have their KV there (a prefix hit).
    """

    row: int
    request_id: str
    token_ids: np.ndarray
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: np.ndarray
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    seed: int
    pooling: PoolingParams | None = None
    lora_slot: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleOutput:
    """What one step does. The order inside a step: release rows, enter new rows, replace and append
    block table entries, copy blocks, forward `rows`, sample.

    rows_S int32: the rows to run. num_tokens_S int32: how many of their known tokens to compute,
    from where the row stands (a decode row: 1, the token sampled last, which the runner knows).
    max_drafts_S int32: how many draft tokens the runner may add and verify after those.
    samples_S bool: whether the chunk reaches the row's last known token, so that a token is sampled.
    append_rows_B, append_ids_B int32: block ids to append to a row's block table, in order.
    replace_rows_C, replace_places_C, replace_ids_C int32: block table entries to overwrite; the row's own
    block there had the same contents as one that was cached before it.
    copy_src, copy_dst int32: blocks to copy before the forward pass (copy-on-write).
    tickets: loads from host memory that were open when the step was planned and that its rows or copies read: layer
    l of the forward pass waits for layer l of each (`kv/tickets.py:TicketBoard`).
    publish_ticket: of blocks that the step fills and that are sent to another instance, each layer once it is computed
    (a number of another board); 0: there are none.
    """

    step: int
    rows_S: np.ndarray
    num_tokens_S: np.ndarray
    max_drafts_S: np.ndarray
    samples_S: np.ndarray
    new_rows: tuple[NewRow, ...] = ()
    released_rows: tuple[int, ...] = ()
    append_rows_B: np.ndarray = field(default_factory=lambda: _NO_INTS)
    append_ids_B: np.ndarray = field(default_factory=lambda: _NO_INTS)
    replace_rows_C: np.ndarray = field(default_factory=lambda: _NO_INTS)
    replace_places_C: np.ndarray = field(default_factory=lambda: _NO_INTS)
    replace_ids_C: np.ndarray = field(default_factory=lambda: _NO_INTS)
    copy_src: np.ndarray = field(default_factory=lambda: _NO_INTS)
    copy_dst: np.ndarray = field(default_factory=lambda: _NO_INTS)
    tickets: tuple[int, ...] = ()
    publish_ticket: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.rows_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCheck:
    """With XLLM_CHECK=1: what a rank has computed, to be compared with the others'.

    ids: a digest of the sampled tokens. blocks_B int32: the KV blocks that became full in the step; digests_B uint64:
    of their contents, all layers.
    """

    ids: int
    blocks_B: np.ndarray
    digests_B: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one step produced, aligned with its plan's `rows_S`.

    num_sampled_S int32: tokens produced (0 where `samples_S` was False; with drafts 1 + accepted).
    token_ids_SR int32: those tokens, padded with -1. num_drafts_S int32: drafts proposed.
    logprobs / prompt_logprobs: by position in rows_S, for the rows that asked. prompt_logprobs come
    per chunk: one entry for each computed prompt token but the first, predicting the next one.
    pooled: fp32 vectors of the rows that asked for one and whose prompt ends in this step, by position.
    failed: positions where a place had no token to draw, with the reason: after the tokens before it, if none of
    them ends the request, it ends in ERROR.
    check: with XLLM_CHECK=1 only.
    """

    step: int
    num_sampled_S: np.ndarray
    token_ids_SR: np.ndarray
    num_drafts_S: np.ndarray
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    pooled: dict[int, np.ndarray] = field(default_factory=dict)
    check: StepCheck | None = None
