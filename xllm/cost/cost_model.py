"""`CostModel`: predicts seconds from prices, and knows how far it has been off. Plain numbers, to and from JSON.

The form is that of the profile-driven schedulers of xLLM in C++ (`time_predictor`: prefill c0 + c1 d^2 + c2 d + c3 d p
of d new tokens behind p cached ones, decode c0 + c1 rows + c2 rows x length), in one sum for both: d^2 / 2 + d p are
the tokens that prefill reads, rows x length those of decode, and a step may mix the two. What is left out is their
c4 p, a price of cached tokens that nothing reads.

- step: launching, scheduling, reading the weights once
- token: its share of the matrix products
- row: what a decode row costs beyond its token: its logits, its draw, its output
- read: attention over one token before, in a chunk whose tokens share what was read
- decode_read: how much more it is where one token reads alone (bound by memory, not by arithmetic)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xllm.cost.observations import LOAD, SAVE, TRANSFER, StepWork, decode_work, prefill_work

_VERSION = 1  # of the JSON


class StepPrices(NamedTuple):
    """Seconds each, none negative: see the head of this file."""

    step: float
    token: float
    row: float = 0.0
    read: float = 0.0
    decode_read: float = 0.0

    def predict(self, work: StepWork) -> float:
        """Seconds of a step."""
        return sum(price * term for price, term in zip(self, terms_of(work), strict=True))


def terms_of(work: StepWork) -> tuple[float, float, float, float, float]:
    """What `StepPrices` are the prices of, in their order."""
    prefill, prefill_reads, rows, decode, decode_reads = work
    return 1.0, prefill + decode, rows, prefill_reads + decode_reads, decode_reads


class MovePrices(NamedTuple):
    """Seconds of a move, whatever its size, and of each byte; none negative."""

    start: float
    byte: float

    def predict(self, num_bytes: float) -> float:
        """Seconds of one move."""
        return self.start + self.byte * num_bytes


class FitError(NamedTuple):
    """Of predictions that were made without what they are compared with: |predicted / measured - 1|. num: how many."""

    median: float
    p90: float
    num: int


NO_ERROR = FitError(math.inf, math.inf, 0)  # nothing was compared: nothing is promised


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """What steps and moves cost on one machine. Predictions are seconds, never negative, and never less for more work.

    steps: None if no steps were observed; moves: by kind. Each prediction raises LookupError for what was not observed.
    """

    steps: StepPrices | None = None
    steps_error: FitError = NO_ERROR
    moves: Mapping[str, MovePrices] = field(default_factory=dict)
    moves_error: Mapping[str, FitError] = field(default_factory=dict)

    def predict(self, work: StepWork) -> float:
        """Seconds of one step of any mix: `work_of` makes `work` of a plan."""
        if self.steps is None:
            raise LookupError("no steps were observed")
        return self.steps.predict(work)

    def prefill_s(self, num_tokens: int, num_cached: int = 0, *, max_chunk: int | None = None) -> float:
        """Seconds of computing a prompt of `num_tokens`, the first `num_cached` of which are cached, with nothing
        beside it, in steps of at most `max_chunk` tokens; None: in one step."""
        work = prefill_work(num_tokens, num_cached)
        num_steps = math.ceil(work.num_prefill_tokens / max_chunk) if max_chunk else 1
        return self.predict(work) + max(num_steps - 1, 0) * self.predict(StepWork())

    def decode_s(self, contexts: Iterable[int], *, num_drafts: int = 0) -> float:
        """Seconds of one step that decodes a row for each of `contexts` (tokens before the one that is computed), each
        row with so many draft tokens."""
        return self.predict(decode_work(contexts, num_drafts))

    def move_s(self, kind: str, num_bytes: float) -> float:
        """Seconds of one move of so many bytes. kind: as it was observed."""
        if kind not in self.moves:
            raise LookupError(f"no {kind} was observed")
        return self.moves[kind].predict(num_bytes)

    def transfer_s(self, num_bytes: float) -> float:
        """Seconds until so many bytes of KV have come from another instance: a latency, and a bandwidth. Observed by
        whoever transfers: `OnlineCost.note_move`, with the kind `TRANSFER`."""
        return self.move_s(TRANSFER, num_bytes)

    def load_s(self, num_bytes: float) -> float:
        """Seconds of copying so many bytes of KV from host memory to the device."""
        return self.move_s(LOAD, num_bytes)

    def swap_s(self, num_bytes: float) -> float:
        """Seconds of copying so many bytes of KV to host memory and, later, back to the device."""
        return self.move_s(SAVE, num_bytes) + self.move_s(LOAD, num_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` makes an equal model of them."""
        return {"version": _VERSION,
                "steps": None if self.steps is None else self.steps._asdict(),
                "steps_error": _told(self.steps_error),
                "moves": {kind: {**prices._asdict(), "error": _told(self.moves_error.get(kind, NO_ERROR))}
                          for kind, prices in self.moves.items()}}

    @classmethod
    def from_json(cls, data: Any) -> CostModel:
        """Raises ValueError that names the member which is wrong."""
        _members("model", data, ("version", "steps", "steps_error", "moves"))
        if data["version"] != _VERSION:
            raise ValueError(f"version must be {_VERSION}, got {data['version']!r}")
        if not isinstance(data["moves"], dict):
            raise ValueError("moves must be an object")
        steps = data["steps"]
        for kind, move in data["moves"].items():
            _members(f"moves.{kind}", move, (*MovePrices._fields, "error"))
        return cls(steps=None if steps is None else StepPrices(*_numbers("steps", steps, StepPrices._fields)),
                   steps_error=_error("steps_error", data["steps_error"]),
                   moves={kind: MovePrices(*(_number(f"moves.{kind}.{name}", move[name])
                                             for name in MovePrices._fields))
                          for kind, move in data["moves"].items()},
                   moves_error={kind: _error(f"moves.{kind}.error", move["error"])
                                for kind, move in data["moves"].items()})


def _told(error: FitError) -> dict[str, Any] | None:
    return error._asdict() if error.num else None  # JSON knows no infinity


def _error(where: str, data: Any) -> FitError:
    if data is None:
        return NO_ERROR
    median, p90, num = _numbers(where, data, FitError._fields)
    return FitError(median, p90, int(num))


def _members(where: str, data: Any, names: tuple[str, ...]) -> None:
    if not isinstance(data, dict) or data.keys() != set(names):
        raise ValueError(f"{where} must have exactly these members: {', '.join(names)}")


def _numbers(where: str, data: Any, names: tuple[str, ...]) -> list[float]:
    _members(where, data, names)
    return [_number(f"{where}.{name}", data[name]) for name in names]


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{where} must be a finite number that is not negative, got {value!r}")
    return float(value)
