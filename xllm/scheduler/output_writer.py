"""`OutputWriter`: appends a step's sampled tokens to their rows and makes the requests' `OutputDelta`s."""

from __future__ import annotations

import numpy as np

from xllm.request import OutputDelta
from xllm.scheduler.row_table import RowTable
from xllm.stats import Counters
from xllm.step import StepOutput


class OutputWriter:
    """Works on the row table's arrays; only the outputs themselves are made row by row. Owned by the scheduler."""

    def __init__(self, rows: RowTable, counters: Counters):
        self._rows, self._counters = rows, counters
        self.num_wanting_prompt_logprobs = 0  # open requests
        self.untold: dict[str, dict[str, int]] = {}  # where a request's cached tokens were, until its first output

    def append(self, result: StepOutput, rows: np.ndarray) -> tuple[list[OutputDelta], list[tuple[int, OutputDelta]]]:
        """Append the sampled tokens to their rows. rows: int64 [S], the row of each of the result's places. Returns
        (the outputs of the rows that have new tokens, (row, its output) of each row that ends with them)."""
        table = self._rows
        kept = np.where(table.alive[rows], result.num_sampled_S, 0)  # tokens that count
        at = producing = _places(kept)
        stops: list[int] = []  # places in the result
        for column in range(result.token_ids_SR.shape[1]):
            if column:
                at = np.flatnonzero(kept > column)
            these = rows[at]
            if not len(these):
                break
            tokens, known = result.token_ids_SR[at, column], table.known[these]
            table.token_ids[these, known] = tokens
            known += 1
            table.known[these] = known
            ends = (tokens[:, None] == table.stop_ids_RE[these]).any(axis=1)
            ends &= known >= table.min_known[these]
            ends |= known >= table.limit[these]
            if ends.any():
                ended = np.arange(len(rows))[at][ends]
                kept[ended] = column + 1
                stops += ended.tolist()
        self._counters.generation_tokens_total += int(kept.sum())
        return self._write(result, rows, kept, producing, stops)

    def _write(self, result: StepOutput, rows: np.ndarray, kept: np.ndarray, at: np.ndarray | slice,
               stops: list[int]) -> tuple[list[OutputDelta], list[tuple[int, OutputDelta]]]:
        """Make the outputs. at: places in the result of the rows that have new tokens."""
        table, producing = self._rows, rows[at]
        if result.token_ids_SR.shape[1] == 1:
            tokens = result.token_ids_SR[at].tolist()
        else:
            counts = kept[at].tolist()
            tokens = [ids[:n] for ids, n in zip(result.token_ids_SR[at].tolist(), counts)]
        cached = table.num_cached[producing].tolist()
        outputs = list(map(OutputDelta, table.request_ids[producing].tolist(), tokens, cached))
        if self.untold:
            for output in outputs:
                output.cached_by_tier = self.untold.pop(output.request_id, None)
        for i, entries in result.prompt_logprobs.items():
            self._collect_prompt_logprobs(int(rows[i]), entries)
        if not (result.logprobs or self.num_wanting_prompt_logprobs or result.pooled or stops):
            return outputs, []
        places = np.arange(len(rows))[at].tolist()
        if result.logprobs or self.num_wanting_prompt_logprobs:
            self._attach_logprobs(result, places, producing.tolist(), outputs)
        place_of = {i: place for place, i in enumerate(places)}
        for i, vector in result.pooled.items():
            if kept[i]:
                outputs[place_of[i]].embedding = vector.tolist()
        return outputs, [(int(rows[i]), outputs[place_of[i]]) for i in sorted(stops)]

    def _collect_prompt_logprobs(self, row: int, entries: list) -> None:
        seq = self._rows.seqs[row]
        if seq is None or seq.prompt_logprobs is None or len(seq.token_ids) > seq.num_prompt_tokens:
            return  # the last: preempted after they were delivered
        seq.prompt_logprobs += entries

    def _attach_logprobs(self, result: StepOutput, at: list[int], rows: list[int], outputs: list[OutputDelta]) -> None:
        for output, i, row in zip(outputs, at, rows):
            num_new = len(output.token_ids)
            if i in result.logprobs:
                output.logprobs = result.logprobs[i][:num_new]
            seq = self._rows.seqs[row]
            is_first = self._rows.known[row] - num_new == self._rows.num_prompt[row]
            if seq is not None and is_first and seq.prompt_logprobs is not None:
                output.prompt_logprobs = seq.prompt_logprobs


def _places(kept: np.ndarray) -> np.ndarray | slice:
    """The places where `kept` is not 0: int64, or a slice if that is everywhere, which spares numpy the copies."""
    return slice(None) if kept.all() else np.flatnonzero(kept)
