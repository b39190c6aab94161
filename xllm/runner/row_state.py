"""`RowState`: what the runner knows of every running sequence, as numpy arrays indexed by row.

It persists between steps and is never a model input itself: `HostBatch` is gathered from it each
step. The runner is its only writer.
"""

from __future__ import annotations

import numpy as np

from xllm.pooling import PoolingParams
from xllm.request import SAMPLING_COLUMNS, SamplingParams
from xllm.step import NewRow

NO_LOGPROBS = -1  # in num_logprobs: the row asked for none (0 asks for the drawn token's alone)
# Below this, dividing by the temperature may overflow fp32, and all probability is on the largest logit anyway.
MIN_TEMPERATURE = 1e-5


class RowState:
    """Structure of arrays; R is `max_num_seqs`, the axis that rows index.

    token_ids int32 [R, max_model_len + 1]: known tokens, valid below `num_tokens`; what lies behind is
    scratch (draft tokens of the running step stand there). The extra column takes the token that an
    overlapped step may still sample for a sequence that has just reached max_model_len.
    num_tokens, num_prompt_tokens, num_computed int32 [R]: known tokens, the prompt among them, and how
    many have their KV in the cache.
    block_table int32 [R, max_blocks], valid below `num_blocks`.
    columns: each [R], as `request.py:SAMPLING_COLUMNS` says. seed uint64.
    num_logprobs, num_prompt_logprobs int32: NO_LOGPROBS where the row asked for none.
    min_output_tokens int32: end tokens are forbidden before that many output tokens.
    edits_logits bool: the row's logits are changed by more than temperature and truncation.
    sampling: the full parameters by row, None where the row is free.
    pooling, pools bool: what embedding the row asked for, and whether it did.
    lora_slot int32: the adapter that the row is computed with; 0: none.
    fed_from int32: where the token buffer of the step queued last holds the row's last known token, which the host
    does not have yet (`token_feed.py`); -1: the host has it. Means nothing once that step was read.
    """

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int):
        self.max_model_len = max_model_len
        self.block_size = block_size
        max_blocks = -(-(max_model_len + 1) // block_size)
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.num_computed = np.zeros(max_num_seqs, dtype=np.int32)
        self.block_table = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self.num_blocks = np.zeros(max_num_seqs, dtype=np.int32)
        self.columns = {name: np.full(max_num_seqs, column.unused, dtype=column.dtype)
                        for name, column in SAMPLING_COLUMNS.items()}
        self.seed = np.zeros(max_num_seqs, dtype=np.uint64)
        self.num_logprobs = np.full(max_num_seqs, NO_LOGPROBS, dtype=np.int32)
        self.num_prompt_logprobs = np.full(max_num_seqs, NO_LOGPROBS, dtype=np.int32)
        self.min_output_tokens = np.zeros(max_num_seqs, dtype=np.int32)
        self.edits_logits = np.zeros(max_num_seqs, dtype=bool)
        self.sampling: list[SamplingParams | None] = [None] * max_num_seqs
        self.pooling: list[PoolingParams | None] = [None] * max_num_seqs
        self.pools = np.zeros(max_num_seqs, dtype=bool)
        self.lora_slot = np.zeros(max_num_seqs, dtype=np.int32)
        self.fed_from = np.full(max_num_seqs, -1, dtype=np.int32)

    def enter(self, new: NewRow) -> None:
        """Take in a sequence, or one that comes back after a preemption."""
        row, num_tokens, num_blocks = new.row, len(new.token_ids), len(new.block_ids)
        assert self.sampling[row] is None, f"row {row} is taken; {new.request_id} cannot enter it"
        assert 0 < num_tokens <= self.max_model_len, f"{new.request_id}: {num_tokens} tokens"
        assert 0 <= new.num_computed_tokens < num_tokens, f"{new.request_id}: nothing left to compute"
        self.token_ids[row, :num_tokens] = new.token_ids
        self.num_tokens[row] = num_tokens
        self.num_prompt_tokens[row] = new.num_prompt_tokens
        self.num_computed[row] = new.num_computed_tokens
        self.block_table[row, :num_blocks] = new.block_ids
        self.num_blocks[row] = num_blocks
        self._set_sampling(row, new.sampling, new.seed)
        self.lora_slot[row] = new.lora_slot
        self.pooling[row], self.pools[row] = new.pooling, new.pooling is not None

    def _set_sampling(self, row: int, sampling: SamplingParams, seed: int) -> None:
        self.sampling[row] = sampling
        for name, column in self.columns.items():
            column[row] = getattr(sampling, name)
        if sampling.temperature < MIN_TEMPERATURE:
            self.columns["temperature"][row] = 0.0
        self.seed[row] = seed & (2**64 - 1)
        self.num_logprobs[row] = NO_LOGPROBS if sampling.logprobs is None else sampling.logprobs
        self.num_prompt_logprobs[row] = NO_LOGPROBS if sampling.prompt_logprobs is None else sampling.prompt_logprobs
        self.min_output_tokens[row] = sampling.min_tokens
        self.edits_logits[row] = (sampling.needs_history or bool(sampling.logit_bias)
                                  or sampling.allowed_token_ids is not None or sampling.structured is not None)

    def release(self, row: int) -> None:
        """Free the row: its sequence has finished, was aborted or was preempted."""
        assert self.sampling[row] is not None, f"row {row} is free already"
        self.sampling[row] = None
        self.num_tokens[row] = self.num_computed[row] = self.num_blocks[row] = 0

    def replace_blocks(self, rows_C: np.ndarray, places_C: np.ndarray, ids_C: np.ndarray) -> None:
        """Overwrite entry `places_C` of each row's table."""
        self.block_table[rows_C, places_C] = ids_C

    def append_blocks(self, rows_B: np.ndarray, ids_B: np.ndarray) -> None:
        """Append each id to the table of the row beside it; a row may occur several times, in order."""
        if not len(rows_B):
            return
        order = np.argsort(rows_B, kind="stable")
        rows = rows_B[order]
        nth_of_row = np.arange(len(rows)) - np.searchsorted(rows, rows)
        self.block_table[rows, self.num_blocks[rows] + nth_of_row] = ids_B[order]
        np.add.at(self.num_blocks, rows_B, 1)

    def room_for_drafts(self, rows_S: np.ndarray) -> np.ndarray:
        """How many drafts fit after the known tokens: below max_model_len with one token sampled on
        top, and inside the blocks that the row owns. int32 [S], never negative."""
        below_end = self.max_model_len - 1 - self.num_tokens[rows_S]
        in_blocks = self.num_blocks[rows_S] * np.int32(self.block_size) - self.num_tokens[rows_S]
        return np.maximum(np.minimum(below_end, in_blocks), 0)

    def write_drafts(self, rows_S: np.ndarray, drafts_SR: np.ndarray) -> None:
        """Lay drafts (padding too) behind the known tokens, where batch and sampler read them."""
        self._write_behind(rows_S, drafts_SR)

    def advance(self, rows_S: np.ndarray, num_computed_S: np.ndarray, token_ids_SR: np.ndarray,
                num_sampled_S: np.ndarray) -> None:
        """Settle a step: `num_computed_S` more tokens have valid KV, and the first `num_sampled_S` of
        `token_ids_SR` become known."""
        self._write_behind(rows_S, token_ids_SR)
        self.num_computed[rows_S] += num_computed_S
        self.num_tokens[rows_S] += num_sampled_S

    def advance_unread(self, rows_S: np.ndarray, num_computed_S: np.ndarray, rows_Q: np.ndarray,
                       places_Q: np.ndarray) -> None:
        """As `advance` for a step whose tokens, one for each of rows_Q, are still on the device at places_Q."""
        self.num_computed[rows_S] += num_computed_S
        self.num_tokens[rows_Q] += 1
        self.fed_from.fill(-1)
        self.fed_from[rows_Q] = places_Q

    def read(self, rows_Q: np.ndarray, positions_Q: np.ndarray, token_ids_Q: np.ndarray) -> None:
        """Write the tokens of `advance_unread`, which have arrived from the device."""
        self.token_ids[rows_Q, positions_Q] = token_ids_Q

    def _write_behind(self, rows_S: np.ndarray, token_ids_SR: np.ndarray) -> None:
        """Write past `num_tokens`, dropping what would leave the matrix: only padding can."""
        width = token_ids_SR.shape[1]
        start_S = self.num_tokens[rows_S]
        if width == 1:
            self.token_ids[rows_S, np.minimum(start_S, self.max_model_len)] = token_ids_SR[:, 0]
            return
        columns_SR = start_S[:, None] + np.arange(width, dtype=np.int32)
        inside = columns_SR <= self.max_model_len
        rows_SR = np.broadcast_to(rows_S[:, None], columns_SR.shape)
        self.token_ids[rows_SR[inside], columns_SR[inside]] = token_ids_SR[inside]
