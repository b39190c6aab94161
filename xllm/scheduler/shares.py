"""Computes each tenant's share of a step, of the rows and of the blocks, for the policy "fair". Pure functions.

Letters: T tenants, R rows in order of service. Arrays are float64 or int64.
"""

from __future__ import annotations

import numpy as np

# A step may take so many times what a tenant's exact share of the time allows. Chosen: larger batches are cheaper, and
# each tenant is at most that much slower than with its exact share.
SLOWER = 2.0
SHORTEST_S = 1e-12  # a floor under prices of a token, so that nothing is divided by zero
# That is planned, in seconds. Chosen: a request that arrives waits for up to two such steps before its first.
LONGEST_STEP_S = 0.2
# Weighted tokens that a tenant's only row may be ahead before it makes room. Chosen: smaller turns are fairer, and each
# change of turns computes a row anew.
QUANTUM = 1024.0


def sums(slot_R: np.ndarray, of_R: np.ndarray, num: int) -> np.ndarray:
    """Add the rows' numbers up by tenant: float64 [num], 0 for a tenant without rows."""
    return np.bincount(slot_R, weights=of_R, minlength=num).astype(np.float64)


def seconds_of_step(demand_T: np.ndarray, weight_T: np.ndarray, step_s: float) -> np.ndarray | None:
    """How many seconds of a step each tenant may have, so that none of them is slowed down beyond its share.

    demand_T: seconds that each would take of this step; 0: it asks for nothing. step_s: what a step costs by itself.
    Alone a tenant's step would take step_s + demand; beside others it has its weight's share of the time, so it may
    take that much longer, and `SLOWER` times that. What fits into the shortest such time is dealt out by weight, what
    one does not want going to the others. None: every tenant may have what it wants.
    """
    asks = demand_T > 0
    if np.count_nonzero(asks) < 2:
        return None
    allowed_s = (step_s + demand_T[asks]) * SLOWER * weight_T[asks].sum() / weight_T[asks]
    seconds = float(allowed_s.min()) - step_s
    if demand_T.sum() <= seconds:
        return None
    return deal(demand_T, np.where(asks, weight_T, 0.0), seconds)


def deal(demand_T: np.ndarray, weight_T: np.ndarray, total: float) -> np.ndarray:
    """Deal `total` out by weight, no tenant getting more than its demand (max-min fairness): float64 [T]."""
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
    return given


def limit_rows(wanted_R: np.ndarray, price_R: np.ndarray, slot_R: np.ndarray, last_step_R: np.ndarray,
               demand_T: np.ndarray, allowed_T: np.ndarray) -> np.ndarray:
    """How many tokens each row may have (int64 [R]), at `price_R` seconds each: within a tenant that may not have all,
    the rows that were served longest ago come first, and the first of them has one token at least."""
    limit = wanted_R.copy()
    for slot in np.flatnonzero(allowed_T < demand_T).tolist():
        rows = np.flatnonzero(slot_R == slot)
        if not len(rows):
            continue
        rows = rows[np.argsort(last_step_R[rows], kind="stable")]
        cost = wanted_R[rows] * price_R[rows]
        left = np.maximum(allowed_T[slot] - (np.cumsum(cost) - cost), 0.0)
        limit[rows] = np.minimum(left // np.maximum(price_R[rows], SHORTEST_S), wanted_R[rows])
        limit[rows[0]] = max(limit[rows[0]], 1)
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


def who_gives(slot: int, use_T: np.ndarray, num_rows_T: np.ndarray, weight_T: np.ndarray) -> int | None:
    """The tenant that gives up a running row's blocks for a row of `slot`, which needs more of them; None: the row that
    is served last of all gives its blocks, as without tenants.

    use_T: share of the blocks that each holds. It is the tenant farthest beyond its share, `slot` itself if it is that
    one, and never another's only row.
    """
    asks = num_rows_T > 0
    fair_T = np.where(asks, weight_T, 0.0) / weight_T[asks].sum()
    over = np.where((num_rows_T > 1) & (use_T > fair_T), use_T / weight_T, -1.0)
    most = int(np.argmax(over))
    return most if over[most] >= 0.0 else None
