"""`PlanBuilder`: a step under construction; `build` turns it into the value that goes to the runner."""

from __future__ import annotations

import numpy as np

from xllm.kv.manager import KVManager
from xllm.kv.moves import NO_TICKET
from xllm.scheduler.row_table import RowTable
from xllm.scheduler.token_budget import Share, TokenBudget
from xllm.step import NewRow, ScheduleOutput

NOTHING_REPLACED = np.zeros((0, 3), dtype=np.int32)


class PlanBuilder:
    """Filled while the scheduler decides; every list is in the order of the decisions. `grow` and `commit` take effect
    at once: the row table's counters, the budget and the block tables then stand as after the step."""

    __slots__ = ("_kv", "_table", "budget", "copies", "grown_ids", "grown_rows", "new_rows", "publish_ticket", "shares",
                 "stalled", "step", "tickets")

    def __init__(self, step: int, table: RowTable, kv: KVManager, budget: TokenBudget) -> None:
        self.step, self.budget = step, budget
        self._table, self._kv = table, kv
        self.stalled = False  # a running row found no block
        self.shares: list[Share] = []
        self.new_rows: list[NewRow] = []
        self.grown_rows: list[np.ndarray] = []
        self.grown_ids: list[np.ndarray] = []
        self.copies: list[tuple[int, int]] = []  # (src, dst)
        self.tickets: set[int] = set()
        self.publish_ticket = NO_TICKET

    def has(self, row: int) -> bool:
        """Whether the row is part of the step already."""
        return bool(self._table.last_step[row] == self.step)

    def grow(self, rows: np.ndarray, need: np.ndarray) -> None:
        """Append `need[i]` new blocks to the table of `rows[i]`; they must be available."""
        growing = need > 0
        grown_rows, grown_ids = self._kv.grow(rows[growing], need[growing])
        self.grown_rows.append(grown_rows)
        self.grown_ids.append(grown_ids)

    def commit(self, share: Share) -> None:
        """Add a share to the step: take it from the budget, and move its rows' `upper` and `cursor` as if every draft
        were accepted."""
        table, rows = self._table, share.rows
        self.budget.take(share)
        samples = share.tokens == share.wanted
        table.upper[rows] += np.where(samples, 1 + share.drafts, 0)
        table.cursor[rows] += share.tokens + share.drafts
        table.in_flight[rows] += 1
        table.last_step[rows] = self.step
        self.shares.append(share)

    def build(self, released: tuple[int, ...] = (), replaced: np.ndarray = NOTHING_REPLACED) -> ScheduleOutput:
        """The finished plan. replaced: int32 [C, 3] of (row, place, block), see `KVManager.take_replaced`."""
        rows, tokens, drafts, wanted = (_join([getattr(s, name) for s in self.shares])
                                        for name in ("rows", "tokens", "drafts", "wanted"))
        copies = np.array(self.copies, dtype=np.int32).reshape(-1, 2)
        return ScheduleOutput(
            step=self.step, rows_S=rows.astype(np.int32), num_tokens_S=tokens.astype(np.int32),
            max_drafts_S=drafts.astype(np.int32), samples_S=tokens == wanted,
            new_rows=tuple(self.new_rows), released_rows=released,
            append_rows_B=_join(self.grown_rows).astype(np.int32), append_ids_B=_join(self.grown_ids).astype(np.int32),
            replace_rows_C=replaced[:, 0], replace_places_C=replaced[:, 1], replace_ids_C=replaced[:, 2],
            copy_src=copies[:, 0], copy_dst=copies[:, 1], tickets=tuple(sorted(self.tickets)),
            publish_ticket=self.publish_ticket,
        )


def _join(parts: list[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
