"""`RowMatchers`: keeps each running row's position in its grammar, and computes the masks that follow from it.

A matcher reads the row's own tokens when its next mask is wanted. So a row that comes back after a preemption, a draft
that was not accepted and a step planned ahead need not be reported to it.

Letters: Q slots of a step, X those of rows with a grammar, K slots of one row (1 + its drafts), W words of 32 tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from xllm.request import FORM_CANNOT_GO_ON
from xllm.structured.grammar import GrammarError, check_matcher
from xllm.structured.store import GrammarStore

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from xllm.step import NewRow

# llguidance lets other Python threads run. The more cores, the fewer of them the forward pass misses.
NUM_THREADS = max(1, min(4, (os.cpu_count() or 1) // 4))
MIN_SHARE = 8  # rows that are worth a thread. Chosen: a mask of a usual grammar takes less time than handing it over
ALL = -1  # an int32 word whose 32 bits are set: all its tokens may be drawn
# A grammar whose mask takes that long ends its request: every other row of the step waits for it. Chosen: five times
# what `grammar_probe.MAX_STEP_CPU_S` allows at the door.
MAX_MASK_CPU_S = 0.5


class RowTokens(Protocol):
    """The part of the rows that is read: known tokens, and after them the drafts of the running step."""

    token_ids: np.ndarray
    num_tokens: np.ndarray
    num_prompt_tokens: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotMasks:
    """Masks of some slots. slots_X: indices into the slots of the call. mask_XW int32. failed: by slot, for rows whose
    grammar has failed; their mask allows all tokens."""

    slots_X: np.ndarray
    mask_XW: np.ndarray
    failed: dict[int, str]

    def allows(self, slot: int, token_id: int) -> bool:
        """Whether the mask of a slot (one of slots_X) lets a token through."""
        word = int(self.mask_XW[np.searchsorted(self.slots_X, slot), token_id >> 5])
        return bool(word >> (token_id & 31) & 1)


class RowMatchers:
    """One thread at a time may call it; between `begin` and `masks` the masks are computed in threads of its own.

    rows_Q, offsets_Q: of the slots (`HostBatch`); a row's are adjacent and in order.
    """

    def __init__(self, rows: RowTokens, vocab_size: int):
        self.store: GrammarStore | None = None  # set by the worker before the first row
        self._rows = rows
        self._num_words = -(-vocab_size // 32)
        self._matchers: dict[int, _RowMatcher] = {}
        self._masked = np.zeros(len(rows.num_tokens), dtype=bool)
        self._begun: dict[int, _Filling] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._matchers)

    def enter(self, new: NewRow) -> None:
        """Goes with `RowState.enter`."""
        if new.sampling.structured is None:
            return
        assert self.store is not None, "a structured output without a store of grammars"
        self._matchers[new.row] = _RowMatcher(self.store.prepare(new.sampling.structured), new.num_prompt_tokens,
                                              new.eos_token_ids)
        self._masked[new.row] = True

    def release(self, row: int) -> None:
        """Goes with `RowState.release`."""
        if self._masked[row]:
            self._wait_for(row)
            del self._matchers[row]
            self._masked[row] = False

    def begin(self, rows_Q: np.ndarray, offsets_Q: np.ndarray) -> None:
        """Start computing the masks of these slots. The host must know all known tokens of the rows, with drafts after
        them."""
        if not self._matchers or not self._masked[rows_Q].any():
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=NUM_THREADS, thread_name_prefix="xllm-masks")
        fillings = []
        for row, _, end in self._groups(rows_Q):
            self._wait_for(row)
            self._begun[row] = filling = self._filling(row, int(offsets_Q[end - 1]) + 1)
            fillings.append(filling)
        share = max(MIN_SHARE, -(-len(fillings) // NUM_THREADS))
        for first in range(0, len(fillings), share):
            part = fillings[first:first + share]
            done = self._pool.submit(_run_all, part)
            for filling in part:
                filling.done = done

    def masks(self, rows_Q: np.ndarray, offsets_Q: np.ndarray) -> SlotMasks | None:
        """The masks of these slots; those that `begin` has not started are computed now. None: no slot has a
        grammar."""
        if not self._matchers:
            return None
        slots_X = np.flatnonzero(self._masked[rows_Q])
        if not len(slots_X):
            return None
        parts, failed = [], {}
        for row, first, end in self._groups(rows_Q):
            offset = int(offsets_Q[first])
            filling = self._filled(row, offset + end - first)
            parts.append(filling.mask_KW[offset:offset + end - first])
            if filling.reason is not None:
                failed.update(dict.fromkeys(range(first, end), filling.reason))
        return SlotMasks(slots_X=slots_X, mask_XW=np.concatenate(parts), failed=failed)

    def _groups(self, rows_Q: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(row, its first slot, the end of its slots) of each row with a grammar."""
        starts = np.flatnonzero(np.concatenate(([True], rows_Q[1:] != rows_Q[:-1])))
        for first, end in zip(starts.tolist(), [*starts[1:].tolist(), len(rows_Q)]):
            if self._masked[rows_Q[first]]:
                yield int(rows_Q[first]), first, end

    def _filled(self, row: int, num_slots: int) -> _Filling:
        filling = self._wait_for(row)
        if filling is None or filling.position != self._rows.num_tokens[row] or len(filling.mask_KW) < num_slots:
            filling = self._filling(row, num_slots)
            filling.run()
        self._begun[row] = filling  # another slice of the step may ask for more of its slots
        return filling

    def _filling(self, row: int, num_slots: int) -> _Filling:
        matcher, tokens, num = self._matchers[row], self._rows.token_ids[row], int(self._rows.num_tokens[row])
        return _Filling(matcher, num, tokens[matcher.num_taken:num].tolist(), tokens[num:num + num_slots - 1].tolist(),
                        np.full((num_slots, self._num_words), ALL, dtype=np.int32))

    def _wait_for(self, row: int) -> _Filling | None:
        filling = self._begun.pop(row, None)
        if filling is not None and filling.done is not None:
            filling.done.result()
        return filling

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)


class _RowMatcher:
    """The matcher of one row, which has taken in the row's first `num_taken` tokens."""

    def __init__(self, built: Future[LLMatcher], num_taken: int, eos_token_ids: tuple[int, ...]):
        self.num_taken = num_taken
        self._built = built
        self._matcher: LLMatcher | None = None
        self._eos_token_ids = eos_token_ids
        self._has_ended = False

    def take(self, token_ids: list[int]) -> None:
        """Advance by these tokens. Raises GrammarError or RequestError."""
        if self._matcher is None:
            self._matcher = self._built.result().deep_copy()
        self.num_taken += len(token_ids)
        if self._has_ended:
            return
        for index, token_id in enumerate(token_ids):
            if token_id in self._eos_token_ids:
                self._has_ended = True
                token_ids = token_ids[:index]
                break
        if token_ids and not self._matcher.consume_tokens(token_ids):
            check_matcher(self._matcher)
        self._has_ended |= self._matcher.is_stopped()

    def fill(self, mask_KW: np.ndarray, drafts: list[int]) -> None:
        """Write the masks here and after each draft, up to the first draft that the grammar does not allow. Raises
        GrammarError."""
        matcher = self._matcher
        assert matcher is not None, "take() first"
        if self._has_ended:
            self._only_the_end(mask_KW)
            return
        taken, began_s = 0, time.thread_time()
        for place, mask_W in enumerate(mask_KW):
            matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
            check_matcher(matcher)
            if (spent_s := time.thread_time() - began_s) > MAX_MASK_CPU_S:
                raise GrammarError(f"it is too complex: {spent_s:.1f} s for one step")
            if place == len(drafts) or not _in_mask(mask_W, drafts[place]):
                break
            if drafts[place] in self._eos_token_ids:
                self._only_the_end(mask_KW[place + 1:])
                break
            matcher.consume_token(drafts[place])
            taken += 1
        if taken:
            matcher.rollback(taken)
            check_matcher(matcher)

    def _only_the_end(self, mask_KW: np.ndarray) -> None:
        mask_KW.fill(0)
        for token_id in self._eos_token_ids:
            if token_id >> 5 < mask_KW.shape[1]:
                mask_KW.view(np.uint32)[:, token_id >> 5] |= np.uint32(1 << (token_id & 31))


def _in_mask(mask_W: np.ndarray, token_id: int) -> bool:
    return bool(int(mask_W[token_id >> 5]) >> (token_id & 31) & 1)


class _Filling:
    """The masks of a row at `position`. `run` computes them, in any thread."""

    def __init__(self, matcher: _RowMatcher, position: int, new_tokens: list[int], drafts: list[int],
                 mask_KW: np.ndarray):
        self.position, self.mask_KW = position, mask_KW
        self.reason: str | None = None
        self.done: Future[None] | None = None
        self._matcher, self._new_tokens, self._drafts = matcher, new_tokens, drafts

    def run(self) -> None:
        try:
            self._matcher.take(self._new_tokens)
            self._matcher.fill(self.mask_KW, self._drafts)
        except GrammarError as error:
            self.reason = f"{FORM_CANNOT_GO_ON}: {error}"
        except ValueError as error:
            self.reason = str(error)
        if self.reason is not None:
            self.mask_KW.fill(ALL)


def _run_all(fillings: list[_Filling]) -> None:
    for filling in fillings:
        filling.run()
