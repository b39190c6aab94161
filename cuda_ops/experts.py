"""Mixtures of experts: routing, rows sorted by expert, one grouped product over all experts that were hit.

The grid is as large as the numbers of tokens, of experts a token and of experts allow, whatever was chosen, so that a
captured graph serves every choice: a map, made on the device, gives each program an expert and some of its rows, or
nothing. That is the scheme of block-sparse mixtures (Gale et al. 2022, "MegaBlocks") with rows that are not padded.

Weights stay where they were allocated, each expert's for itself, and kernels find them by a table of addresses.

Letters: T tokens, E experts, K experts a token, R = T * K rows, B blocks of rows of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.kv_codes import widen_e4m3
from cuda_ops.launch import INTERPRETED, config, launch, wait_for_previous
from cuda_ops.linear import FP8, quantise_rows, scaled_dot, within_runs

# Rows of a block, by how many an expert has on average: a block of 16 reads the weights for few, one of 128 has enough
# rows to be bound by arithmetic. After vLLM's tuned tables for an H200; not measured here.
BLOCK_ROWS = (16, 64, 128)
LEAST_BINS = 32  # of a histogram: a lane of a warp each
ALIGNMENT = tl.constexpr(16)  # bytes, of each expert's weight: of the largest copies
LEAST_SUM = tl.constexpr(1e-20)  # added to a sum of weights, as `RouteOp` says
NOTHING = tl.constexpr(-2147483648)  # below the key of every number


class ExpertWeights:
    """The weights of E experts of one shape, ready for `grouped_linear`.

    packed: as `cuda_ops.linear.linear` takes them, without bias and all of one kind; they are kept as they are but for
    those whose memory does not begin at a multiple of 16 bytes. table_E2: the addresses of each one's weight and scale.
    run: inputs of an output that share a scale, and scales are [G, Y], a row for each run; 0: all do, they are [Y].
    """

    __slots__ = ("dtype", "dynamic", "nbytes", "num_inputs", "num_outputs", "run", "table_E2", "tensors")

    def __init__(self, packed: list[Any], run: int = 0):
        first, self.run = packed[0], run
        self.dtype, self.dynamic = first.weight_YX.dtype, first.dynamic
        self.num_outputs, self.num_inputs = first.weight_YX.shape
        weights = [expert.weight_YX for expert in packed]
        weights = [w.clone() if w.data_ptr() % ALIGNMENT.value else w for w in weights]
        self.tensors = list(zip(weights, (expert.scale_Y for expert in packed)))
        self.nbytes = sum(expert.nbytes for expert in packed)
        addresses = [(weight.data_ptr(), 0 if scale is None else scale.data_ptr()) for weight, scale in self.tensors]
        self.table_E2 = torch.tensor(addresses, dtype=torch.int64, device=first.weight_YX.device)


@dataclass(frozen=True, slots=True)
class RowOrder:
    """tokens_R: whose row stands where; those of an expert follow each other, by token. places_TK: where the row of a
    token and its k-th expert stands. blocks_3B: the expert of each block, its first row and the one behind its expert's
    last; -1 for a block that is not needed. block_rows: rows of a block. All int32."""

    tokens_R: Tensor
    places_TK: Tensor
    blocks_3B: Tensor
    block_rows: int


@triton.jit
def _key(x):
    """Integers in the order of the numbers: NaN like inf, and a zero without a sign."""
    x = tl.where(x == x, tl.where(x == 0, 0.0, x), float("inf"))
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, stride, scale, E, BIAS: tl.constexpr, SIGMOID: tl.constexpr,
    CHOSEN: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, SUMMED: tl.constexpr, RENORMALISE: tl.constexpr,
    PADDED_GROUPS: tl.constexpr, PADDED_WIDTH: tl.constexpr, PADDED_CHOSEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token. Experts are a table, a row for each group; numbers are chosen by keys, and what was chosen has a key
    below all others."""
    wait_for_previous(PDL)
    t = tl.program_id(0).to(tl.int64)
    width = E // GROUPS
    group, lane = tl.arange(0, PADDED_GROUPS)[:, None], tl.arange(0, PADDED_WIDTH)[None, :]
    inside = (group < GROUPS) & (lane < width)
    ids = tl.where(inside, group * width + lane, E)
    logits = tl.load(logits_ptr + t * stride + ids, inside, float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.where(inside, tl.div_rn(tl.full(logits.shape, 1.0, tl.float32), 1 + tl.exp(-logits)), 0.0)
    else:
        powers = tl.where(inside, tl.exp(logits - tl.max(tl.max(logits, 1), 0)), 0.0)
        scores = tl.div_rn(powers, tl.broadcast_to(tl.sum(tl.sum(powers, 1), 0), powers.shape))
    is_wrong = tl.max(tl.max((scores != scores).to(tl.int32), 1), 0) > 0
    scores = tl.where(is_wrong, 0.0, scores)
    wanted = scores
    if BIAS:
        wanted += tl.load(bias_ptr + ids, inside, 0.0).to(tl.float32)
    keys = tl.where(inside, _key(wanted), NOTHING)
    if GROUPS > 1:
        keys = tl.where(_is_kept(keys, wanted, group, lane, GROUPS, KEPT, SUMMED), keys, NOTHING)

    k = tl.arange(0, PADDED_CHOSEN)
    chosen_ids = tl.zeros([PADDED_CHOSEN], tl.int32)
    chosen = tl.zeros([PADDED_CHOSEN], tl.float32)
    total = 0.0
    for i in range(CHOSEN):
        best = tl.max(tl.max(keys, 1), 0)
        id = tl.min(tl.min(tl.where(keys == best, ids, E), 1), 0)
        score = tl.sum(tl.sum(tl.where(ids == id, scores, 0.0), 1), 0)
        chosen_ids = tl.where(k == i, id, chosen_ids)
        chosen = tl.where(k == i, score, chosen)
        total += score
        keys = tl.where(ids == id, NOTHING, keys)
    if RENORMALISE:
        chosen = tl.div_rn(chosen, tl.broadcast_to(total + LEAST_SUM, chosen.shape))
    chosen = tl.where(is_wrong, float("nan"), chosen * scale)
    tl.store(ids_ptr + t * CHOSEN + k, chosen_ids, k < CHOSEN)
    tl.store(weights_ptr + t * CHOSEN + k, chosen, k < CHOSEN)


@triton.jit
def _is_kept(keys, wanted, group, lane, GROUPS: tl.constexpr, KEPT: tl.constexpr, SUMMED: tl.constexpr):
    """Whether a group is among the best, by the sum of its best experts."""
    merit = tl.zeros(group.shape, tl.float32)
    left = keys
    for _ in range(SUMMED):
        best = tl.max(left, 1)[:, None]
        place = tl.min(tl.where(left == best, lane, lane.shape[1]), 1)[:, None]
        merit += tl.sum(tl.where((lane == place) & (left != NOTHING), wanted, 0.0), 1)[:, None]
        left = tl.where(lane == place, NOTHING, left)
    merits = tl.where(group < GROUPS, _key(merit), NOTHING)
    kept = group < 0
    for _ in range(KEPT):
        best = tl.max(merits, 0)[None, :]
        first = tl.min(tl.where(merits == best, group, GROUPS), 0)[None, :]
        kept = kept | (group == first)
        merits = tl.where(group == first, NOTHING, merits)
    return kept


@triton.jit(do_not_specialize=["R", "num_blocks"])
def sort_rows_kernel(ids_ptr, tokens_ptr, places_ptr, blocks_ptr, R, num_blocks, K, ROWS: tl.constexpr,
                     BINS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One expert: where its rows begin is how many rows those before it have, which each program counts for itself."""
    wait_for_previous(PDL)
    expert, lane, bins = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for first in tl.range(0, R, BLOCK):
        counts += tl.histogram(tl.load(ids_ptr + first + lane, first + lane < R, 0), BINS, first + lane < R)
    needed = (counts + ROWS - 1) // ROWS
    row = tl.sum(tl.where(bins < expert, counts, 0), 0)
    end = row + tl.sum(tl.where(bins == expert, counts, 0), 0)
    block = tl.sum(tl.where(bins < expert, needed, 0), 0)
    num_own = tl.sum(tl.where(bins == expert, needed, 0), 0)
    for first in tl.range(0, num_own, BLOCK):
        own = first + lane
        tl.store(blocks_ptr + block + own, expert, own < num_own)
        tl.store(blocks_ptr + num_blocks + block + own, row + own * ROWS, own < num_own)
        tl.store(blocks_ptr + 2 * num_blocks + block + own, end, own < num_own)
    if expert == tl.num_programs(0) - 1:
        for first in tl.range(block + num_own, num_blocks, BLOCK):
            tl.store(blocks_ptr + first + lane, -1, first + lane < num_blocks)
    if row < end:
        for first in tl.range(0, R, BLOCK):
            ids = tl.load(ids_ptr + first + lane, first + lane < R, -1)
            is_own = (ids == expert).to(tl.int32)
            place = row + tl.cumsum(is_own, 0) - 1
            tl.store(tokens_ptr + place, (first + lane) // K, is_own > 0)
            tl.store(places_ptr + first + lane, place, is_own > 0)
            row += tl.sum(is_own, 0)


@triton.jit
def _tile(Y, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(block, tile of outputs, number of blocks). GROUP blocks follow each other through each tile of outputs, so that
    the weights that they share are read while they lie in the cache."""
    num_tiles = tl.cdiv(Y, COLUMNS)
    num_blocks = tl.num_programs(0) // num_tiles
    first = tl.program_id(0) // (GROUP * num_tiles) * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    place = tl.program_id(0) % (GROUP * num_tiles)
    return first + place % size, place // size, num_blocks


@triton.jit
def _source(tokens_ptr, row, end, FROM_TOKENS: tl.constexpr):
    """The rows of x that these rows are computed from."""
    if FROM_TOKENS:
        return tl.load(tokens_ptr + row, row < end, 0).to(tl.int64)
    else:
        return row.to(tl.int64)


@triton.jit
def _weight(table_ptr, expert, first, dtype: tl.constexpr):
    """The place of number `first`, a multiple of 16, of an expert's weight. The compiler forgets what it knows of a
    number as that becomes a pointer, so that it is told of the pointer that is the sum."""
    start = tl.load(table_ptr + expert * 2).to(tl.pointer_type(dtype))
    return tl.multiple_of(start + first, ALIGNMENT)


@triton.jit
def _scales(table_ptr, expert, y, Y):
    """Of an expert's outputs y."""
    start = tl.load(table_ptr + expert * 2 + 1).to(tl.pointer_type(tl.float32))
    return tl.load(start + y, y < Y, 0.0)


@triton.jit
def grouped_linear_kernel(
    x_ptr, table_ptr, tokens_ptr, blocks_ptr, y_ptr, Y, X, x_stride, FROM_TOKENS: tl.constexpr, CODES: tl.constexpr,
    RUN: tl.constexpr, FP8: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A block's rows times some outputs of its expert's weight; as `linear_bytes_kernel` with CODES."""
    wait_for_previous(PDL)
    block, tile, num_blocks = _tile(Y, COLUMNS, GROUP)
    expert = tl.load(blocks_ptr + block)
    if expert < 0:
        return
    row = tl.load(blocks_ptr + num_blocks + block) + tl.arange(0, ROWS)
    end = tl.load(blocks_ptr + 2 * num_blocks + block)
    y, k = tile * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    x_ptrs = x_ptr + _source(tokens_ptr, row, end, FROM_TOKENS)[:, None] * x_stride + k[None, :]
    dtype: tl.constexpr = tl.int8 if CODES else x_ptr.dtype.element_ty
    weight_ptr = _weight(table_ptr, expert, tile.to(tl.int64) * COLUMNS * X, dtype)
    scale_ptr = tl.load(table_ptr + expert * 2 + 1).to(tl.pointer_type(tl.float32))
    weight_ptrs = weight_ptr + tl.arange(0, COLUMNS)[:, None] * X + k[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, X, DEPTH):
        left = X - first
        x = tl.load(x_ptrs + first, (row[:, None] < end) & (k[None, :] < left), 0.0)
        weight = tl.load(weight_ptrs + first, (y[:, None] < Y) & (k[None, :] < left), 0)
        if UPCAST:
            x = x.to(tl.float32)
        if FP8:
            weight = widen_e4m3(weight, x.dtype)
        else:
            weight = weight.to(x.dtype)
        if RUN:
            acc += scaled_dot(x, weight, scale_ptr, first, y, Y, X, RUN, DEPTH)
        else:
            acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if CODES and RUN == 0:
        acc *= _scales(table_ptr, expert, y, Y)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * Y + y[None, :], acc, (row[:, None] < end) & (y[None, :] < Y))


@triton.jit
def grouped_w8a8_kernel(
    codes_ptr, row_scale_ptr, table_ptr, tokens_ptr, blocks_ptr, y_ptr, Y, X, FROM_TOKENS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `linear_w8a8_kernel`, the same bits."""
    wait_for_previous(PDL)
    block, tile, num_blocks = _tile(Y, COLUMNS, GROUP)
    expert = tl.load(blocks_ptr + block)
    if expert < 0:
        return
    row = tl.load(blocks_ptr + num_blocks + block) + tl.arange(0, ROWS)
    end = tl.load(blocks_ptr + 2 * num_blocks + block)
    y, k = tile * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    source = _source(tokens_ptr, row, end, FROM_TOKENS)
    codes_ptrs = codes_ptr + source[:, None] * X + k[None, :]
    weight_ptr = _weight(table_ptr, expert, tile.to(tl.int64) * COLUMNS * X, tl.int8)
    weight_ptrs = weight_ptr + tl.arange(0, COLUMNS)[:, None] * X + k[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in tl.range(0, X, DEPTH):
        left = X - first
        codes = tl.load(codes_ptrs + first, (row[:, None] < end) & (k[None, :] < left), 0)
        weight = tl.load(weight_ptrs + first, (y[:, None] < Y) & (k[None, :] < left), 0)
        acc = tl.dot(codes, tl.trans(weight), acc, out_dtype=tl.int32)
    out = acc.to(tl.float32) * tl.load(row_scale_ptr + source, row < end, 0.0)[:, None]
    out *= _scales(table_ptr, expert, y, Y)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * Y + y[None, :], out, (row[:, None] < end) & (y[None, :] < Y))


@triton.jit
def combine_kernel(y_ptr, places_ptr, weights_ptr, out_ptr, X, K: tl.constexpr, BLOCK: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """Some numbers of one token. Launched without fusion: products are rounded before they are added."""
    wait_for_previous(PDL)
    t = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places_ptr + t * K + k).to(tl.int64)
        weight = tl.load(weights_ptr + t * K + k)
        total += tl.load(y_ptr + place * X + x, x < X, 0.0).to(tl.float32) * weight
    tl.store(out_ptr + t * X + x, total, x < X)


def route(logits_TE: Tensor, rule: Any, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids int32 [T, K], weights fp32 [T, K]). rule: an object with the fields of `RouteRule`."""
    assert logits_TE.stride(1) == 1 and (bias_E is None or bias_E.is_contiguous())
    (T, E), K = logits_TE.shape, rule.num_chosen
    ids_TK = torch.empty(T, K, dtype=torch.int32, device=logits_TE.device)
    weights_TK = torch.empty(T, K, dtype=torch.float32, device=logits_TE.device)
    power_of_two = triton.next_power_of_2
    launch(route_kernel, (T,), logits_TE, bias_E, ids_TK, weights_TK, logits_TE.stride(0), rule.scale, E,
           BIAS=bias_E is not None, SIGMOID=rule.sigmoid, CHOSEN=K, GROUPS=rule.num_groups, KEPT=rule.num_kept_groups,
           SUMMED=rule.summed_per_group, RENORMALISE=rule.renormalise, PADDED_GROUPS=power_of_two(rule.num_groups),
           PADDED_WIDTH=power_of_two(E // rule.num_groups), PADDED_CHOSEN=power_of_two(K),
           **config("route", "any", logits_TE))  # fmt: skip
    return ids_TK, weights_TK


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a block."""
    return next((rows for rows in BLOCK_ROWS if num_rows <= rows * num_experts), BLOCK_ROWS[-1])


def most_blocks(num_rows: int, num_experts: int, rows: int) -> int:
    """Blocks of so many rows that are needed whatever is chosen: most are, if as many experts as can be are hit and one
    of them has all other rows."""
    num_hit = min(num_rows, num_experts)
    return num_hit + (num_rows - num_hit) // rows


def sort_rows(ids_TK: Tensor, num_experts: int) -> RowOrder:
    assert ids_TK.is_contiguous()
    R, rows = ids_TK.numel(), block_rows(ids_TK.numel(), num_experts)
    tokens_R, places_TK = ids_TK.new_empty(R), torch.empty_like(ids_TK)
    blocks_3B = ids_TK.new_empty(3, most_blocks(R, num_experts, rows))
    if R:
        bins = max(LEAST_BINS, triton.next_power_of_2(num_experts))
        launch(sort_rows_kernel, (num_experts,), ids_TK, tokens_R, places_TK, blocks_3B, R, blocks_3B.shape[1],
               ids_TK.shape[1], ROWS=rows, BINS=bins, **config("sort_rows", "any", ids_TK))  # fmt: skip
    return RowOrder(tokens_R, places_TK, blocks_3B, rows)


def grouped_linear(x: Tensor, weights: ExpertWeights, order: RowOrder, *, from_tokens: bool,
                   out: Tensor | None = None) -> Tensor:
    """[R, Y] in the order of `order`, from x [T, X] or [R, X]; written to `out`, if there is one."""
    assert x.stride(1) == 1 and x.shape[1] == weights.num_inputs
    Y, rows, num_blocks = weights.num_outputs, order.block_rows, order.blocks_3B.shape[1]
    y_RY = torch.empty(len(order.tokens_R), Y, dtype=x.dtype, device=x.device) if out is None else out
    where = (weights.table_E2, order.tokens_R, order.blocks_3B, y_RY, Y, weights.num_inputs)
    if weights.dynamic:
        numbers = config("grouped_w8a8", str(rows), x)
        grid = (num_blocks * triton.cdiv(Y, numbers["COLUMNS"]),)
        launch(grouped_w8a8_kernel, grid, *quantise_rows(x, torch.int8), *where, FROM_TOKENS=from_tokens, ROWS=rows,
               enable_fp_fusion=False, **numbers)  # fmt: skip
        return y_RY
    is_fp8, codes = weights.dtype is FP8, weights.dtype in (FP8, torch.int8)
    assert codes or weights.dtype is x.dtype
    bucket = f"{'wide' if x.element_size() == 4 else 'half'}_{rows}"
    numbers = within_runs(config("grouped_bytes" if codes else "grouped_linear", bucket, x), weights.run)
    grid = (num_blocks * triton.cdiv(Y, numbers["COLUMNS"]),)
    launch(grouped_linear_kernel, grid, x, *where, x.stride(0), FROM_TOKENS=from_tokens, CODES=codes,
           RUN=weights.run, FP8=is_fp8, UPCAST=INTERPRETED, ROWS=rows, **numbers)  # fmt: skip
    return y_RY


def combine(y_RX: Tensor, weights_TK: Tensor, order: RowOrder, *, out: Tensor | None = None) -> Tensor:
    """Each token's sum over its experts, in their order: [T, X] in y's dtype."""
    assert y_RX.is_contiguous() and weights_TK.is_contiguous()
    (T, K), X = weights_TK.shape, y_RX.shape[1]
    out_TX = torch.empty(T, X, dtype=y_RX.dtype, device=y_RX.device) if out is None else out
    numbers = config("combine", "any", y_RX)
    launch(combine_kernel, (T, triton.cdiv(X, numbers["BLOCK"])), y_RX, order.places_TK, weights_TK, out_TX, X, K=K,
           enable_fp_fusion=False, **numbers)  # fmt: skip
    return out_TX
