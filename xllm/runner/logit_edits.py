"""`LogitEdits`: what one request does to its logits before temperature and truncation.

Order and meaning are vLLM's: allowed_token_ids, bad words, min_tokens, logit_bias, repetition
penalty, frequency penalty, presence penalty. The repetition penalty counts prompt and output, the
other two and bad words the output alone. Rows that need none of this have no `LogitEdits`.

`edit_logits` does it for all slots of a step at once: the host packs what each has to add (-inf forbids
a token) and the histories of those with penalties, and one copy brings it to the device.

Letters: X slots with edits, A additions, T tokens of histories, V vocabulary, W words of 32 tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from backends.opset import OpSet
from xllm.request import COLLECTIONS, SamplingParams
from xllm.runner.bad_words import BadWords

_FORBIDDEN = float("-inf")
_ALIGNMENT_BYTES = 16  # of each array in the common buffer: enough for any dtype, and for vector loads


class EditTables:
    """The parts of a request's edits that all its rows share. Immutable.

    always, ends: pairs of int64 token ids and fp32 values, to be added at any time and before `min_tokens`. allowed_W:
    int32 on the device, as `ApplyTokenBitmaskOp` takes it; None: all tokens.
    """

    def __init__(self, sampling: SamplingParams, eos_token_ids: tuple[int, ...], vocab_size: int, device: torch.device):
        self.made_of = sampling, eos_token_ids  # held, so that the identities in its key stay theirs
        words = sampling.bad_words_token_ids
        longer = [word for word in words if len(word) > 1]
        self.bad_words = BadWords(longer) if longer else None
        bias = sampling.logit_bias or {}
        self.always = _joined([_forbidden(word[0] for word in words if len(word) == 1),
                               (_ids(bias), np.array(list(bias.values()), np.float32))])
        end_ids = {*eos_token_ids, *sampling.stop_token_ids}
        self.ends = _forbidden(sorted(t for t in end_ids if 0 <= t < vocab_size))
        self.allowed_W: Tensor | None = None
        if sampling.allowed_token_ids is not None:
            self.allowed_W = torch.from_numpy(_words(_ids(sampling.allowed_token_ids), vocab_size)).to(device)


class TableStore:
    """Keeps the tables of the rows in use; rows whose parameters share their collections share a table."""

    def __init__(self, vocab_size: int, device: torch.device):
        self._vocab_size, self._device = vocab_size, device
        self._tables: WeakValueDictionary[tuple[object, ...], EditTables] = WeakValueDictionary()

    def of(self, sampling: SamplingParams, eos_token_ids: tuple[int, ...]) -> EditTables:
        """The tables for these parameters: shared ones if there are any, else new ones."""
        key = (*(id(getattr(sampling, name)) for name in COLLECTIONS), eos_token_ids)
        tables = self._tables.get(key)
        if tables is None:
            tables = self._tables[key] = EditTables(sampling, eos_token_ids, self._vocab_size, self._device)
        return tables


class LogitEdits:
    """The edits of one row; made when the row enters."""

    def __init__(self, sampling: SamplingParams, tables: EditTables):
        self.sampling, self._tables = sampling, tables
        self.allowed_W = tables.allowed_W

    @staticmethod
    def needed(sampling: SamplingParams) -> bool:
        """Whether a request ever has its logits edited."""
        return (sampling.needs_history or bool(sampling.logit_bias) or sampling.allowed_token_ids is not None
                or sampling.min_tokens > 0)

    def additions(self, output: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """What is to be added to the logits after `output` (int32): pairs of int64 token ids and fp32 values."""
        tables = self._tables
        found = [tables.always]
        if len(output) < self.sampling.min_tokens:
            found.append(tables.ends)
        if tables.bad_words is not None and (completed := tables.bad_words.completed(output)):
            found.append(_forbidden(completed))
        return [pair for pair in found if len(pair[0])]

    def counted(self, num_history: int, num_prompt: int) -> int | None:
        """Where the part of the history that penalties count begins: 0, or `num_prompt` if only the output counts;
        None: they change nothing."""
        p = self.sampling
        if p.repetition_penalty != 1.0:
            return 0
        return num_prompt if (p.frequency_penalty or p.presence_penalty) and num_history > num_prompt else None


class SlotEdits(NamedTuple):
    """One slot's edits. history int32: prompt and output before the token to draw."""

    slot: int
    edits: LogitEdits
    history: np.ndarray
    num_prompt: int


def edit_logits(ops: OpSet, logits_QV: Tensor, todo: Sequence[SlotEdits]) -> None:
    """Edit fp32 logits in place; no slot occurs twice."""
    if not todo:
        return
    masks = [(s.slot, s.edits.allowed_W) for s in todo if s.edits.allowed_W is not None]
    slots_M = np.array([slot for slot, _ in masks], dtype=np.int64)
    masked, slots_A, ids_A, values_A, *penalties = to_device([slots_M, *_additions(todo), *_penalties(todo)],
                                                             logits_QV.device)
    if masks:
        ops.apply_token_bitmask(logits_QV, torch.stack([mask_W for _, mask_W in masks]), masked)
    if len(slots_A):
        logits_QV.index_put_((slots_A, ids_A), values_A, accumulate=True)
    if len(penalties[0]):
        ops.penalise(logits_QV, *penalties)


def _additions(todo: Sequence[SlotEdits]) -> list[np.ndarray]:
    """The additions of all slots, packed: arrays [A] of slot, token and value."""
    found = [(s.slot, ids, values) for s in todo for ids, values in s.edits.additions(s.history[s.num_prompt:])]
    slots = np.array([slot for slot, _, _ in found], dtype=np.int64)
    ids_A, values_A = _joined([(ids, values) for _, ids, values in found])
    return [np.repeat(slots, [len(ids) for _, ids, _ in found]), ids_A, values_A]


def _penalties(todo: Sequence[SlotEdits]) -> list[np.ndarray]:
    """The arguments of `PenaliseOp` after the logits."""
    found = [(s, begin) for s in todo if (begin := s.edits.counted(len(s.history), s.num_prompt)) is not None]
    sampling = [s.edits.sampling for s, _ in found]
    lengths = np.array([0, *(len(s.history) - begin for s, begin in found)])
    starts_X1 = np.cumsum(lengths, dtype=np.int32)
    num_prompt_X = np.array([s.num_prompt - begin for s, begin in found], dtype=np.int32)
    return [
        np.array([s.slot for s, _ in found], dtype=np.int64),
        np.concatenate([np.zeros(0, np.int32), *(s.history[begin:] for s, begin in found)]),
        starts_X1,
        starts_X1[:-1] + num_prompt_X,
        np.array([p.repetition_penalty for p in sampling], dtype=np.float32),
        np.array([p.frequency_penalty for p in sampling], dtype=np.float64),
        np.array([p.presence_penalty for p in sampling], dtype=np.float64),
    ]


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on the device, by one copy for all."""
    ends = np.cumsum([-(-a.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for a in arrays]).tolist()
    host = np.zeros(ends[-1], dtype=np.uint8)
    parts = [slice(start, start + a.nbytes) for start, a in zip([0, *ends], arrays)]
    for part, array in zip(parts, arrays, strict=True):
        host[part] = array.view(np.uint8)
    together = torch.from_numpy(host).to(device, non_blocking=True)
    return [together[part].view(_DTYPES[array.dtype]) for part, array in zip(parts, arrays, strict=True)]


_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64, np.dtype(np.float32): torch.float32,
           np.dtype(np.float64): torch.float64}


def _words(allowed: np.ndarray, vocab_size: int) -> np.ndarray:
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=bool)
    bits[allowed] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def _forbidden(token_ids: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    ids = _ids(token_ids)
    return ids, np.full(len(ids), _FORBIDDEN, dtype=np.float32)


def _joined(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return (np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in pairs)]),
            np.concatenate([np.zeros(0, np.float32), *(values for _, values in pairs)]))


def _ids(token_ids: Iterable[int]) -> np.ndarray:
    return np.array(list(token_ids), dtype=np.int64)
