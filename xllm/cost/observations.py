"""What the cost model is fitted to: `StepWork`, what a step computes, and `Profile`, what was measured.

A token attends to all tokens before it. `reads` counts these, over all tokens of a step: for a chunk of n tokens behind
c others n * c + n * n / 2, which is what makes prefill quadratic in its length.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

LOAD, SAVE, TRANSFER = "load", "save", "transfer"  # KV from host memory, to host memory, between instances


class StepWork(NamedTuple):
    """The sums of one step. A prefill row computes several tokens of its prompt, a decode row one token and its
    drafts."""

    num_prefill_tokens: float = 0
    num_prefill_reads: float = 0
    num_decode_rows: float = 0
    num_decode_tokens: float = 0
    num_decode_reads: float = 0


class MeasuredStep(NamedTuple):
    """A measured step. seconds: of wall time, by which the engine came forward."""

    work: StepWork
    seconds: float


class MeasuredMove(NamedTuple):
    """A measured move. kind: `LOAD`, `SAVE`, `TRANSFER`, or any other name."""

    kind: str
    num_bytes: float
    seconds: float


@dataclass(slots=True)
class Profile:
    """Observations of one engine on one machine, in the order in which they were made."""

    steps: list[MeasuredStep] = field(default_factory=list)
    moves: list[MeasuredMove] = field(default_factory=list)


def prefill_work(num_tokens: int, num_cached: int = 0) -> StepWork:
    """A prompt of `num_tokens`, of which the KV of the first `num_cached` is there, in one step."""
    new = max(num_tokens - num_cached, 0)
    return StepWork(num_prefill_tokens=new, num_prefill_reads=new * num_cached + new * new / 2)


def decode_work(contexts: Iterable[int], num_drafts: int = 0) -> StepWork:
    """One row for each context (tokens before the one that it computes), each with so many drafts behind."""
    contexts = list(contexts)
    rows, each = len(contexts), 1 + num_drafts
    return StepWork(num_decode_rows=rows, num_decode_tokens=rows * each,
                    num_decode_reads=each * sum(contexts) + rows * (each * num_drafts) / 2)


def work_of(num_tokens_S: np.ndarray, context_S: np.ndarray, num_drafts: int = 0) -> StepWork:
    """The sums of a planned step (`ScheduleOutput.num_tokens_S`). context_S: tokens before each row's first; int.
    num_drafts: in the whole step; each is taken to read what its row reads on average."""
    num_rows, num_tokens = len(num_tokens_S), int(num_tokens_S.sum())
    if num_tokens == num_rows:  # the usual step: all decode
        reads = int(context_S.sum())
        return StepWork(0, 0, num_rows, num_rows + num_drafts, reads + (reads * num_drafts / num_rows if reads else 0))
    reads_S = num_tokens_S * (context_S + num_tokens_S / 2)
    decodes_S = num_tokens_S == 1
    rows, decode_reads = int(np.count_nonzero(decodes_S)), float(context_S[decodes_S].sum())
    prefill_reads = float(reads_S[~decodes_S].sum())
    return StepWork(num_tokens - rows, prefill_reads, rows, rows + num_drafts,
                    decode_reads + (decode_reads * num_drafts / rows if rows else 0))
