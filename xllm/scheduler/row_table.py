"""`RowTable`: the scheduler's per-step state as a structure of arrays, indexed by row.

A row belongs to one sequence from admission until it finishes or is preempted *and* the last step
planned with it has settled. Letters: R rows, E stop tokens per row at most.

With overlapped scheduling a step is planned before the last one's tokens are known, so each row has
two sets of counters:

    known, computed     settled: tokens whose value is known; tokens whose KV is written
    upper, cursor       after every step in flight, if each of its drafts were accepted

A row wants upper - cursor tokens. Prefill, chunked prefill, decode and prefix hits are that one rule.
"""

from __future__ import annotations

import numpy as np

from xllm.sequence import SequenceState

NO_TOKEN = -1  # fills `stop_ids_RE` where a row has fewer stop tokens; no token has that id


class RowTable:
    """Arrays of length R; `seqs` holds the owner, or None. Written by the scheduler only."""

    def __init__(self, num_rows: int, max_tokens_per_row: int):
        self.num_rows = num_rows
        self.seqs: list[SequenceState | None] = [None] * num_rows
        self.request_ids = np.full(num_rows, "", dtype=object)
        self.alive = np.zeros(num_rows, dtype=bool)  # its outputs are wanted
        self.known = np.zeros(num_rows, dtype=np.int64)
        self.computed = np.zeros(num_rows, dtype=np.int64)
        self.upper = np.zeros(num_rows, dtype=np.int64)
        self.cursor = np.zeros(num_rows, dtype=np.int64)
        self.num_prompt = np.zeros(num_rows, dtype=np.int64)
        self.num_cached = np.zeros(num_rows, dtype=np.int64)
        self.limit = np.zeros(num_rows, dtype=np.int64)  # length at which it ends
        self.min_known = np.zeros(num_rows, dtype=np.int64)  # length below which it does not stop
        self.in_flight = np.zeros(num_rows, dtype=np.int64)  # steps planned and not settled
        self.last_step = np.full(num_rows, -1, dtype=np.int64)  # the last of those
        self.stop_ids_RE = np.full((num_rows, 1), NO_TOKEN, dtype=np.int32)
        self._num_stops = np.zeros(num_rows, dtype=np.int64)
        # Touched page by page as sequences grow: calloc gives the memory lazily.
        self.token_ids = np.zeros((num_rows, max_tokens_per_row), dtype=np.int32)
        self._free = list(range(num_rows))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def enter(self, seq: SequenceState, num_computed: int, limit: int) -> int:
        """Give the sequence a row and fill the row's counters; returns the row."""
        row, n, params = self._free.pop(), len(seq.token_ids), seq.request.sampling
        self.seqs[row], self.request_ids[row], self.alive[row] = seq, seq.request_id, True
        self.known[row] = self.upper[row] = n
        self.computed[row] = self.cursor[row] = num_computed
        self.num_prompt[row], self.num_cached[row] = seq.num_prompt_tokens, seq.num_cached_tokens
        self.limit[row] = limit
        self.min_known[row] = seq.num_prompt_tokens + params.min_tokens
        self.in_flight[row], self.last_step[row] = 0, -1
        self.token_ids[row, :n] = seq.token_ids
        self._set_stop_ids(row, seq)
        return row

    def _set_stop_ids(self, row: int, seq: SequenceState) -> None:
        params = seq.request.sampling
        stops = set(params.stop_token_ids)
        if not params.ignore_eos:
            stops.update(seq.request.eos_token_ids)
        self._num_stops[row] = len(stops)
        width = self.stop_ids_RE.shape[1]
        if len(stops) > width:
            self.stop_ids_RE = np.pad(self.stop_ids_RE, ((0, 0), (0, len(stops) - width)), constant_values=NO_TOKEN)
        self.stop_ids_RE[row] = NO_TOKEN
        self.stop_ids_RE[row, : len(stops)] = sorted(stops)

    def _drop_stop_ids(self, row: int) -> None:
        """Narrow the table of stop tokens if this row was the widest: every step compares the whole of it."""
        was_widest = self._num_stops[row] == self.stop_ids_RE.shape[1] > 1
        self._num_stops[row] = 0
        if was_widest:
            self.stop_ids_RE = self.stop_ids_RE[:, : max(1, int(self._num_stops.max()))].copy()

    def leave(self, row: int) -> None:
        """Free the row. No step in flight may use it."""
        assert self.in_flight[row] == 0
        self.seqs[row], self.request_ids[row], self.alive[row] = None, "", False
        self._drop_stop_ids(row)
        self._free.append(row)

    def tokens_of(self, row: int) -> np.ndarray:
        """A copy of the row's known tokens: int32."""
        return self.token_ids[row, : self.known[row]].copy()
