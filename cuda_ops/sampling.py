"""Choosing tokens from logits without a sort: thresholds are searched for instead.

Whether a token is kept depends on its logit and, among equals, on its place; so top-k and top-p are each the largest
threshold above which there is enough (tokens; probability). `_threshold` brackets it: seven values between the bounds
are tried in one pass over the row until few numbers are left in between, and those few are bisected by their bits, in
registers. The answer is exact whatever the distribution.

What every row needs, its largest logit and the sum of its weights, is found by a program for each stretch of a row, so
that few rows use the whole device too; what is left is one program a row, which for a row without top-k and top-p looks
at one stretch. Stretches are cut by the vocabulary alone, so that rows are independent.

Letters: S rows, V vocabulary, N stretches of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.launch import config, launch

# May lie anywhere.
COLUMNS = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "uniform_ptr", "values_ptr", "counts_ptr",
           "sums_ptr", "out_ptr"]  # fmt: skip
PIVOTS = 8  # thresholds tried in one pass over a row. Chosen: more take fewer passes, and more registers in each
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


@triton.jit(do_not_specialize=["values_ptr", "counts_ptr"])
def survey_kernel(logits_ptr, values_ptr, counts_ptr, stride, V, STRETCH: tl.constexpr, BLOCK: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """Of one stretch of a row: values [2, S, N], the largest and the smallest finite logit; counts [2, S, N], the first
    id of the largest (V if nothing is larger than -inf), and how many are finite."""
    stretch, row, plane = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1) * tl.num_programs(0)
    row_ptr = logits_ptr + row * stride
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, tl.minimum(STRETCH, V - stretch * STRETCH), BLOCK, num_stages=STAGES):
        ids = stretch * STRETCH + first + lane
        x = _load(row_ptr, ids, V)
        best_id = tl.where(x > best, ids, best_id)
        best = tl.where(x > best, x, best)
        finite = x > float("-inf")
        least = tl.where(finite, tl.minimum(least, x), least)
        count += finite.to(tl.int32)
    most = tl.max(best, 0)
    best_id = tl.min(tl.where((best == most) & (best > float("-inf")), best_id, V), 0)
    at = row * tl.num_programs(0) + stretch
    tl.store(values_ptr + at, most)
    tl.store(values_ptr + plane + at, tl.min(least, 0))
    tl.store(counts_ptr + at, best_id)
    tl.store(counts_ptr + plane + at, tl.sum(count, 0))


@triton.jit
def _surveyed(values_ptr, counts_ptr, row, num_rows, V, N, PAD_N: tl.constexpr):
    """(largest, its first id, smallest finite, how many are finite) of a row."""
    n = tl.arange(0, PAD_N)
    at, plane = row * N + n, num_rows * N
    most_N = tl.load(values_ptr + at, n < N, float("-inf"))
    id_N = tl.load(counts_ptr + at, n < N, V)
    least = tl.min(tl.load(values_ptr + plane + at, n < N, float("inf")), 0)
    finite = tl.sum(tl.load(counts_ptr + plane + at, n < N, 0), 0)
    most = tl.max(most_N, 0)
    first = tl.min(tl.where((most_N == most) & (most_N > float("-inf")), id_N, V), 0)
    return most, tl.where(first < V, first, 0), least, finite


@triton.jit(do_not_specialize=["values_ptr", "counts_ptr", "out_ptr"])
def argmax_kernel(values_ptr, counts_ptr, out_ptr, V, N, PAD_N: tl.constexpr):
    row = tl.program_id(0)
    _, token, _, _ = _surveyed(values_ptr, counts_ptr, row, tl.num_programs(0), V, N, PAD_N)
    tl.store(out_ptr + row, token.to(tl.int64))


@triton.jit(do_not_specialize=["values_ptr", "counts_ptr", "sums_ptr", "temperature_ptr", "min_p_ptr"])
def weigh_kernel(logits_ptr, values_ptr, counts_ptr, sums_ptr, temperature_ptr, min_p_ptr, stride, V,
                 PAD_N: tl.constexpr, STRETCH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """sums [2, S, N]: of all weights of one stretch of a row, and of those that min_p keeps; none of greedy rows."""
    stretch, row, N = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if temperature > 0:
        most, _, _, _ = _surveyed(values_ptr, counts_ptr, row, tl.num_programs(1), V, N, PAD_N)
        min_p = tl.load(min_p_ptr + row).to(tl.float32)
        lane = tl.arange(0, BLOCK)
        all_sums = tl.zeros([BLOCK], tl.float32)
        kept_sums = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, tl.minimum(STRETCH, V - stretch * STRETCH), BLOCK, num_stages=STAGES):
            x = _load(logits_ptr + row * stride, stretch * STRETCH + first + lane, V)
            weight = tl.exp((x - most) / temperature)
            all_sums += weight
            kept_sums += tl.where(weight >= min_p, weight, 0.0)
        at = row * N + stretch
        tl.store(sums_ptr + at, tl.sum(all_sums, 0))
        tl.store(sums_ptr + tl.num_programs(1) * N + at, tl.sum(kept_sums, 0))


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
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, values_ptr, counts_ptr, sums_ptr,
    scratch_ptr, out_ptr, stride, V, N, PAD_N: tl.constexpr, STRETCH: tl.constexpr, PIVOTS: tl.constexpr,
    SEARCH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    scratch_ptr += row * CANDIDATES
    lane = tl.arange(0, BLOCK)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    most, token, least, finite = _surveyed(values_ptr, counts_ptr, row, tl.num_programs(0), V, N, PAD_N)
    if (temperature > 0) & (finite > 0):
        top_k = tl.load(top_k_ptr + row).to(tl.int32)
        top_p = tl.load(top_p_ptr + row).to(tl.float32)
        min_p = tl.load(min_p_ptr + row).to(tl.float32)
        n = tl.arange(0, PAD_N)
        kept_N = tl.load(sums_ptr + (tl.num_programs(0) + row) * N + n, n < N, 0.0)
        everything = tl.sum(tl.load(sums_ptr + row * N + n, n < N, 0.0), 0)
        kept, floor = tl.sum(kept_N, 0), _key(least)
        is_cut = (top_k > 0) & (top_k < finite)
        if is_cut:
            floor, _ = _threshold(row_ptr, scratch_ptr, V, most, least, top_k.to(tl.float32), temperature, floor, 0.0,
                                  True, PIVOTS, SEARCH, STAGES)  # fmt: skip
            all_sums = tl.zeros([BLOCK], tl.float32)
            kept_sums = tl.zeros([BLOCK], tl.float32)
            for first in tl.range(0, V, BLOCK, num_stages=STAGES):
                x = _load(row_ptr, first + lane, V)
                weight = tl.where(_key(x) >= floor, tl.exp((x - most) / temperature), 0.0)
                all_sums += weight
                kept_sums += tl.where(weight >= min_p, weight, 0.0)
            everything, kept = tl.sum(all_sums, 0), tl.sum(kept_sums, 0)
        target = tl.maximum(top_p * everything, 1e-30)  # the likeliest token stays
        edge, equals = floor, V
        if (top_p < 1) & (kept > target):
            is_cut = is_cut | True
            edge, above = _threshold(row_ptr, scratch_ptr, V, most, least, target, temperature, floor, min_p,
                                     False, PIVOTS, SEARCH, STAGES)  # fmt: skip
            edge_weight = tl.exp((_number(edge) - most) / temperature)
            equals = tl.maximum(tl.ceil((target - above) / edge_weight), 1.0).to(tl.int32)
            kept = above + equals.to(tl.float32) * edge_weight
        target = kept * tl.load(uniform_ptr + row).to(tl.float32)
        begin, end, running = 0, V, 0.0
        if is_cut == 0:
            # The stretch in which the sum passes the target, or, by rounding, the last one with any weight.
            chosen = tl.sum((tl.cumsum(kept_N, 0) <= target).to(tl.int32), 0)
            chosen = tl.minimum(chosen, tl.max(tl.where(kept_N > 0, n, 0), 0))
            running = tl.sum(tl.where(n < chosen, kept_N, 0.0), 0)
            begin, end = chosen * STRETCH, tl.minimum((chosen + 1) * STRETCH, V)
        token = _invert(row_ptr, begin, end, running, most, temperature, min_p, floor, edge, equals, target, V, BLOCK)
    tl.store(out_ptr + row, token.to(tl.int64))


@triton.jit
def _invert(row_ptr, begin, end, running, most, temperature, min_p, floor, edge, equals, target, V,
            BLOCK: tl.constexpr):  # fmt: skip
    """The first id of [begin, end) at which the running sum of kept weights exceeds `target`, or the last kept one."""
    lane = tl.arange(0, BLOCK)
    first, met, token, last = begin, 0, V, begin
    while (first < end) & (token == V):
        ids = first + lane
        x = _load(row_ptr, ids, end)
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


class Survey:
    """What `survey_kernel` finds, and the constants of the kernels that read it."""

    def __init__(self, logits_SV: Tensor):
        assert logits_SV.stride(1) == 1
        (self.S, self.V), device = logits_SV.shape, logits_SV.device
        self.numbers = config("survey", "any", logits_SV)
        self.N = triton.cdiv(self.V, self.numbers["STRETCH"])
        self.pad = triton.next_power_of_2(self.N)
        self.values = torch.empty(2, self.S, self.N, dtype=torch.float32, device=device)
        self.counts = torch.empty(2, self.S, self.N, dtype=torch.int32, device=device)
        launch(survey_kernel, (self.N, self.S), logits_SV, self.values, self.counts, logits_SV.stride(0), self.V,
               **self.numbers)  # fmt: skip


def argmax(logits_SV: Tensor) -> Tensor:
    survey = Survey(logits_SV)
    out_S = torch.empty(survey.S, dtype=torch.int64, device=logits_SV.device)
    launch(argmax_kernel, (survey.S,), survey.values, survey.counts, out_S, survey.V, survey.N, PAD_N=survey.pad,
           num_warps=1)  # fmt: skip
    return out_S


def sample(
    logits_SV: Tensor, temperature_S: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor, uniform_S: Tensor
) -> Tensor:
    survey, device = Survey(logits_SV), logits_SV.device
    S, V, N, stride = survey.S, survey.V, survey.N, logits_SV.stride(0)
    sums = torch.empty(2, S, N, dtype=torch.float32, device=device)
    launch(weigh_kernel, (N, S), logits_SV, survey.values, survey.counts, sums, temperature_S, min_p_S, stride, V,
           PAD_N=survey.pad, **survey.numbers)  # fmt: skip
    out_S = torch.empty(S, dtype=torch.int64, device=device)
    scratch = torch.empty(S, CANDIDATES.value, dtype=torch.float32, device=device)
    launch(sample_kernel, (S,), logits_SV, temperature_S, top_k_S, top_p_S, min_p_S, uniform_S, survey.values,
           survey.counts, sums, scratch, out_S, stride, V, N, PAD_N=survey.pad, STRETCH=survey.numbers["STRETCH"],
           PIVOTS=PIVOTS, **config("sample", "any", logits_SV))  # fmt: skip
    return out_S
