"""`RoutedInstance`: what a router knows of one instance of a cluster, but for its cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from xllm.cost.online import OnlineMoves
from xllm.routing.pace import PaceFit, Timing
from xllm.routing.predictors import DecodeFit, PrefillClock, PrefillFit
from xllm.routing.prompt_marks import PromptMarks
from xllm.routing.roles import Role
from xllm.routing.sent_requests import SentRequests

# What an instance has said is out of date after so long. Chosen: four beats of 0.5 s (`client/gate_wire.py`) missed.
STALE_S = 2.0
# In which what has been computed counts half for balance. Chosen: long enough for a conversation's next turn, so that
# what its first ones cost is not forgotten; short enough that load that is over is.
SPENT_HALF_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What an instance says of itself: sequences that wait and run, KV blocks that are free or can be made so, and the
    steps since the last report (`engine/step_log.py:StepTiming`)."""

    num_waiting: int
    num_running: int
    num_free_blocks: int
    steps: Sequence[Timing] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """block_size: tokens of a KV block. max_waiting, max_open: requests that it takes into its queue, and in all.
    num_blocks: of the KV cache on its device. kv_token_bytes: of a token's KV when it travels."""

    block_size: int
    max_waiting: int
    max_open: int
    num_blocks: int
    kv_token_bytes: int = 0


class Figures(NamedTuple):
    """An instance as it stands; of several, arrays [I] of the same. Prices that are not known are nan: of steps
    (`PaceFit`), of prompts (`PrefillCurve`), of decoding (`DecodePlane`) and of moves (`MovePrices`).
    heard_s: infinite before the first report: it has just joined, and what is known of it is not out of date."""

    waiting_tokens: Any
    num_open: Any
    num_queued: Any
    num_running: Any
    num_tokens: Any
    free_tokens: Any
    max_waiting: Any
    max_open: Any
    spent_tokens: Any
    spent_s: Any
    heard_s: Any
    is_behind: Any
    step_s: Any
    token_s: Any
    sequence_s: Any
    num_waiting: Any
    waiting_squares: Any
    prompt_start_s: Any
    prompt_token_s: Any
    prompt_square_s: Any
    decode_step_s: Any
    decode_sequence_s: Any
    decode_token_s: Any
    move_start_s: Any
    move_byte_s: Any
    kv_token_bytes: Any


class RoutedInstance:
    """number: larger than those of all that joined before. role: for new work. `sent`: what was sent there; `prefill`,
    `decode`, `moves`: how long that takes there. Not thread-safe."""

    def __init__(self, number: int, capacity: Capacity, role: Role = "DEFAULT"):
        self.number, self.capacity, self.role = number, capacity, role
        self.sent, self._pace = SentRequests(), PaceFit()
        self.prefill, self.decode, self.moves = PrefillFit(), DecodeFit(), OnlineMoves()
        self._clock = PrefillClock(self.prefill)
        self._has_moved = False
        self._is_behind = False
        self._num_waiting = self._num_running = 0  # as it said last
        self._excess = self._num_of_others = 0  # requests more than were sent there
        self._num_free_blocks = capacity.num_blocks
        self._heard_s = math.inf
        self._spent, self._spent_s = 0.0, 0.0  # tokens; as of when
        self._figures: np.ndarray | None = None  # kept until something changes: a decision looks at all, few change

    # --- what is told

    def hear(self, report: LoadReport, now_s: float) -> None:
        """It has said how it is."""
        self._num_waiting, self._num_running = report.num_waiting, report.num_running
        # Counted when two reports have them: one may be older than ends that were heard before it.
        excess = max(0, report.num_waiting + report.num_running - self.sent.num_open)
        self._num_of_others, self._excess = min(excess, self._excess), excess
        self._num_free_blocks, self._heard_s = report.num_free_blocks, now_s
        self._pace.note(report.steps)
        num_used = (self.capacity.num_blocks - report.num_free_blocks) * self.capacity.block_size
        self.decode.note(report.steps, num_used / max(1, report.num_running))
        self._figures = None

    def profiled(self, prompts: Iterable[tuple[float, float, float]],
                 steps: Iterable[tuple[float, float, float]]) -> None:
        """See `Fleet.profiled`."""
        self.prefill.start(prompts)
        self.decode.start(steps)
        self._figures = None

    def fall_behind(self, is_behind: bool) -> None:
        """Whether it is known that its cache is not known."""
        self._is_behind, self._figures = is_behind, None

    def enter(self, request_id: str, num_tokens: int, marks: PromptMarks, now_s: float) -> bool:
        """See `SentRequests.enter`. Whether it is a new prompt: not told before, and computed nowhere else."""
        if self.sent.is_open(request_id):
            return False
        is_new = not self.sent.is_expected(request_id)
        self.sent.enter(request_id, num_tokens, marks)
        self._clock.sent(request_id, num_tokens, max(0, (marks.num_tokens or [0])[-1] - num_tokens), now_s)
        self._spent, self._spent_s = float(faded(self._spent, now_s - self._spent_s)) + num_tokens, now_s
        self._figures = None
        return is_new

    def expect(self, request_id: str, num_tokens: int) -> None:
        """See `SentRequests.expect`."""
        self.sent.expect(request_id, num_tokens)
        self._figures = None

    def moved(self, num_bytes: float, seconds: float) -> None:
        """So many bytes of KV have come from another instance, in so many seconds."""
        if seconds > 0.0:
            self.moves.note(num_bytes, seconds)
            self._has_moved, self._figures = True, None

    def begun(self, request_id: str, now_s: float | None = None) -> None:
        """See `SentRequests.begun`. now_s: None: nothing is learnt of how long it took."""
        self.sent.begun(request_id)
        if now_s is None:
            self._clock.left(request_id)
        else:
            self._clock.begun(request_id, now_s)
        self._figures = None

    def left(self, request_id: str) -> None:
        """See `SentRequests.left`."""
        self.sent.left(request_id)
        self._clock.left(request_id)
        self._figures = None

    # --- what it comes to

    @property
    def figures(self) -> np.ndarray:
        """As it stands now: `Figures`, float64."""
        if self._figures is None:
            self._figures = np.array(self._add_up(), dtype=np.float64)
        return self._figures

    def _add_up(self) -> Figures:
        sent, capacity = self.sent, self.capacity
        unknown = (math.nan, math.nan, math.nan)
        prices = self._pace.prices or unknown
        curve = self.prefill.curve or (prices[0], prices[1] or math.nan, 0.0)
        plane = self.decode.plane or (prices[0], prices[2], 0.0)
        move_start_s, move_byte_s = self.moves.prices() if self._has_moved else unknown[:2]
        return Figures(
            waiting_tokens=sent.waiting_tokens, num_open=sent.num_open + sent.num_expected + self._num_of_others,
            num_queued=max(sent.num_waiting, self._num_waiting),
            num_running=max(sent.num_open - sent.num_waiting, self._num_running) + sent.num_expected,
            num_tokens=capacity.num_blocks * capacity.block_size,
            free_tokens=max(0, self._num_free_blocks * capacity.block_size - sent.waiting_tokens
                            - sent.expected_tokens),
            max_waiting=capacity.max_waiting, max_open=capacity.max_open,
            spent_tokens=self._spent, spent_s=self._spent_s, heard_s=self._heard_s, is_behind=self._is_behind,
            step_s=prices[0], token_s=prices[1] or math.nan, sequence_s=prices[2],
            num_waiting=sent.num_waiting, waiting_squares=sent.waiting_squares,
            prompt_start_s=curve[0], prompt_token_s=curve[1], prompt_square_s=curve[2],
            decode_step_s=plane[0], decode_sequence_s=plane[1], decode_token_s=plane[2],
            move_start_s=move_start_s, move_byte_s=move_byte_s, kv_token_bytes=capacity.kv_token_bytes)


class FigureTable:
    """The figures of several instances, of which few change between two decisions."""

    def __init__(self) -> None:
        self._instances: list[RoutedInstance] = []
        self._rows: list[np.ndarray | None] = []  # as they stand in the table
        self._table = np.zeros((0, len(Figures._fields)))

    def of(self, instances: list[RoutedInstance]) -> Figures:
        """Of all: arrays, float64 [I]. At least one."""
        if instances != self._instances:
            self._instances, self._rows = instances, [None] * len(instances)
            self._table = np.zeros((len(instances), len(Figures._fields)))
        for place, (instance, known) in enumerate(zip(instances, self._rows)):
            if known is None or instance._figures is not known:
                self._table[place] = self._rows[place] = instance.figures
        return Figures(*self._table.T.copy())


def faded(spent_tokens: Any, age_s: Any) -> Any:
    """What tokens count for that were computed so long ago."""
    return spent_tokens * 0.5 ** (np.maximum(0.0, age_s) / SPENT_HALF_S)
