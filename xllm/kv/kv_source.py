"""`KVSource`: what stands behind the device's KV cache: where the rest of a prefix may come from.

`NoSource` stands for nothing; `TieredStore` (`tiers.py`) for host memory and disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from xllm.kv.lift import Lift
from xllm.kv.prefix_index import PrefixMatch
from xllm.kv.promotion import Stage
from xllm.stats import SourceStats

_NO_SLOTS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Extension:
    """Where a prompt's prefix goes on below the device: slots of its whole path, root first, int32. Empty: nowhere.

    host_path: as far as host memory has it. disk_path: as far as disk has it, if that is farther.
    """

    host_path: np.ndarray
    disk_path: np.ndarray

    def on_host(self, num_resident: int) -> int:
        """How many blocks host memory has beyond those resident on the device."""
        return max(0, len(self.host_path) - num_resident)


NO_EXTENSION = Extension(_NO_SLOTS, _NO_SLOTS)


class KVSource(Protocol):
    """Every method belongs to the KV manager's thread, but for `stats`. Paths are device blocks, root first, int32."""

    has_tiers: bool  # KV that leaves the device may be found again

    # --- what the KV manager tells

    def committed(self, block_ids: Sequence[int], digests: Sequence[bytes]) -> None:
        """These device blocks hold these contents from now on."""
        ...

    def released(self, path: np.ndarray, *, swap: bool) -> None:
        """A row is about to give back its findable blocks. swap: it will be back soon."""
        ...

    def turn_began(self, session_id: str | None, path: np.ndarray, clock: Callable[[], float]) -> None:
        """A request got in with this hit."""
        ...

    def turn_ended(self, session_id: str | None, path: np.ndarray, clock: Callable[[], float]) -> None:
        """A request ended well and leaves these findable blocks, at least one."""
        ...

    # --- finding and bringing up

    @property
    def can_stage(self) -> bool:
        """Whether `extend` may find anything that has to be staged first."""
        ...

    def extend(self, match: PrefixMatch, token_ids: np.ndarray) -> Extension:
        """Where the prefix of `token_ids` (int32; its last token is left to compute) goes on below the device."""
        ...

    def stage(self, extension: Extension, priority: int) -> Stage:
        """Bring what lies on disk to host memory, or join whoever does already."""
        ...

    def lift(self, resident: np.ndarray, extension: Extension, priority: int) -> Lift:
        """Bring what lies on disk to the device past host memory, which has no room for it.

        resident: the device blocks that begin the path; the lift holds them, and what it brings, until it is done.
        """
        ...

    def load(self, resident: np.ndarray, extension: Extension, priority: int) -> np.ndarray:
        """Bring what host memory has to the device; returns the whole path there, which is findable now.

        resident: the device blocks that begin it. The blocks needed must be available. The load holds the path until
        it is complete.
        """
        ...

    @property
    def num_loading(self) -> int:
        """Loads that are not complete."""
        ...

    def open_tickets(self, block_ids: np.ndarray) -> tuple[int, ...]:
        """The loads that whoever reads these blocks must wait for."""
        ...

    def is_open(self, ticket: int) -> bool:
        """Whether that load is not complete."""
        ...

    def move_s(self, lane: str, num_blocks: int) -> float:
        """How long so many blocks are expected to take on a lane."""
        ...

    # --- turns of the owner

    def poll(self, now_s: float) -> int:
        """Take in what has moved and begin what is due; returns how many moves ended."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a move has ended or the time is over. False, at once: none is under way."""
        ...

    def idle_s(self, now_s: float) -> float | None:
        """How soon `poll` is worth calling while the engine has nothing else to do; None: never."""
        ...

    def set_foreground(self, steps_run: bool) -> None:
        """While steps run, moves that nobody waits for go slowly."""
        ...

    def clear(self) -> None:
        """Forget what nobody uses, but for what is on disk."""
        ...

    def close(self, flush_s: float) -> None:
        """End all moves; first spend up to `flush_s` on storing what shall outlive the process."""
        ...

    # --- audit

    def stats(self, missed_total: dict[str, int]) -> SourceStats:
        """Reads only, so another thread may call it. missed_total: see `MovePerformer.missed_total`."""
        ...

    def held_paths(self) -> list[np.ndarray]:
        """The device blocks that open loads hold."""
        ...

    def check_integrity(self) -> None:
        """Raise IntegrityError if anything is inconsistent."""
        ...


class NoSource:
    """Nothing stands below the device: what it evicts is computed again."""

    has_tiers = False
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

    def stats(self, missed_total: dict[str, int]) -> SourceStats:
        return SourceStats()

    def held_paths(self) -> list[np.ndarray]:
        return []

    def check_integrity(self) -> None:
        pass
