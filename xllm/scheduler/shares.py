"""What each tenant's share of a step, of the rows and of the blocks is, where tenants share fairly. Pure functions.

Letters: T tenants, R rows in order of service. Arrays are float64 or int64.
"""

from __future__ import annotations

import numpy as np

SLOWER = 2.0  # a step may take so many times what a tenant's exact share of the time allows: larger batches are cheaper
LONGEST_STEP_S = 0.2  # that is planned: whoever comes waits for up to two of them
QUANTUM = 1024.0  # weighted tokens that a tenant's only row may be ahead before it makes room


def tokens_of_step(demand_T: np.ndarray, weight_T: np.ndarray, line: tuple[float, float]) -> np.ndarray | None:
    """How many tokens of a step each tenant may have, so that none of them is slowed down beyond its share.

    demand_T: what each would have in this step; 0: it asks for nothing. line: a step's cost, (base, per token). Alone a
    tenant's step would take base + per_token * demand; beside others it has its weight's share of the time, so it may
    take that much longer, and `SLOWER` times that. The tokens which fit into the shortest such time are dealt out by
    weight, what one does not want going to the others. None: everybody may have what it wants.
    """
    asks = demand_T > 0
    if np.count_nonzero(asks) < 2:
        return None
    base, per_token = line
    if per_token <= 0.0:
        return None
    alone_s = base + per_token * demand_T[asks]
    allowed_s = float((alone_s * SLOWER * weight_T[asks].sum() / weight_T[asks]).min())
    num_tokens = (allowed_s - base) / per_token
    if demand_T.sum() <= num_tokens:
        return None
    return deal(demand_T, np.where(asks, weight_T, 0.0), num_tokens)


def longest_step(line: tuple[float, float]) -> int:
    """How many tokens a step of LONGEST_STEP_S has."""
    base, per_token = line
    return 2**31 if per_token <= 0.0 else int(max(LONGEST_STEP_S - base, 0.0) / per_token)


def deal(demand_T: np.ndarray, weight_T: np.ndarray, total: float) -> np.ndarray:
    """Deal `total` out by weight, nobody getting more than its demand (max-min fairness). Whole numbers, at least one
    for each that asks."""
    given, open_T = np.zeros(len(demand_T)), demand_T > 0
    while open_T.any() and total > 0:
        part = total * weight_T / weight_T[open_T].sum()
        sated = open_T & (demand_T <= part)
        if not sated.any():
            given[open_T] = part[open_T]
            break
        given[sated] = demand_T[sated]
        total -= float(demand_T[sated].sum())
        open_T &= ~sated
    return np.where(demand_T > 0, np.maximum(given.astype(np.int64), 1), 0)


def limit_rows(wanted_R: np.ndarray, slot_R: np.ndarray, last_step_R: np.ndarray, demand_T: np.ndarray,
               allowed_T: np.ndarray) -> np.ndarray:
    """How many tokens each row may have (int64 [R]): within a tenant that may not have all, the rows that were served
    longest ago come first."""
    limit = wanted_R.copy()
    for slot in np.flatnonzero(allowed_T < demand_T).tolist():
        rows = np.flatnonzero(slot_R == slot)
        rows = rows[np.argsort(last_step_R[rows], kind="stable")]
        before = np.cumsum(wanted_R[rows]) - wanted_R[rows]
        limit[rows] = np.clip(allowed_T[slot] - before, 0, wanted_R[rows])
    return limit


def who_yields(slot: int, use_T: np.ndarray, num_rows_T: np.ndarray, weight_T: np.ndarray, served_T: np.ndarray,
               one_row: float) -> int | None:
    """The tenant that gives a row to `slot`, which waits and cannot get in; None: it must wait.

    use_T: share of the rows or blocks that each holds, whichever is more. one_row: what one more row would add. A
    tenant below its share takes from the one farthest beyond its own. A tenant's only row goes only when it has been
    served a quantum more: they take turns where there are more tenants than rows.
    """
    asks = num_rows_T > 0
    asks[slot] = True
    fair_T = np.where(asks, weight_T, 0.0) / weight_T[asks].sum()
    if num_rows_T[slot] and use_T[slot] + one_row > fair_T[slot]:
        return None
    many = (num_rows_T > 1) & (use_T > fair_T)
    many[slot] = False
    if many.any():
        return int(np.argmax(np.where(many, use_T / weight_T, -1.0)))
    if num_rows_T[slot]:
        return None
    ahead = (num_rows_T == 1) & (served_T - served_T[slot] > QUANTUM)
    return int(np.argmax(np.where(ahead, served_T, -np.inf))) if ahead.any() else None
