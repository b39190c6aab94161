"""Choosing tokens from logits without a sort: thresholds are searched for instead.

Whether a token is kept depends on its logit and, among equals, on its place; so top-k and top-p are each the largest
threshold above which there is enough (tokens; probability). `_threshold` brackets it: seven values between the bounds
are tried in one pass over the row until few numbers are left in between, and those few are bisected by their bits, in
registers. The answer is exact whatever the distribution. One program a row, so that rows are independent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.launch import config, launch

COLUMNS = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "uniform_ptr", "out_ptr"]  # may lie anywhere
PIVOTS = 8
CANDIDATES = tl.constexpr(4096)
NOTHING = tl.constexpr(-2147483648)  # below the key of every number


@triton.jit
def _load(row_ptr, ids, V):
    """Logits, -inf past the end; a zero has no sign, since equal numbers need equal keys."""
    x = tl.load(row_ptr + ids, ids < V, float("-inf")).to(tl.float32)
    return tl.where(x == 0, 0.0, x)


@triton.jit
def _key(x):
    """Integers in the order of the numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _number(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _largest(row_ptr, V, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """(largest, its first id, smallest finite, how many are finite)."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, V, BLOCK, num_stages=STAGES):
        x = _load(row_ptr, first + lane, V)
        best_id = tl.where(x > best, first + lane, best_id)
        best = tl.where(x > best, x, best)
        finite = x > float("-inf")
        least = tl.where(finite, tl.minimum(least, x), least)
        count += finite.to(tl.int32)
    most = tl.max(best, 0)
    # A lane that met nothing has id 0; it may win only if no lane met anything.
    best_id = tl.min(tl.where((best == most) & (best > float("-inf")), best_id, V), 0)
    return most, tl.where(best_id < V, best_id, 0), tl.min(least, 0), tl.sum(count, 0)


@triton.jit(do_not_specialize=["out_ptr"])
def argmax_kernel(logits_ptr, out_ptr, stride, V, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    _, best, _, _ = _largest(logits_ptr + row * stride, V, BLOCK, STAGES)
    tl.store(out_ptr + row, best.to(tl.int64))


@triton.jit
def _amounts(x, key, most, temperature, floor, min_p, COUNT: tl.constexpr):
    """What each number adds to the sum that is searched: one, or its weight if it is kept so far."""
    if COUNT:
        return (x > float("-inf")).to(tl.float32)
    else:
        weight = tl.exp((x - most) / temperature)
        return tl.where((key >= floor) & (weight >= min_p), weight, 0.0)


@triton.jit
def _threshold(
    row_ptr, scratch_ptr, V, most, least, target, temperature, floor, min_p,
    COUNT: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(the largest key at and above which the amounts reach `target`, their sum strictly above it).

    All amounts together must reach the target, and the target be positive.
    """
    lane = tl.arange(0, BLOCK)
    pivot = tl.arange(0, PIVOTS)
    low, high = _key(least), _key(most) + 1
    above = 0.0
    inside = V
    while (inside > CANDIDATES) & (high > low + 1):
        # The lowest pivot is the lower bound itself, of which the answer is known; it brings the count along.
        low_value, high_value = _number(low), _number(high - 1)
        pivots = _key(low_value + (high_value - low_value) * (pivot.to(tl.float32) / PIVOTS))
        middle = (low & high) + ((low ^ high) >> 1)
        pivots = tl.where(pivot == PIVOTS - 1, middle, pivots)  # halves the bits too, whatever the values
        pivots = tl.where(pivot == 0, low, tl.minimum(tl.maximum(pivots, low), high - 1))
        sums = tl.zeros([PIVOTS, BLOCK], tl.float32)
        counts = tl.zeros([PIVOTS, BLOCK], tl.int32)
        for first in tl.range(0, V, BLOCK, num_stages=STAGES):
            x = _load(row_ptr, first + lane, V)
            key = _key(x)
            amount = _amounts(x, key, most, temperature, floor, min_p, COUNT)
            over = (key[None, :] >= pivots[:, None]) & (key < high)[None, :]
            sums += tl.where(over, amount[None, :], 0.0)
            counts += over.to(tl.int32)
        reach = above + tl.sum(sums, 1)
        number = tl.sum(counts, 1)
        enough = (reach >= target) | (pivot == 0)
        low = tl.max(tl.where(enough, pivots, low), 0)
        next_high = tl.min(tl.where(enough, high, pivots), 0)
        within = tl.min(tl.where(enough, number, 2147483647), 0)
        over_next = tl.max(tl.where(enough, 0, number), 0)
        above = tl.where(next_high < high, tl.max(tl.where(enough, above, reach), 0), above)
        inside = within - over_next
        high = next_high

    if high > low + 1:
        kept = 0
        for first in tl.range(0, V, BLOCK, num_stages=STAGES):
            x = _load(row_ptr, first + lane, V)
            key = _key(x)
            wanted = ((key >= low) & (key < high)).to(tl.int32)
            place = kept + tl.cumsum(wanted) - wanted
            tl.store(scratch_ptr + place, x, (wanted > 0) & (place < CANDIDATES))
            kept += tl.sum(wanted)
        tl.debug_barrier()
        candidate = tl.arange(0, CANDIDATES)
        x = tl.load(scratch_ptr + candidate, candidate < kept, float("-inf"))
        key = tl.where(candidate < kept, _key(x), NOTHING)
        amount = _amounts(x, key, most, temperature, floor, min_p, COUNT)
        base = above
        while high > low + 1:
            middle = (low & high) + ((low ^ high) >> 1)
            reach = base + tl.sum(tl.where(key >= middle, amount, 0.0))
            if reach >= target:
                low = middle
            else:
                high = middle
                above = reach
        tl.debug_barrier()  # the scratch is used again
    return low, above


@triton.jit(do_not_specialize=COLUMNS)
def sample_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, scratch_ptr, out_ptr, stride, V,
    PIVOTS: tl.constexpr, SEARCH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    scratch_ptr += row * CANDIDATES
    lane = tl.arange(0, BLOCK)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    most, token, least, finite = _largest(row_ptr, V, BLOCK, STAGES)
    if (temperature > 0) & (finite > 0):
        top_k = tl.load(top_k_ptr + row).to(tl.int32)
        top_p = tl.load(top_p_ptr + row).to(tl.float32)
        min_p = tl.load(min_p_ptr + row).to(tl.float32)
        floor = _key(least)
        if (top_k > 0) & (top_k < finite):
            floor, _ = _threshold(row_ptr, scratch_ptr, V, most, least, top_k.to(tl.float32), temperature, floor, 0.0,
                                  True, PIVOTS, SEARCH, STAGES)  # fmt: skip
        all_sums = tl.zeros([BLOCK], tl.float32)
        kept_sums = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, V, BLOCK, num_stages=STAGES):
            x = _load(row_ptr, first + lane, V)
            weight = tl.where(_key(x) >= floor, tl.exp((x - most) / temperature), 0.0)
            all_sums += weight
            kept_sums += tl.where(weight >= min_p, weight, 0.0)
        kept = tl.sum(kept_sums)
        target = tl.maximum(top_p * tl.sum(all_sums), 1e-30)  # the likeliest token stays
        edge, equals = floor, V
        if (top_p < 1) & (kept > target):
            edge, above = _threshold(row_ptr, scratch_ptr, V, most, least, target, temperature, floor, min_p,
                                     False, PIVOTS, SEARCH, STAGES)  # fmt: skip
            edge_weight = tl.exp((_number(edge) - most) / temperature)
            equals = tl.maximum(tl.ceil((target - above) / edge_weight), 1.0).to(tl.int32)
            kept = above + equals.to(tl.float32) * edge_weight
        token = _invert(row_ptr, V, most, temperature, min_p, floor, edge, equals,
                        kept * tl.load(uniform_ptr + row).to(tl.float32), BLOCK)  # fmt: skip
    tl.store(out_ptr + row, token.to(tl.int64))


@triton.jit
def _invert(row_ptr, V, most, temperature, min_p, floor, edge, equals, target, BLOCK: tl.constexpr):
    """The first id at which the running sum of kept weights exceeds `target`, or the last kept one."""
    lane = tl.arange(0, BLOCK)
    running, first, met, token, last = 0.0, 0, 0, V, 0
    while (first < V) & (token == V):
        ids = first + lane
        x = _load(row_ptr, ids, V)
        key = _key(x)
        weight = tl.exp((x - most) / temperature)
        is_edge = ((key == edge) & (equals < V)).to(tl.int32)
        rank = met + tl.cumsum(is_edge) - is_edge
        kept = (key >= edge) & (key >= floor) & (weight >= min_p) & ((is_edge == 0) | (rank < equals))
        weight = tl.where(kept, weight, 0.0)
        met += tl.sum(is_edge)
        sums = running + tl.cumsum(weight)
        token = tl.min(tl.where((sums > target) & (weight > 0), ids, V))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, ids, 0)))
        running += tl.sum(weight)
        first += BLOCK
    return tl.where(token < V, token, last)


def argmax(logits_SV: Tensor) -> Tensor:
    assert logits_SV.stride(1) == 1
    S, V = logits_SV.shape
    out_S = torch.empty(S, dtype=torch.int64, device=logits_SV.device)
    numbers = config("argmax", "any", logits_SV)
    launch(argmax_kernel, (S,), logits_SV, out_S, logits_SV.stride(0), V, **numbers)
    return out_S


def sample(
    logits_SV: Tensor, temperature_S: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor, uniform_S: Tensor
) -> Tensor:
    assert logits_SV.stride(1) == 1
    S, V = logits_SV.shape
    out_S = torch.empty(S, dtype=torch.int64, device=logits_SV.device)
    scratch = torch.empty(S, CANDIDATES.value, dtype=torch.float32, device=logits_SV.device)
    launch(sample_kernel, (S,), logits_SV, temperature_S, top_k_S, top_p_S, min_p_S, uniform_S, scratch, out_S,
           logits_SV.stride(0), V, PIVOTS=PIVOTS, **config("sample", "any", logits_SV))  # fmt: skip
    return out_S
