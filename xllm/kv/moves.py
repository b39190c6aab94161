"""Copies of KV blocks between two tiers as data, and the engine's side of them.

The engine decides what is copied where and sends a `Move`. The worker, which holds the bytes, performs it
(`performer.py`, `lanes.py`), in this process or in several others, and answers with a `MoveDone`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from xllm.cost.online import OnlineCost
from xllm.errors import TransferError
from xllm.kv_offer import KVOffer, RankWindow

ASSUMED_BYTES_PER_S = 1e9  # of a lane that has not moved anything yet: a guess, corrected by the first move
SAVE, LOAD, WRITE, READ = "save", "load", "write", "read"  # device -> host, host -> device, host -> disk, disk -> host
LAND, PUBLISH = "land", "publish"  # another instance -> host, device -> another instance
TRANSFERS = (LAND, PUBLISH)
PUT, FETCH = "put", "fetch"  # host -> shared store, shared store -> host
STORE_LANES = (PUT, FETCH)  # may take any time: the store may be a file server that is away
LANES = (SAVE, LOAD, WRITE, READ, *STORE_LANES)
PATIENT = (SAVE, WRITE)  # lanes whose moves no request waits for, unless their priority says so
URGENT = 0  # priority of moves that a request waits for; lower goes first
NO_TICKET = 0  # tickets count from 1


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Move:
    """One copy of KV blocks between two tiers. Ints, strings, bytes and arrays only: it can be encoded.

    lane: SAVE copies device blocks to host slots; LOAD host slots to device blocks, layer by layer, and advances the
    ticket of number `ticket`; WRITE host slots to disk slots, with `digests` and `parents`, the digest of the block
    before each one (zeros: a first block); READ disk slots to host slots, checks `digests`, and stops at the first
    block that is not what it should be. PUT copies host slots to the shared store, with `digests` and `parents`, and
    FETCH brings `digests` from there to host slots, as far as they are good: blocks have no slots there, and `targets`
    or `sources` repeat the host's.
    LAND: blocks `sources` of a path, counted from its root, come from another instance into host slots; whoever shows
    `key` may write them for `lease_s` seconds. PUBLISH: device blocks go to where `offer` says, layer by layer as the
    step that advances the ticket `ticket` computes them (NO_TICKET: they are complete); `targets` are their places in
    the path, counted in blocks of this instance. is_last: no more are sent for that offer; there may be no blocks then.
    number: counts up from 1. priority: lower goes first within a lane. num_bytes: of all its blocks.
    sources, targets: int32 of equal length, without repeats.
    """

    number: int
    lane: str
    priority: int
    num_bytes: int
    sources: np.ndarray
    targets: np.ndarray
    ticket: int = NO_TICKET
    digests: tuple[bytes, ...] = ()
    parents: tuple[bytes, ...] = ()
    key: bytes = b""
    lease_s: float = 0.0
    offer: KVOffer | None = None
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class MoveError:
    """Why a move failed. kind "disk" or "store": it refused, and serving goes on without it; "peer": so did another
    instance, or the way to it; "device": all else."""

    kind: Literal["disk", "store", "peer", "device"]
    message: str


@dataclass(frozen=True, slots=True)
class MoveDone:
    """The result of the move `number`. num_done: how many of its blocks, from the first on, were copied and are good.
    busy_s: seconds while bytes moved; wait_s: seconds from its arrival in the lane to its end."""

    number: int
    num_done: int
    busy_s: float
    wait_s: float
    error: MoveError | None = None


def error_of(lane: str, error: BaseException) -> MoveError:
    """The exception that a move on `lane` raised, as data: an OSError in a lane of the disk or of the shared store is
    theirs, a TransferError another instance's, all else is not."""
    if isinstance(error, OSError) and lane in (WRITE, READ, *STORE_LANES):
        return MoveError("store" if lane in STORE_LANES else "disk", str(error))
    if isinstance(error, TransferError):
        return MoveError("peer", str(error))
    return MoveError("device", f"{type(error).__name__}: {error}")


@dataclass(frozen=True, slots=True, eq=False)
class StoredBlocks:
    """Blocks found on disk at start-up, the oldest first. slots: int32 [N]. digests, parents: uint8 [N, 16]; a parent
    of zeros: a first block."""

    slots: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    digests: np.ndarray = field(default_factory=lambda: np.zeros((0, 16), dtype=np.uint8))
    parents: np.ndarray = field(default_factory=lambda: np.zeros((0, 16), dtype=np.uint8))


@dataclass(frozen=True, slots=True)
class SharedFacts:
    """Where rank 0's blocks lie in a shared store, and how many blocks each rank may add."""

    folder: str
    fingerprint: bytes
    num_blocks: int


@dataclass(frozen=True, slots=True, eq=False)
class TierFacts:
    """What the engine needs to know about the memory below the device. payload_bytes: of one block, as it is moved
    and stored. num_disk_slots 0: there is no disk. shared: None: there is no shared store. windows: by rank, where
    other instances may write KV; none: nowhere."""

    num_host_slots: int
    payload_bytes: int
    num_disk_slots: int = 0
    stored: StoredBlocks = field(default_factory=StoredBlocks)
    shared: SharedFacts | None = None
    windows: tuple[RankWindow, ...] = ()

    @property
    def lanes(self) -> tuple[str, ...]:
        """Those that moves may take."""
        return (*LANES, *TRANSFERS) if self.windows else LANES


class MoveLink(Protocol):
    """The way to the worker that performs moves. Every method belongs to the thread that owns the KV manager."""

    def send(self, move: Move) -> None:
        """Queue a move. A step that is submitted later may name the move's ticket."""
        ...

    def receive(self, timeout_s: float) -> list[MoveDone]:
        """The results that have come since the last call; if there are none, waits up to `timeout_s` for one."""
        ...

    def set_foreground(self, steps_run: bool) -> None:
        """Say whether steps are running: moves that no request waits for are then slowed down."""
        ...

    def end_landing(self, number: int) -> None:
        """Let nobody write any more for the move of this number, on the lane LAND: its result follows, unless it is
        there already."""
        ...

    def close(self) -> None:
        """Let running moves end, drop the queued ones, release memory and disk. No result is received any more."""
        ...


class LaneTotals:
    """Totals of one lane since the start."""

    __slots__ = ("busy_s", "num_bytes", "num_moves", "queued", "wait_s")

    def __init__(self) -> None:
        self.num_moves = 0
        self.num_bytes = 0
        self.busy_s = 0.0  # running
        self.wait_s = 0.0  # from arrival to the end
        self.queued = 0  # submitted and not finished

    def count(self, num_bytes: int, busy_s: float, wait_s: float) -> None:
        """Add a move that has ended."""
        self.num_moves += 1
        self.num_bytes += num_bytes
        self.busy_s += busy_s
        self.wait_s += wait_s
        self.queued -= 1


Finish = Callable[[MoveDone], None]


class OpenMoves:
    """The moves of one engine that have not ended: numbers them, and calls each one's `finish` with its result.

    Every method belongs to the thread that owns the KV manager. payload_bytes: of one block. cost: learns how long
    moves take, by lane.
    """

    def __init__(self, link: MoveLink, payload_bytes: int, cost: OnlineCost, lanes: tuple[str, ...] = LANES):
        self.stats = {lane: LaneTotals() for lane in lanes}
        self.payload_bytes, self.cost, self._link = payload_bytes, cost, link
        self._open: dict[int, tuple[Move, Finish]] = {}
        self._ready: deque[MoveDone] = deque()  # received, and their submitters not told
        self._last_number = 0
        self._foreground = False
        self.on_ended: Callable[[], None] = lambda: None  # called when the submitters of ended moves have been told

    def __len__(self) -> int:
        return len(self._open)

    def submit(self, lane: str, priority: int, sources: np.ndarray, targets: np.ndarray, finish: Finish,
               **terms: Any) -> int:
        """Send a move and return its number. terms: other fields of the `Move`. finish: called with its result by the
        `poll` after it has ended."""
        self._last_number += 1
        move = Move(number=self._last_number, lane=lane, priority=priority, sources=sources, targets=targets,
                    num_bytes=len(sources) * self.payload_bytes, **terms)
        self._open[move.number] = move, finish
        self.stats[lane].queued += 1
        self._link.send(move)
        return move.number

    def seconds(self, lane: str, num_blocks: int) -> float:
        """As the lane's moves so far took; by `ASSUMED_BYTES_PER_S` before the first."""
        num_bytes = num_blocks * self.payload_bytes
        seconds = self.cost.move_s(lane, num_bytes)
        return num_bytes / ASSUMED_BYTES_PER_S if seconds is None else seconds

    def poll(self) -> int:
        """Call `finish` of each move that has ended, then `on_ended`; returns how many moves ended."""
        self._ready.extend(self._link.receive(0.0))
        count = 0
        while self._ready:
            done = self._ready.popleft()
            move, finish = self._open.pop(done.number)
            self.stats[move.lane].count(move.num_bytes, done.busy_s, done.wait_s)
            self.cost.note_move(move.lane, move.num_bytes, done.busy_s)
            finish(done)
            count += 1
        if count:
            self.on_ended()
        return count

    def end_landing(self, number: int) -> None:
        """See `MoveLink.end_landing`."""
        self._link.end_landing(number)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a move has ended, at most `timeout_s`; returns whether `poll` has something to do."""
        if not self._ready:
            self._ready.extend(self._link.receive(timeout_s))
        return bool(self._ready)

    @property
    def foreground(self) -> bool:
        """Whether steps are running: moves that no request waits for are then slowed down."""
        return self._foreground

    @foreground.setter
    def foreground(self, steps_run: bool) -> None:
        if steps_run != self._foreground:
            self._foreground = steps_run
            self._link.set_foreground(steps_run)

    def close(self) -> None:
        """Close the link: running moves end, queued ones are dropped, and no `finish` is called any more."""
        self._link.close()
