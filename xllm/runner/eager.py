"""`EagerForward`: a step's forward pass and plain sampling, operator by operator, without waiting for the device."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from backends.backend import Backend, Capturer
from xllm.layers.adapter_slots import AdapterSlots
from xllm.models.causal_lm import CausalLM, KVCaches
from xllm.runner.batch import HostBatch, as_tensor
from xllm.runner.columns import sampling_columns
from xllm.runner.graphs import Forwarded
from xllm.runner.row_state import RowState
from xllm.runner.staging import Staging
from xllm.runner.token_feed import QueuedTokens, TokenFeed, sample_into


class EagerForward:
    """feed, staging: None where what is queued on the device is done at once."""

    def __init__(self, backend: Backend, model: CausalLM, feed: TokenFeed | None, staging: Staging | None,
                 adapters: AdapterSlots | None = None):
        self._ops, self._model, self._feed, self._staging = backend.ops, model, feed, staging
        self._adapters = adapters

    def run(self, host: HostBatch, layers: KVCaches) -> Forwarded:
        """Queue the forward pass; returns the hidden states of all places. layers: the KV caches; each is taken from
        the iterator when its layer is reached, so that it may wait for a load."""
        if self._staging is not None:
            self._staging.next_step()
        meta, ids_T, positions_T = host.metadata(self._put), self._put(host.input_ids_T), self._put(host.positions_T)
        meta.plan = self._model.plan(meta)
        if host.feed_T is not None and self._feed is not None:
            ids_T = self._ops.feed_tokens(ids_T, self._put(host.feed_T), self._feed.source)
        if host.lora_T is None or self._adapters is None:
            return Forwarded(hidden_TD=self._model.forward(ids_T, positions_T, layers, meta))
        present = [slot for slot in np.unique(host.lora_T).tolist() if slot]
        with self._adapters.used(self._put(host.lora_T), present):
            return Forwarded(hidden_TD=self._model.forward(ids_T, positions_T, layers, meta))

    def sample(self, rows: RowState, batch: HostBatch, hidden_TD: Tensor) -> QueuedTokens:
        """Queue the drawing of a token for each slot; the tokens stay on the device. For slots that want nothing more
        than a token (`samples_plainly`)."""
        assert self._feed is not None
        num_slots = batch.num_slots
        if num_slots:
            hidden_QD = hidden_TD if num_slots == len(hidden_TD) else hidden_TD[self._put(batch.hidden_Q)]
            columns = map(self._put, sampling_columns(rows, batch.rows_Q, batch.offsets_Q).values())
            sample_into(self._feed.sink[:num_slots], self._ops, self._model.compute_logits(hidden_QD), columns)
        return self._feed.queue_read(num_slots, np.arange(num_slots))

    def _put(self, array: np.ndarray) -> Tensor:
        """Queue the copy of one of the step's arrays to the device."""
        return as_tensor(array) if self._staging is None else self._staging.put(array)


def padding_batch(capturer: Capturer, num_tokens: int, block_size: int, *, has_table: bool,
                  num_past: int = 0) -> HostBatch:
    """A batch of one row of `num_tokens` tokens whose KV is stored nowhere, behind `num_past` others of any KV, for
    warming up; its last token is sampled."""
    def int32(*values: int) -> np.ndarray:
        return np.array(values, dtype=np.int32)

    places, zero = np.arange(num_past, num_past + num_tokens, dtype=np.int32), np.zeros(1, dtype=np.int64)
    num_blocks = -(-(num_past + num_tokens) // block_size) if has_table else 0
    return HostBatch(
        input_ids_T=np.zeros_like(places), feed_T=None, lora_T=None, positions_T=places,
        query_start_S1=int32(0, num_tokens), seq_lens_S=int32(num_past + num_tokens),
        table_SM=np.full((1, num_blocks), capturer.pad_block, dtype=np.int32),
        kv_base_S=None if has_table else int32(capturer.pad_block),
        slot_mapping_T=np.full_like(places, capturer.pad_slot), max_query_len=num_tokens, block_size=block_size,
        rows_Q=int32(0), steps_Q=zero, offsets_Q=zero, hidden_Q=zero + num_tokens - 1)
