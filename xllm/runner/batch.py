"""`HostBatch`: a step's inputs, gathered fresh from row state.

Letters: T tokens of the step, S rows of the step, M blocks per row, Q positions to sample from.
A row contributes `num_tokens` known tokens and behind them its drafts, adjacent and in order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backends.metadata import AttentionMetadata, HostLengths
from xllm.runner.row_state import RowState


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBatch:
    """A step's inputs in host memory, all int32, and the slots to sample: the Q places whose next token is drawn.

    table_SM has as many columns as the longest row needs; kv_base_S: None, or instead of it (`AttentionMetadata`).
    feed_T: for tokens that the host does not have yet, their places among those of the step before, and -1 for all
    others, whose ids are in input_ids_T (`OpSet.feed_tokens`); None: the host has all. lora_T: each token's adapter, 0
    for none; None: no token has one.

    Of each slot rows_Q int32: the row. The others are int64. steps_Q: its index in the plan's rows_S. offsets_Q: how
    many draft tokens stand between the row's known tokens and this place (0 for the first). hidden_Q: where its hidden
    state stands on the T axis.
    """

    input_ids_T: np.ndarray
    feed_T: np.ndarray | None
    lora_T: np.ndarray | None
    positions_T: np.ndarray
    query_start_S1: np.ndarray
    seq_lens_S: np.ndarray
    table_SM: np.ndarray
    kv_base_S: np.ndarray | None
    slot_mapping_T: np.ndarray
    max_query_len: int
    block_size: int
    rows_Q: np.ndarray
    steps_Q: np.ndarray
    offsets_Q: np.ndarray
    hidden_Q: np.ndarray

    @classmethod
    def empty(cls, block_size: int, *, has_table: bool) -> HostBatch:
        """A batch without rows. A graph that is filled with it computes padding alone."""
        none, indices = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        return cls(input_ids_T=none, feed_T=None, lora_T=None, positions_T=none,
                   query_start_S1=np.zeros(1, dtype=np.int32), seq_lens_S=none,
                   table_SM=np.zeros((0, 0), dtype=np.int32), kv_base_S=None if has_table else none,
                   slot_mapping_T=none, max_query_len=1, block_size=block_size,
                   rows_Q=none, steps_Q=indices, offsets_Q=indices, hidden_Q=indices)

    def digest(self) -> int:
        """crc32 of token ids, positions and lengths: the same on all ranks that share a model."""
        found = 0
        for array in (self.input_ids_T, self.positions_T, self.seq_lens_S):
            found = zlib.crc32(array.tobytes(), found)
        return found

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids_T)

    @property
    def num_slots(self) -> int:
        return len(self.rows_Q)

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens_S)

    def metadata(self, put: Callable[[np.ndarray], Tensor]) -> AttentionMetadata:
        """For the attention ops, its tensors made by `put`."""
        return AttentionMetadata(
            query_start_S1=put(self.query_start_S1),
            seq_lens_S=put(self.seq_lens_S),
            block_table_SM=put(self.table_SM),
            slot_mapping_T=put(self.slot_mapping_T),
            max_query_len=self.max_query_len,
            max_seq_len=int(self.seq_lens_S.max()),
            num_tokens=self.num_tokens,
            block_size=self.block_size,
            kv_base_S=None if self.kv_base_S is None else put(self.kv_base_S),
            host=HostLengths(self.query_start_S1, self.seq_lens_S),
        )


def gather_batch(rows: RowState, rows_S: np.ndarray, num_tokens_S: np.ndarray, num_drafts_S: np.ndarray,
                 samples_S: np.ndarray, kv_base_S: np.ndarray | None = None, *, fed: bool = False) -> HostBatch:
    """Gather one step. Drafts must stand in `rows.token_ids` behind the known tokens already.

    fed: the tokens of the step before are still on the device (`RowState.fed_from`); there are no drafts then.

    kv_base_S: int32, where the rows' blocks follow each other in the caches; None: they lie as their tables say.
    """
    num_queries_S = num_tokens_S + num_drafts_S
    query_start_S1 = np.zeros(len(rows_S) + 1, dtype=np.int32)
    np.cumsum(num_queries_S, out=query_start_S1[1:])
    num_tokens, max_query_len = int(query_start_S1[-1]), int(num_queries_S.max())
    seq_lens_S = rows.num_computed[rows_S] + num_queries_S
    _check(rows, rows_S, num_tokens_S, seq_lens_S, samples_S)

    if max_query_len == 1:
        row_T, position_T = rows_S, rows.num_computed[rows_S]
    else:
        row_T = np.repeat(rows_S, num_queries_S)
        position_T = np.repeat(seq_lens_S - query_start_S1[1:], num_queries_S) + np.arange(num_tokens, dtype=np.int32)
    if kv_base_S is None:
        block_T = rows.block_table[row_T, position_T // rows.block_size]
        table_SM = rows.block_table[rows_S, : -(-int(seq_lens_S.max()) // rows.block_size)]
    else:
        base_T = kv_base_S if max_query_len == 1 else np.repeat(kv_base_S, num_queries_S)
        block_T = base_T + position_T // rows.block_size
        table_SM = np.zeros((len(rows_S), 0), dtype=np.int32)
    steps_Q, offsets_Q, hidden_Q = _sample_slots(query_start_S1, num_drafts_S, samples_S)
    return HostBatch(
        input_ids_T=rows.token_ids[row_T, position_T],
        feed_T=_feed(rows.fed_from[rows_S], query_start_S1, samples_S) if fed else None,
        lora_T=_spread(rows.lora_slot[rows_S], num_queries_S),
        positions_T=position_T,
        query_start_S1=query_start_S1,
        seq_lens_S=seq_lens_S,
        table_SM=table_SM,
        kv_base_S=kv_base_S,
        slot_mapping_T=block_T * np.int32(rows.block_size) + position_T % rows.block_size,
        max_query_len=max_query_len,
        block_size=rows.block_size,
        rows_Q=rows_S[steps_Q],
        steps_Q=steps_Q,
        offsets_Q=offsets_Q,
        hidden_Q=hidden_Q,
    )


def _feed(fed_from_S: np.ndarray, query_start_S1: np.ndarray, samples_S: np.ndarray) -> np.ndarray:
    """Places in the step before of each token that is still on the device, [T]; only a sampling row's last known token
    can be."""
    feed_T = np.full(query_start_S1[-1], -1, dtype=np.int32)
    feed_T[query_start_S1[1:][samples_S] - 1] = fed_from_S[samples_S]
    return feed_T


def _spread(lora_S: np.ndarray, num_queries_S: np.ndarray) -> np.ndarray | None:
    """Each token's adapter, [T], from its row's; None if no row has one."""
    return np.repeat(lora_S, num_queries_S) if lora_S.any() else None


def _sample_slots(query_start_S1: np.ndarray, num_drafts_S: np.ndarray,
                  samples_S: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The last known token of each sampling row, and each draft behind it: steps_Q, offsets_Q and hidden_Q of
    `HostBatch`."""
    sampling = np.flatnonzero(samples_S)
    num_slots = num_drafts_S[sampling] + 1
    steps_Q = np.repeat(sampling, num_slots)
    ends = np.cumsum(num_slots)
    offsets_Q = np.arange(len(steps_Q)) - np.repeat(ends - num_slots, num_slots)
    hidden_Q = query_start_S1[steps_Q + 1] - 1 - num_drafts_S[steps_Q] + offsets_Q
    return steps_Q, offsets_Q, hidden_Q.astype(np.int64)


def _check(rows: RowState, rows_S: np.ndarray, num_tokens_S: np.ndarray, seq_lens_S: np.ndarray,
           samples_S: np.ndarray) -> None:
    """Assert that plan and row state agree; if they do not, scheduler or runner has a bug."""
    assert (seq_lens_S <= rows.num_blocks[rows_S] * rows.block_size).all(), "a row lacks blocks for this step"
    known_S = rows.num_tokens[rows_S]
    reached_S = rows.num_computed[rows_S] + num_tokens_S
    assert (reached_S <= known_S).all(), "the plan runs past a row's known tokens"
    assert ((reached_S == known_S) == samples_S).all(), "the plan samples in the wrong rows"


def as_tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor in host memory, without a copy where numpy's memory can be used."""
    return torch.from_numpy(np.ascontiguousarray(array))
