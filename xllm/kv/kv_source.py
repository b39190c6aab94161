"""`KVSource`: the storage below the device's KV cache, from which more of a prompt's prefix may be loaded.

Implementations: `NoSource` (there is none) and `TieredStore` (`tiers.py`: host memory, disk and a shared store).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from xllm.kv.lift import Lift
from xllm.kv.prefix_index import PrefixMatch
from xllm.kv.promotion import Stage
from xllm.kv.tier_index import TierIndex
from xllm.stats import SourceStats

_NO_SLOTS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Extension:
    """The part of a prompt's prefix that is stored below the device: slots of the whole path, root first, int32.

    host_path: the blocks that host memory has. disk_path: the blocks that disk has, if they are more; else empty.
    stored: the digests of the blocks behind those, which the shared store has.
    """

    host_path: np.ndarray
    disk_path: np.ndarray
    stored: tuple[bytes, ...] = ()

    @property
    def num_blocks(self) -> int:
        """Of the whole path."""
        return max(len(self.host_path), len(self.disk_path)) + len(self.stored)

    @property
    def is_below_host(self) -> bool:
        """Whether disk or the store has blocks of it that host memory lacks."""
        return bool(len(self.disk_path)) or bool(self.stored)

    def on_host(self, num_resident: int) -> int:
        """How many blocks host memory has beyond those resident on the device."""
        return max(0, len(self.host_path) - num_resident)


NO_EXTENSION = Extension(_NO_SLOTS, _NO_SLOTS)


class KVSource(Protocol):
    """Called by `KVManager` only, in its thread; `stats` in any. Paths are device blocks, root first, int32."""

    has_tiers: bool  # KV that is evicted from the device may be found again

    @property
    def indexes(self) -> Sequence[TierIndex]:
        """Of the tiers."""

    # --- what the KV manager reports

    def committed(self, block_ids: Sequence[int], digests: Sequence[bytes]) -> None:
        """Called when these device blocks have become findable under these digests."""
        ...

    def released(self, path: np.ndarray, *, swap: bool) -> None:
        """Called before a row gives back its findable blocks: the source may begin to copy them. swap: the row was
        preempted, and its request will want them again soon."""
        ...

    def turn_began(self, session_id: str | None, path: np.ndarray, clock: Callable[[], float]) -> None:
        """Called when a request is admitted for the first time; `path`: the blocks of its prefix hit."""
        ...

    def turn_ended(self, session_id: str | None, path: np.ndarray, clock: Callable[[], float]) -> None:
        """Called when a request has ended normally; `path`: the findable blocks that it leaves, at least one."""
        ...

    # --- finding and bringing up

    @property
    def can_stage(self) -> bool:
        """Whether `extend` may find blocks on disk or in a shared store, which `stage` must bring to host memory
        first."""
        ...

    def extend(self, match: PrefixMatch, token_ids: np.ndarray) -> Extension:
        """Find the blocks stored below the device that continue the device hit `match` of `token_ids` (int32). The last
        token is never matched: it is left to compute. Changes nothing."""
        ...

    def stage(self, extension: Extension, priority: int) -> Stage:
        """Begin to copy what `extension` has below host memory there; returns the stage, or the one already open for
        the same path. Lower priorities go first."""
        ...

    def lift(self, resident: np.ndarray, extension: Extension, priority: int) -> Lift:
        """Begin to copy what `extension` has below host memory to the device through a few host slots, for a path that
        does not fit into host memory.

        resident: the device blocks that begin the path; the lift holds them, and those that it loads, until it is done.
        """
        ...

    def load(self, resident: np.ndarray, extension: Extension, priority: int) -> np.ndarray:
        """Begin to copy the host blocks of `extension` to the device; returns the device blocks of the whole path
        (int32), which are findable at once.

        resident: the device blocks that begin the path. The blocks needed must be available. The load holds the path
        until it is complete.
        """
        ...

    @property
    def num_loading(self) -> int:
        """How many loads and lifts are not complete."""
        ...

    def open_tickets(self, block_ids: np.ndarray) -> tuple[int, ...]:
        """The tickets of incomplete loads into these blocks; a step that reads the blocks must wait for them."""
        ...

    def is_open(self, ticket: int) -> bool:
        """Whether that load is not complete."""
        ...

    def move_s(self, lane: str, num_blocks: int) -> float:
        """The expected time in seconds to move `num_blocks` blocks on a lane."""
        ...

    # --- turns of the owner

    def poll(self, now_s: float) -> int:
        """Take in the moves that have ended and begin those that are due; returns how many ended."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a move has ended, at most `timeout_s`. Returns False at once if none is under way."""
        ...

    def idle_s(self, now_s: float) -> float | None:
        """In how many seconds an otherwise idle engine should call `poll`; None: not before something else happens."""
        ...

    def set_foreground(self, steps_run: bool) -> None:
        """Say whether steps are running: moves that no request waits for are then slowed down."""
        ...

    def clear(self) -> None:
        """Drop the blocks in host memory that nothing holds. What is on disk stays."""
        ...

    def close(self, flush_s: float) -> None:
        """End all moves. With a disk, first spend up to `flush_s` seconds on copying the device's blocks there."""
        ...

    # --- audit

    def stats(self, missed_total: dict[str, dict[str, int]]) -> SourceStats:
        """Reads only, so another thread may call it. missed_total: see `MovePerformer.missed_total`."""
        ...

    def held_paths(self) -> list[np.ndarray]:
        """The device blocks that open loads and lifts hold, a path each."""
        ...

    def check_integrity(self) -> None:
        """Raise IntegrityError if anything is inconsistent."""
        ...


class NoSource:
    """The `KVSource` of an engine without KV tiers: it finds nothing, and evicted KV is computed again."""

    has_tiers = False
    indexes: Sequence[TierIndex] = ()
    can_stage = False
    num_loading = 0

    def committed(self, block_ids: Sequence[int], digests: Sequence[bytes]) -> None:
        pass

    def released(self, path: np.ndarray, *, swap: bool) -> None:
        pass

    def turn_began(self, session_id: str | None, path: np.ndarray, clock: Callable[[], float]) -> None:
        pass

    def turn_ended(self, session_id: str | None, path: np.ndarray, clock: Callable[[], float]) -> None:
        pass

    def extend(self, match: PrefixMatch, token_ids: np.ndarray) -> Extension:
        return NO_EXTENSION

    def stage(self, extension: Extension, priority: int) -> Stage:
        raise AssertionError("there is nothing to stage")

    def lift(self, resident: np.ndarray, extension: Extension, priority: int) -> Lift:
        raise AssertionError("there is nothing to lift")

    def load(self, resident: np.ndarray, extension: Extension, priority: int) -> np.ndarray:
        raise AssertionError("there is nothing to load")

    def open_tickets(self, block_ids: np.ndarray) -> tuple[int, ...]:
        return ()

    def is_open(self, ticket: int) -> bool:
        return False

    def move_s(self, lane: str, num_blocks: int) -> float:
        return float("inf")

    def poll(self, now_s: float) -> int:
        return 0

    def wait(self, timeout_s: float) -> bool:
        return False

    def idle_s(self, now_s: float) -> float | None:
        return None

    def set_foreground(self, steps_run: bool) -> None:
        pass

    def clear(self) -> None:
        pass

    def close(self, flush_s: float) -> None:
        pass

    def stats(self, missed_total: dict[str, dict[str, int]]) -> SourceStats:
        return SourceStats()

    def held_paths(self) -> list[np.ndarray]:
        return []

    def check_integrity(self) -> None:
        pass
