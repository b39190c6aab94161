"""`PlanBuilder`: a step under construction; `build` turns it into the value that goes to the runner."""

from __future__ import annotations

import numpy as np

from xllm.scheduler.budget import Share
from xllm.step import NewRow, ScheduleOutput

NOTHING_REPLACED = np.zeros((0, 3), dtype=np.int32)


class PlanBuilder:
    """Filled by the scheduler while it decides; every list is in the order of deciding."""

    __slots__ = ("copies", "grown_ids", "grown_rows", "new_rows", "shares", "tickets")

    def __init__(self) -> None:
        self.shares: list[Share] = []
        self.new_rows: list[NewRow] = []
        self.grown_rows: list[np.ndarray] = []
        self.grown_ids: list[np.ndarray] = []
        self.copies: list[tuple[int, int]] = []  # (src, dst)
        self.tickets: set[int] = set()

    def build(self, step: int, released: tuple[int, ...] = (),
              replaced: np.ndarray = NOTHING_REPLACED) -> ScheduleOutput:
        """The finished plan. replaced: int32 [C, 3] of (row, place, block), see `KVManager.take_replaced`."""
        rows, tokens, drafts, wanted = (_join([getattr(s, name) for s in self.shares])
                                        for name in ("rows", "tokens", "drafts", "wanted"))
        copies = np.array(self.copies, dtype=np.int32).reshape(-1, 2)
        return ScheduleOutput(
            step=step, rows_S=rows.astype(np.int32), num_tokens_S=tokens.astype(np.int32),
            max_drafts_S=drafts.astype(np.int32), samples_S=tokens == wanted,
            new_rows=tuple(self.new_rows), released_rows=released,
            append_rows_B=_join(self.grown_rows).astype(np.int32), append_ids_B=_join(self.grown_ids).astype(np.int32),
            replace_rows_C=replaced[:, 0], replace_places_C=replaced[:, 1], replace_ids_C=replaced[:, 2],
            copy_src=copies[:, 0], copy_dst=copies[:, 1], tickets=tuple(sorted(self.tickets)),
        )


def _join(parts: list[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
