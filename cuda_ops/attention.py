"""Causal attention over the blocks of the cache: split decoding, and prefill in tiles.

Sequences with few queries are decoded: all their queries of all query heads of one kv head form the rows of one dot,
and the tiles of keys of the whole batch, one after the other, are cut into equal parts, one a program (Stream-K, Osama
et al. 2023, as in FlashInfer). A program meets at most two (sequence, head) pairs that it shares with others, so that
two partial results a program suffice whatever the lengths; `merge_kernel` joins them. Sequences with many queries are
prefilled: a program takes a tile of queries through all tiles of keys (FlashAttention-2, Dao 2023).

Which sequence is whose, and who does what, is found on the device from the lengths there: launches depend on the
*numbers* of tokens and sequences alone, so that a captured graph serves every mix of lengths.

In both the id of the next block is a loop variable: a load inside the loop that another load depends on would leave
the compiler one buffer for keys and values, whatever the number of stages.

The numbers of a quantised cache are codes with a scale per position, so that the scales multiply what is a position's
own: its column of the scores, and of the weights.

Letters: T tokens, S sequences, N query heads, K kv heads, G = N / K, H head dim, P tokens a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.kv import block_stride, for_kernels, scale_bytes
from cuda_ops.kv_codes import widen
from cuda_ops.launch import INTERPRETED, config, device_facts, launch, wait_for_previous

LOG2E = 1.4426950408889634  # log2 of e: the softmax is computed in base 2
RANKED = tl.constexpr(8)  # sequences that all others are compared with at once
DECODE_ROWS = 16  # queries times group up to which a sequence is decoded: the least rows of a tensor core's dot


# What differs from step to step; a kernel that was compiled for its alignment or for the number one would be compiled
# again in the middle of serving.
VARYING = ["order_ptr", "query_start_ptr", "seq_lens_ptr", "table_ptr", "base_ptr", "S", "table_stride",
           "window"]  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Batch:
    """The step's metadata, as tensors on the device: see `backends/metadata.py`."""

    query_start_S1: Tensor
    seq_lens_S: Tensor
    block_table_SM: Tensor
    kv_base_S: Tensor | None
    num_tokens: int
    max_query_len: int


@dataclass(slots=True, kw_only=True)
class Plan:
    """Where each sequence's work begins: running sums over sequences, int32 [S + 1], on the device.

    tiles: of keys, of sequences that are decoded; times K is the work of a layer. blocks: of queries, of those that are
    prefilled, which are taken in the order `order`: the longest first, so that no long one begins when all others end.
    """

    tiles_S1: Tensor
    blocks_S1: Tensor
    order_S: Tensor
    window: int | None


@triton.jit(do_not_specialize=["query_start_ptr", "seq_lens_ptr", "order_ptr", "S", "window"])
def plan_kernel(
    query_start_ptr, seq_lens_ptr, tiles_ptr, blocks_ptr, order_ptr, S, window, decode_len, queries_per_block,
    WINDOW: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.arange(0, BLOCK)
    query_len = tl.load(query_start_ptr + s + 1, s < S, 0) - tl.load(query_start_ptr + s, s < S, 0)
    seq_len = tl.load(seq_lens_ptr + s, s < S, 0)
    tiles = tl.cdiv(seq_len, TILE) - _first_tile(seq_len, query_len, window, WINDOW, TILE)
    tiles = tl.where((query_len > 0) & (query_len <= decode_len), tiles, 0)
    blocks = tl.where(query_len > decode_len, tl.cdiv(query_len, queries_per_block), 0)
    tl.store(tiles_ptr + s + 1, tl.cumsum(tiles), s < S)
    tl.store(tiles_ptr + s, 0, s == 0)
    rank = s
    if tl.sum(blocks) > 0:
        rank = _rank(query_start_ptr, seq_lens_ptr, tl.where(blocks > 0, seq_len, 0), S, decode_len, BLOCK)
    tl.store(order_ptr + rank, s, s < S)
    tl.store(blocks_ptr + rank + 1, blocks, s < S)
    tl.debug_barrier()
    blocks = tl.load(blocks_ptr + s + 1, s < S, 0)
    tl.debug_barrier()
    tl.store(blocks_ptr + s + 1, tl.cumsum(blocks), s < S)
    tl.store(blocks_ptr + s, 0, s == 0)


@triton.jit
def _rank(query_start_ptr, seq_lens_ptr, length, S, decode_len, BLOCK: tl.constexpr):
    """How many sequences are longer, or as long and earlier; one that is decoded has length 0 here."""
    s = tl.arange(0, BLOCK)
    rank = s * 0
    for first in tl.range(0, S, RANKED):
        other = first + tl.arange(0, RANKED)
        query_len = tl.load(query_start_ptr + other + 1, other < S, 0) - tl.load(query_start_ptr + other, other < S, 0)
        other_length = tl.load(seq_lens_ptr + other, (other < S) & (query_len > decode_len), 0)[None, :]
        before = (other_length == length[:, None]) & (other[None, :] < s[:, None])
        before = (other_length > length[:, None]) | before
        rank += tl.sum((before & (other < S)[None, :]).to(tl.int32), 1)
    return rank


@triton.jit
def _first_tile(seq_len, query_len, window, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """The first tile of which the sequence's first query sees anything."""
    if WINDOW:
        return tl.maximum(seq_len - query_len - window + 1, 0) // TILE
    else:
        return seq_len * 0


@triton.jit
def _find(sums_ptr, S, at, BLOCK: tl.constexpr):
    """The sequence in whose share of the running sums `at` lies."""
    s = tl.arange(0, BLOCK)
    ends = tl.load(sums_ptr + s + 1, s < S, 2147483647)
    return tl.sum((ends <= at).to(tl.int32))


@triton.jit
def ids_of_tile(
    table_ptr, first_block, tile, end_tile, seq_len, P: tl.constexpr, TILE: tl.constexpr, BASE: tl.constexpr
):
    """The block id of a tile, or of each of its positions where it spans several blocks; past the end, any id."""
    if P % TILE == 0:
        index = tile * TILE // P
        known = tile < end_tile
    else:
        index = tile * TILE + tl.arange(0, TILE)
        known = (index < seq_len) & (tile < end_tile)
        index = index // P
    if BASE:
        return (first_block + index).to(tl.int64)
    else:
        return tl.load(table_ptr + index, known, 0).to(tl.int64)


@triton.jit
def scales_of_tile(
    cache_ptr, block_ids, block, tile, position, seq_len, P: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr,
    MASK: tl.constexpr, SCALE_BYTES: tl.constexpr,
):  # fmt: skip
    """What the codes of a tile's positions are multiples of, in fp32; past the end 0. An inf stands for NaN: its codes
    are 0."""
    scales_ptr = cache_ptr + block_ids * block + P * H
    if SCALE_BYTES == 4:
        scales_ptr = (scales_ptr + position % P * 4).to(tl.pointer_type(tl.float32), bitcast=True)
        if MASK:
            return tl.load(scales_ptr, position < seq_len, 0.0)
        else:
            return tl.load(scales_ptr)
    else:
        if P % TILE == 0:
            # By words, since single bytes cannot be copied ahead.
            words_ptr = (scales_ptr + tile * TILE % P).to(tl.pointer_type(tl.int32), bitcast=True)
            words = tl.load(words_ptr + tl.arange(0, TILE // 4))
            exponents = tl.reshape((words[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 255, [TILE])
            if MASK:
                exponents = tl.where(position < seq_len, exponents, 0)
        else:
            exponents = tl.load(scales_ptr + position % P, position < seq_len, 0).to(tl.int32) & 255
        return (exponents << 23).to(tl.float32, bitcast=True)


@triton.jit
def _attend(
    q, acc, most, total, k_ptr, v_ptr, table_ptr, first_block, block_ids, begin_tile, end_tile, all_tiles, seq_len,
    limit, window, k_block, v_block, scale, P: tl.constexpr, H: tl.constexpr, PAD_H: tl.constexpr, TILE: tl.constexpr,
    SCALE_BYTES: tl.constexpr, BASE: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, end) of keys into a running softmax in base 2: (acc, most, total, ids of the block at `end`).

    limit: the last position that each row sees. With `MASK` it is looked at; without it, every row sees all of it.
    """
    column = tl.arange(0, PAD_H)
    n = tl.arange(0, TILE)
    # Weights times scales would be too small for fp16 where numbers of that dtype are not; at most 1 * 65504 / 127.
    LIFT: tl.constexpr = 64.0 if q.dtype == tl.float16 else 1.0
    for tile in tl.range(begin_tile, end_tile):
        position = tile * TILE + n
        at = (position % P) * H
        if P % TILE == 0:
            keys_ptr = k_ptr + block_ids * k_block + at[:, None] + column[None, :]
            values_ptr = v_ptr + block_ids * v_block + at[:, None] + column[None, :]
        else:
            keys_ptr = k_ptr + (block_ids * k_block + at)[:, None] + column[None, :]
            values_ptr = v_ptr + (block_ids * v_block + at)[:, None] + column[None, :]
        if MASK or PAD_H != H:
            inside = position[:, None] < seq_len
            if PAD_H != H:
                inside = inside & (column[None, :] < H)
            k = tl.load(keys_ptr, inside, 0.0)
            v = tl.load(values_ptr, inside, 0.0)
        else:
            k = tl.load(keys_ptr)
            v = tl.load(values_ptr)
        if SCALE_BYTES:
            k_scales = scales_of_tile(k_ptr, block_ids, k_block, tile, position, seq_len, P, H, TILE, MASK, SCALE_BYTES)
            v_scales = scales_of_tile(v_ptr, block_ids, v_block, tile, position, seq_len, P, H, TILE, MASK, SCALE_BYTES)
            # With so few rows each warp has keys of its own; values lie across what a warp multiplies.
            k = widen(k, q.dtype, SCALE_BYTES == 1, q.shape[0] == 16)
            v = widen(v, q.dtype, SCALE_BYTES == 1, False)
        block_ids = ids_of_tile(table_ptr, first_block, tile + 1, all_tiles, seq_len, P, TILE, BASE)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        if SCALE_BYTES:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (k_scales * scale)[None, :]
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if MASK:
            seen = position[None, :] <= limit[:, None]
            if WINDOW:
                seen = seen & (position[None, :] > limit[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        now_most = tl.maximum(most, tl.max(scores, 1))
        # A row that has seen nothing yet has no largest score to subtract.
        shift = tl.where(now_most == float("-inf"), 0.0, now_most)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(most - shift)
        if SCALE_BYTES:
            total = total * shrink + tl.sum(weights, 1) * LIFT
            weights = weights * (v_scales * LIFT)[None, :]
        else:
            total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        most = now_most
    return acc, most, total, block_ids


@triton.jit(do_not_specialize=VARYING[1:])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, part_most_ptr, part_total_ptr, tiles_ptr, query_start_ptr, seq_lens_ptr,
    table_ptr, base_ptr, S, table_stride, k_block, v_block, window, scale, K: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, H: tl.constexpr, PAD_H: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, LEAST: tl.constexpr,
    BLOCK_S: tl.constexpr, SCALE_BYTES: tl.constexpr, BASE: tl.constexpr, WINDOW: tl.constexpr, UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One equal part of the batch's tiles. Rows of the dot: query i, head g of the group at i * G + g."""
    wait_for_previous(PDL)
    program = tl.program_id(0)
    work = tl.load(tiles_ptr + S) * K
    share = tl.maximum(tl.cdiv(work, tl.num_programs(0)), LEAST)
    at = program * share
    end = tl.minimum(at + share, work)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, PAD_H)
    while at < end:
        s = _find(tiles_ptr, S, at // K, BLOCK_S)
        first_of_sequence = tl.load(tiles_ptr + s)
        tiles = tl.load(tiles_ptr + s + 1) - first_of_sequence
        in_sequence = at - first_of_sequence * K
        head = in_sequence // tiles
        begin = in_sequence - head * tiles
        stop = tl.minimum(tiles, begin + end - at)
        start = tl.load(query_start_ptr + s)
        query_len = tl.load(query_start_ptr + s + 1) - start
        seq_len = tl.load(seq_lens_ptr + s)
        skipped = _first_tile(seq_len, query_len, window, WINDOW, TILE)

        used = row < query_len * G
        row_at = ((start + row // G).to(tl.int64) * K * G + head * G + row % G)
        q_mask = used[:, None] & (column < H)[None, :]
        q = tl.load(q_ptr + row_at[:, None] * H + column[None, :], q_mask, 0.0)
        if UPCAST:
            q = q.to(tl.float32)
        limit = seq_len - query_len + row // G
        table = table_ptr + s.to(tl.int64) * table_stride
        first_block = 0
        if BASE:
            first_block = tl.load(base_ptr + s)
        begin_tile, end_tile = skipped + begin, skipped + stop
        ids = ids_of_tile(table, first_block, begin_tile, end_tile, seq_len, P, TILE, BASE)
        acc = tl.zeros([ROWS, PAD_H], tl.float32)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        of_head = head.to(tl.int64) * P * (H + SCALE_BYTES)
        acc, most, total, ids = _attend(
            q, acc, most, total, k_ptr + of_head, v_ptr + of_head, table, first_block, ids, begin_tile, end_tile,
            end_tile, seq_len, limit, window, k_block, v_block, scale, P, H, PAD_H, TILE, SCALE_BYTES, BASE, True,
            WINDOW, UPCAST,
        )  # fmt: skip
        if stop - begin == tiles:
            out = acc / total[:, None]
            tl.store(out_ptr + row_at[:, None] * H + column[None, :], out, q_mask)
        else:
            slot = (program * 2 + (begin == 0).to(tl.int32)) * ROWS + row
            tl.store(part_ptr + slot.to(tl.int64)[:, None] * PAD_H + column[None, :], acc)
            tl.store(part_most_ptr + slot, most)
            tl.store(part_total_ptr + slot, total)
        at += stop - begin


@triton.jit(do_not_specialize=["query_start_ptr", "S"])
def merge_kernel(
    out_ptr, part_ptr, part_most_ptr, part_total_ptr, tiles_ptr, query_start_ptr, S, num_programs, K: tl.constexpr,
    G: tl.constexpr, H: tl.constexpr, PAD_H: tl.constexpr, ROWS: tl.constexpr, LEAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Joins the parts of one (sequence, head) pair that more than one program of `decode_kernel` had."""
    wait_for_previous(PDL)
    s, head = tl.program_id(0), tl.program_id(1)
    work = tl.load(tiles_ptr + S) * K
    share = tl.maximum(tl.cdiv(work, num_programs), LEAST)
    first_of_sequence = tl.load(tiles_ptr + s)
    tiles = tl.load(tiles_ptr + s + 1) - first_of_sequence
    at = first_of_sequence * K + head * tiles
    first, last = at // share, (at + tiles - 1) // share
    if (tiles > 0) & (first < last):
        row = tl.arange(0, ROWS)
        column = tl.arange(0, PAD_H)
        acc = tl.zeros([ROWS, PAD_H], tl.float32)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for program in tl.range(first, last + 1):
            slot = (program * 2 + (program == first).to(tl.int32)) * ROWS + row
            part = tl.load(part_ptr + slot.to(tl.int64)[:, None] * PAD_H + column[None, :])
            part_most, part_total = tl.load(part_most_ptr + slot), tl.load(part_total_ptr + slot)
            now_most = tl.maximum(most, part_most)
            shift = tl.where(now_most == float("-inf"), 0.0, now_most)
            old, new = tl.exp2(most - shift), tl.exp2(part_most - shift)
            acc = acc * old[:, None] + part * new[:, None]
            total = total * old + part_total * new
            most = now_most
        start = tl.load(query_start_ptr + s)
        used = row < (tl.load(query_start_ptr + s + 1) - start) * G
        row_at = (start + row // G).to(tl.int64) * K * G + head * G + row % G
        mask = used[:, None] & (column < H)[None, :]
        tl.store(out_ptr + row_at[:, None] * H + column[None, :], acc / total[:, None], mask)


@triton.jit(do_not_specialize=VARYING)
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, blocks_ptr, order_ptr, query_start_ptr, seq_lens_ptr, table_ptr, base_ptr, S,
    table_stride, k_block, v_block, window, scale, K: tl.constexpr, G: tl.constexpr, P: tl.constexpr, H: tl.constexpr,
    PAD_H: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_S: tl.constexpr,
    SCALE_BYTES: tl.constexpr, BASE: tl.constexpr, WINDOW: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS // G queries of one kv head's group. Of a sequence the last go first, since they have the longest way."""
    wait_for_previous(PDL)
    num_blocks = tl.load(blocks_ptr + S)
    number = tl.program_id(1)
    head = tl.program_id(0)
    queries: tl.constexpr = ROWS // G
    if number < num_blocks:
        place = _find(blocks_ptr, S, number, BLOCK_S)
        s = tl.load(order_ptr + place)
        start = tl.load(query_start_ptr + s)
        query_len = tl.load(query_start_ptr + s + 1) - start
        seq_len = tl.load(seq_lens_ptr + s)
        first_query = (tl.load(blocks_ptr + place + 1) - 1 - number) * queries
        row = tl.arange(0, ROWS)
        column = tl.arange(0, PAD_H)
        query = first_query + row // G
        used = (query < query_len) & (row < queries * G)
        row_at = (start + query).to(tl.int64) * K * G + head * G + row % G
        q_mask = used[:, None] & (column < H)[None, :]
        q = tl.load(q_ptr + row_at[:, None] * H + column[None, :], q_mask, 0.0)
        if UPCAST:
            q = q.to(tl.float32)
        past = seq_len - query_len
        limit = past + query
        # Some rows see tiles [begin, clear) in part, all rows see those up to `whole`, some those up to `end` in part.
        end = tl.cdiv(tl.minimum(past + first_query + queries, seq_len), TILE)
        begin, clear = 0, 0
        if WINDOW:
            begin = tl.maximum(past + first_query - window + 1, 0) // TILE
            clear = tl.cdiv(tl.maximum(past + first_query + queries - window, 0), TILE)
        whole = (past + first_query + 1) // TILE
        clear = tl.minimum(tl.maximum(clear, begin), end)
        whole = tl.minimum(tl.maximum(whole, clear), end)

        table = table_ptr + s.to(tl.int64) * table_stride
        first_block = 0
        if BASE:
            first_block = tl.load(base_ptr + s)
        of_head = head.to(tl.int64) * P * (H + SCALE_BYTES)
        k_head, v_head = k_ptr + of_head, v_ptr + of_head
        acc = tl.zeros([ROWS, PAD_H], tl.float32)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        ids = ids_of_tile(table, first_block, begin, end, seq_len, P, TILE, BASE)
        if WINDOW:
            acc, most, total, ids = _attend(
                q, acc, most, total, k_head, v_head, table, first_block, ids, begin, clear, end, seq_len, limit,
                window, k_block, v_block, scale, P, H, PAD_H, TILE, SCALE_BYTES, BASE, True, True, UPCAST,
            )  # fmt: skip
        acc, most, total, ids = _attend(
            q, acc, most, total, k_head, v_head, table, first_block, ids, clear, whole, end, seq_len, limit,
            window, k_block, v_block, scale, P, H, PAD_H, TILE, SCALE_BYTES, BASE, False, WINDOW, UPCAST,
        )  # fmt: skip
        acc, most, total, ids = _attend(
            q, acc, most, total, k_head, v_head, table, first_block, ids, whole, end, end, seq_len, limit,
            window, k_block, v_block, scale, P, H, PAD_H, TILE, SCALE_BYTES, BASE, True, WINDOW, UPCAST,
        )  # fmt: skip
        tl.store(out_ptr + row_at[:, None] * H + column[None, :], acc / total[:, None], q_mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of a model and its cache decides the kernels' constants."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    scale_bytes: int = 0

    @classmethod
    def of(cls, q_TNH: Tensor, k_cache: Tensor) -> Shape:
        _, num_heads, head_dim = q_TNH.shape
        return cls(num_heads=num_heads, num_kv_heads=k_cache.shape[1], head_dim=head_dim, block_size=k_cache.shape[2],
                   scale_bytes=scale_bytes(k_cache))

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def pad_dim(self) -> int:
        return max(16, triton.next_power_of_2(self.head_dim))

    @property
    def decode_rows(self) -> int:
        return max(DECODE_ROWS, triton.next_power_of_2(self.group))

    @property
    def decode_len(self) -> int:
        """The most queries of a sequence that is decoded."""
        return self.decode_rows // self.group


def numbers_of(op: str, shape: Shape, like: Tensor) -> dict[str, int]:
    bucket = f"{'wide' if like.element_size() == 4 else 'half'}_H{shape.pad_dim}{'_codes' if shape.scale_bytes else ''}"
    return config(op, bucket, like)


def plan(batch: Batch, shape: Shape, like: Tensor, window: int | None = None) -> Plan:
    """like: any tensor of the queries' dtype and device. Reads nothing back from the device."""
    S, rows = len(batch.seq_lens_S), _prefill_numbers(shape, like)["ROWS"]
    tiles_S1, blocks_S1, order_S1 = (torch.empty(S + 1, dtype=torch.int32, device=like.device) for _ in range(3))
    launch(plan_kernel, (1,), batch.query_start_S1, batch.seq_lens_S, tiles_S1, blocks_S1, order_S1, S, window or 0,
           shape.decode_len, rows // shape.group, WINDOW=window is not None,
           TILE=numbers_of("decode", shape, like)["TILE"], BLOCK=pad_seqs(S), num_warps=4)  # fmt: skip
    return Plan(tiles_S1=tiles_S1, blocks_S1=blocks_S1, order_S=order_S1[:-1], window=window)


def attention(q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, plan: Plan, *, scale: float) -> Tensor:
    """[T, N, H], of which rows of no sequence stay undefined. The plan must be of the same batch, shape and window."""
    assert q_TNH.is_contiguous()
    shape = Shape.of(q_TNH, k_cache)
    out_TNH = torch.empty_like(q_TNH)
    decode(q_TNH, k_cache, v_cache, out_TNH, batch, plan, shape, scale)
    if batch.max_query_len > shape.decode_len:
        prefill(q_TNH, k_cache, v_cache, out_TNH, batch, plan, shape, scale)
    return out_TNH


def decode(q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, out_TNH: Tensor, batch: Batch, plan: Plan, shape: Shape,
           scale: float) -> None:
    """The sequences of at most `decode_len` queries."""
    numbers = dict(numbers_of("decode", shape, q_TNH))
    num_programs = numbers.pop("PER_SM") * device_facts(q_TNH.device)[1]
    if shape.scale_bytes:
        numbers["maxnreg"] = 255  # or the assembler spills some, to make room for more programs than there are
    S, rows, device = len(batch.seq_lens_S), shape.decode_rows, q_TNH.device
    part = torch.empty(2 * num_programs, rows, shape.pad_dim, dtype=torch.float32, device=device)
    part_most, part_total = (torch.empty(2 * num_programs, rows, dtype=torch.float32, device=device) for _ in range(2))
    launch(decode_kernel, (num_programs,), q_TNH, for_kernels(k_cache), for_kernels(v_cache), out_TNH, part, part_most,
           part_total, plan.tiles_S1, batch.query_start_S1, batch.seq_lens_S, batch.block_table_SM, batch.kv_base_S, S,
           batch.block_table_SM.stride(0), block_stride(k_cache), block_stride(v_cache), plan.window or 0,
           scale * LOG2E, ROWS=rows, **_constants(batch, plan, shape), **numbers)  # fmt: skip
    launch(merge_kernel, (S, shape.num_kv_heads), out_TNH, part, part_most, part_total, plan.tiles_S1,
           batch.query_start_S1, S, num_programs, K=shape.num_kv_heads, G=shape.group, H=shape.head_dim,
           PAD_H=shape.pad_dim, ROWS=rows, LEAST=numbers["LEAST"], PDL=numbers["PDL"], num_warps=4)  # fmt: skip


def prefill(q_TNH: Tensor, k_cache: Tensor, v_cache: Tensor, out_TNH: Tensor, batch: Batch, plan: Plan, shape: Shape,
            scale: float) -> None:
    """The sequences of more than `decode_len` queries."""
    numbers, S = _prefill_numbers(shape, q_TNH), len(batch.seq_lens_S)
    # Each sequence has one block at most that is not full of queries.
    most_blocks = batch.num_tokens // (numbers["ROWS"] // shape.group)
    most_blocks += min(S, batch.num_tokens // (shape.decode_len + 1))
    launch(prefill_kernel, (shape.num_kv_heads, most_blocks), q_TNH, for_kernels(k_cache), for_kernels(v_cache),
           out_TNH, plan.blocks_S1, plan.order_S, batch.query_start_S1, batch.seq_lens_S, batch.block_table_SM,
           batch.kv_base_S, S, batch.block_table_SM.stride(0), block_stride(k_cache), block_stride(v_cache),
           plan.window or 0, scale * LOG2E, **_constants(batch, plan, shape), **numbers)  # fmt: skip


def _prefill_numbers(shape: Shape, like: Tensor) -> dict[str, int]:
    numbers = numbers_of("prefill", shape, like)
    return {**numbers, "ROWS": max(numbers["ROWS"], triton.next_power_of_2(shape.group))}


def pad_seqs(num_seqs: int) -> int:
    """Few sizes, since each is a kernel of its own."""
    return max(64, triton.next_power_of_2(num_seqs))


def _constants(batch: Batch, plan: Plan, shape: Shape) -> dict[str, int | bool]:
    return {
        "K": shape.num_kv_heads, "G": shape.group, "P": shape.block_size, "H": shape.head_dim, "PAD_H": shape.pad_dim,
        "SCALE_BYTES": shape.scale_bytes, "BLOCK_S": pad_seqs(len(batch.seq_lens_S)),
        "BASE": batch.kv_base_S is not None, "WINDOW": plan.window is not None, "UPCAST": INTERPRETED,
    }  # fmt: skip
