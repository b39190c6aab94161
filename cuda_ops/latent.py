"""Multi-head latent attention (DeepSeek-V2, 2024) over the blocks of the cache, in the absorbed form: queries are brought
to the latents' width, and what they sum of latents back from it, so that one latent a position is key and value of all
heads.

Rows of the dots are (query, head) pairs, in the order in which they lie: query i, head n of a sequence is row i * N + n.
A tile of rows reads each latent once. Sequences with few queries are decoded, in equal parts of the whole batch's work
(Stream-K), and those with many are prefilled, a program for each tile of rows, as in `attention.py`, which has the
sources. Nothing is planned: each program finds from the lengths on the device what is its own, and launches depend on
the *numbers* of tokens and sequences alone.

Letters: T tokens, S sequences, N heads, D width of a key without its rotated part, R of that part, L of a latent, V of a
value, H = L + R, P tokens a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.attention import LOG2E, Batch, ids_of_tile, pad_seqs, scales_of_tile
from cuda_ops.kv import block_stride, for_kernels, scale_bytes
from cuda_ops.kv_codes import widen
from cuda_ops.launch import INTERPRETED, config, device_facts, launch, wait_for_previous

# The most queries of a sequence that is decoded: a token and its drafts. Chosen: with more there is work enough for all
# programs in the rows, and no context need be shared.
DECODE_QUERIES = 8
LEAST_ROWS = 16  # of a tensor core's dot
MOST_ROWS = 64  # of a tile, where the table has an entry for as many: of Hopper's warp-group instructions
MERGED_COLUMNS = 128  # of a program that joins parts. Chosen: four for a latent of 512

VARYING = ["query_start_ptr", "seq_lens_ptr", "table_ptr", "base_ptr", "S", "table_stride", "q_head", "q_token",
           "turned_head", "turned_token", "out_head", "out_token"]  # fmt: skip


@triton.jit
def _attend(
    q, turned, acc, most, total, cache_ptr, table_ptr, first_block, block_ids, begin_tile, end_tile, all_tiles, seq_len,
    limit, block, scale, P: tl.constexpr, L: tl.constexpr, R: tl.constexpr, PAD_L: tl.constexpr, PAD_R: tl.constexpr,
    TILE: tl.constexpr, SCALE_BYTES: tl.constexpr, BASE: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, end) of latents into a running softmax in base 2: (acc, most, total, ids of the block at `end`).

    limit: the last position that each row sees. With `MASK` it is looked at; without it, every row sees all of it.
    """
    column, turned_column = tl.arange(0, PAD_L)[None, :], tl.arange(0, PAD_R)[None, :]
    n = tl.arange(0, TILE)
    # Weights times scales would be too small for fp16 where numbers of that dtype are not; at most 1 * 65504 / 127.
    LIFT: tl.constexpr = 64.0 if q.dtype == tl.float16 else 1.0
    for tile in tl.range(begin_tile, end_tile):
        position = tile * TILE + n
        at = (position % P) * (L + R)
        if P % TILE == 0:
            rows = cache_ptr + block_ids * block + at[:, None]
        else:
            rows = cache_ptr + (block_ids * block + at)[:, None]
        if MASK or PAD_L != L:
            latents = tl.load(rows + column, (position[:, None] < seq_len) & (column < L), 0.0)
        else:
            latents = tl.load(rows + column)
        if MASK or PAD_R != R:
            shared = tl.load(rows + L + turned_column, (position[:, None] < seq_len) & (turned_column < R), 0.0)
        else:
            shared = tl.load(rows + L + turned_column)
        if SCALE_BYTES:
            scales = scales_of_tile(cache_ptr, block_ids, block, tile, position, seq_len, P, L + R, TILE, MASK,
                                    SCALE_BYTES)  # fmt: skip
            latents = widen(latents, q.dtype, SCALE_BYTES == 1, False)
            shared = widen(shared, q.dtype, SCALE_BYTES == 1, False)
        block_ids = ids_of_tile(table_ptr, first_block, tile + 1, all_tiles, seq_len, P, TILE, BASE)
        if UPCAST:
            latents, shared = latents.to(tl.float32), shared.to(tl.float32)
        scores = tl.dot(turned, tl.trans(shared), input_precision="ieee")
        scores = tl.dot(q, tl.trans(latents), scores, input_precision="ieee")
        if SCALE_BYTES:
            scores = scores * (scales * scale)[None, :]
        else:
            scores = scores * scale
        if MASK:
            scores = tl.where(position[None, :] <= limit[:, None], scores, float("-inf"))
        now_most = tl.maximum(most, tl.max(scores, 1))
        # A row that has seen nothing yet has no largest score to subtract.
        shift = tl.where(now_most == float("-inf"), 0.0, now_most)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(most - shift)
        if SCALE_BYTES:
            total = total * shrink + tl.sum(weights, 1) * LIFT
            weights = weights * (scales * LIFT)[None, :]
        else:
            total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(latents.dtype), latents, acc * shrink[:, None], input_precision="ieee")
        most = now_most
    return acc, most, total, block_ids


@triton.jit
def _queries(
    q_ptr, turned_ptr, start, query_len, row, q_head, q_token, turned_head, turned_token, N: tl.constexpr,
    L: tl.constexpr, R: tl.constexpr, PAD_L: tl.constexpr, PAD_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows of a sequence: at the latents' width, and their rotated parts. Past its end 0."""
    column, turned_column = tl.arange(0, PAD_L)[None, :], tl.arange(0, PAD_R)[None, :]
    used, token, head = (row < query_len * N)[:, None], (start + row // N).to(tl.int64), (row % N).to(tl.int64)
    q = tl.load(q_ptr + (head * q_head + token * q_token)[:, None] + column, used & (column < L), 0.0)
    turned_at = (head * turned_head + token * turned_token)[:, None] + turned_column
    turned = tl.load(turned_ptr + turned_at, used & (turned_column < R), 0.0)
    if UPCAST:
        q, turned = q.to(tl.float32), turned.to(tl.float32)
    return q, turned


@triton.jit
def _work(
    query_start_ptr, seq_lens_ptr, S, decode_len, N: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Of each sequence that is decoded, its tiles of rows times its tiles of latents."""
    s = tl.arange(0, BLOCK_S)
    query_len = tl.load(query_start_ptr + s + 1, s < S, 0) - tl.load(query_start_ptr + s, s < S, 0)
    seq_len = tl.load(seq_lens_ptr + s, s < S, 0)
    work = tl.cdiv(query_len * N, ROWS) * tl.cdiv(seq_len, TILE)
    return tl.where(query_len <= decode_len, work, 0)


@triton.jit(do_not_specialize=VARYING)
def latent_decode_kernel(
    q_ptr, turned_ptr, cache_ptr, out_ptr, part_ptr, part_most_ptr, part_total_ptr, query_start_ptr, seq_lens_ptr,
    table_ptr, base_ptr, S, table_stride, block, q_head, q_token, turned_head, turned_token, out_head, out_token,
    decode_len, scale, N: tl.constexpr, P: tl.constexpr, L: tl.constexpr, R: tl.constexpr, PAD_L: tl.constexpr,
    PAD_R: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, LEAST: tl.constexpr, BLOCK_S: tl.constexpr,
    SCALE_BYTES: tl.constexpr, BASE: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One equal part of the batch's work, tile of rows by tile of rows."""
    wait_for_previous(PDL)
    works = _work(query_start_ptr, seq_lens_ptr, S, decode_len, N, ROWS, TILE, BLOCK_S)
    ends = tl.cumsum(works)
    work = tl.sum(works)
    program = tl.program_id(0)
    share = tl.maximum(tl.cdiv(work, tl.num_programs(0)), LEAST)
    at = program * share
    end = tl.minimum(at + share, work)
    column = tl.arange(0, PAD_L)[None, :]
    while at < end:
        s = tl.sum((ends <= at).to(tl.int32))
        start = tl.load(query_start_ptr + s)
        query_len = tl.load(query_start_ptr + s + 1) - start
        seq_len = tl.load(seq_lens_ptr + s)
        tiles = tl.cdiv(seq_len, TILE)
        in_sequence = at - tl.sum(tl.where(tl.arange(0, BLOCK_S) < s, works, 0))
        rows = in_sequence // tiles
        begin = in_sequence - rows * tiles
        stop = tl.minimum(tiles, begin + end - at)
        row = rows * ROWS + tl.arange(0, ROWS)
        q, turned = _queries(q_ptr, turned_ptr, start, query_len, row, q_head, q_token, turned_head, turned_token, N, L,
                             R, PAD_L, PAD_R, UPCAST)  # fmt: skip
        table = table_ptr + s.to(tl.int64) * table_stride
        first_block = 0
        if BASE:
            first_block = tl.load(base_ptr + s)
        ids = ids_of_tile(table, first_block, begin, stop, seq_len, P, TILE, BASE)
        acc = tl.zeros([ROWS, PAD_L], tl.float32)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc, most, total, ids = _attend(
            q, turned, acc, most, total, cache_ptr, table, first_block, ids, begin, stop, stop, seq_len,
            seq_len - query_len + row // N, block, scale, P, L, R, PAD_L, PAD_R, TILE, SCALE_BYTES, BASE, True, UPCAST,
        )  # fmt: skip
        if stop - begin == tiles:
            out_at = (row % N).to(tl.int64) * out_head + (start + row // N).to(tl.int64) * out_token
            mask = (row < query_len * N)[:, None] & (column < L)
            tl.store(out_ptr + out_at[:, None] + column, acc / total[:, None], mask)
        else:
            # Two parts a program at most are not whole: of rows begun before it, and of those that it leaves.
            slot = (program * 2 + (begin == 0).to(tl.int32)) * ROWS + tl.arange(0, ROWS)
            tl.store(part_ptr + slot.to(tl.int64)[:, None] * PAD_L + column, acc)
            tl.store(part_most_ptr + slot, most)
            tl.store(part_total_ptr + slot, total)
        at += stop - begin


@triton.jit(do_not_specialize=["query_start_ptr", "seq_lens_ptr", "S", "out_head", "out_token"])
def latent_merge_kernel(
    out_ptr, part_ptr, part_most_ptr, part_total_ptr, query_start_ptr, seq_lens_ptr, S, out_head, out_token, decode_len,
    num_programs, N: tl.constexpr, L: tl.constexpr, PAD_L: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    LEAST: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Joins, in order, the parts of a tile of rows that more than one program of `latent_decode_kernel` had."""
    wait_for_previous(PDL)
    s, rows = tl.program_id(0), tl.program_id(1)
    works = _work(query_start_ptr, seq_lens_ptr, S, decode_len, N, ROWS, TILE, BLOCK_S)
    share = tl.maximum(tl.cdiv(tl.sum(works), num_programs), LEAST)
    tiles = tl.cdiv(tl.load(seq_lens_ptr + s), TILE)
    index = tl.arange(0, BLOCK_S)
    at = tl.sum(tl.where(index < s, works, 0)) + rows * tiles
    here = rows * tiles < tl.sum(tl.where(index == s, works, 0))
    first, last = at // share, (at + tiles - 1) // share
    if here & (first < last):
        row = tl.arange(0, ROWS)
        column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for program in tl.range(first, last + 1, num_stages=4):
            slot = (program * 2 + (program == first).to(tl.int32)) * ROWS + row
            part = tl.load(part_ptr + slot.to(tl.int64)[:, None] * PAD_L + column)
            part_most, part_total = tl.load(part_most_ptr + slot), tl.load(part_total_ptr + slot)
            now_most = tl.maximum(most, part_most)
            shift = tl.where(now_most == float("-inf"), 0.0, now_most)
            old, new = tl.exp2(most - shift), tl.exp2(part_most - shift)
            acc = acc * old[:, None] + part * new[:, None]
            total = total * old + part_total * new
            most = now_most
        start = tl.load(query_start_ptr + s)
        row += rows * ROWS
        out_at = (row % N).to(tl.int64) * out_head + (start + row // N).to(tl.int64) * out_token
        mask = (row < (tl.load(query_start_ptr + s + 1) - start) * N)[:, None] & (column < L)
        tl.store(out_ptr + out_at[:, None] + column, acc / total[:, None], mask)


@triton.jit(do_not_specialize=VARYING)
def latent_prefill_kernel(
    q_ptr, turned_ptr, cache_ptr, out_ptr, query_start_ptr, seq_lens_ptr, table_ptr, base_ptr, S, table_stride, block,
    q_head, q_token, turned_head, turned_token, out_head, out_token, decode_len, scale, N: tl.constexpr,
    P: tl.constexpr, L: tl.constexpr, R: tl.constexpr, PAD_L: tl.constexpr, PAD_R: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_S: tl.constexpr, SCALE_BYTES: tl.constexpr, BASE: tl.constexpr, UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of rows. Of a sequence the last go first, since they have the longest way."""
    wait_for_previous(PDL)
    index = tl.arange(0, BLOCK_S)
    lens = tl.load(query_start_ptr + index + 1, index < S, 0) - tl.load(query_start_ptr + index, index < S, 0)
    ends = tl.cumsum(tl.where(lens > decode_len, tl.cdiv(lens * N, ROWS), 0))
    number = tl.program_id(0)
    s = tl.sum((ends <= number).to(tl.int32))
    if s < S:
        start = tl.load(query_start_ptr + s)
        query_len = tl.load(query_start_ptr + s + 1) - start
        seq_len = tl.load(seq_lens_ptr + s)
        first_row = (tl.sum(tl.where(index == s, ends, 0)) - 1 - number) * ROWS
        row = first_row + tl.arange(0, ROWS)
        q, turned = _queries(q_ptr, turned_ptr, start, query_len, row, q_head, q_token, turned_head, turned_token, N, L,
                             R, PAD_L, PAD_R, UPCAST)  # fmt: skip
        past = seq_len - query_len
        limit = past + row // N
        # All rows see tiles up to `whole`, some of them those up to `end` in part.
        end = tl.cdiv(tl.minimum(past + (first_row + ROWS - 1) // N + 1, seq_len), TILE)
        whole = tl.minimum((past + first_row // N + 1) // TILE, end)
        table = table_ptr + s.to(tl.int64) * table_stride
        first_block = 0
        if BASE:
            first_block = tl.load(base_ptr + s)
        ids = ids_of_tile(table, first_block, 0, end, seq_len, P, TILE, BASE)
        acc = tl.zeros([ROWS, PAD_L], tl.float32)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc, most, total, ids = _attend(
            q, turned, acc, most, total, cache_ptr, table, first_block, ids, 0, whole, end, seq_len, limit, block,
            scale, P, L, R, PAD_L, PAD_R, TILE, SCALE_BYTES, BASE, False, UPCAST,
        )  # fmt: skip
        acc, most, total, ids = _attend(
            q, turned, acc, most, total, cache_ptr, table, first_block, ids, whole, end, end, seq_len, limit, block,
            scale, P, L, R, PAD_L, PAD_R, TILE, SCALE_BYTES, BASE, True, UPCAST,
        )  # fmt: skip
        out_at = (row % N).to(tl.int64) * out_head + (start + row // N).to(tl.int64) * out_token
        column = tl.arange(0, PAD_L)[None, :]
        mask = (row < query_len * N)[:, None] & (column < L)
        tl.store(out_ptr + out_at[:, None] + column, acc / total[:, None], mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of a model and its cache decides the kernels' constants."""

    num_heads: int
    width: int
    rotated_dim: int
    block_size: int
    scale_bytes: int

    @classmethod
    def of(cls, up_NYL: Tensor, cache: Tensor) -> Shape:
        num_heads, _, width = up_NYL.shape
        rotated_dim = cache.shape[3] - scale_bytes(cache) - width
        return cls(num_heads=num_heads, width=width, rotated_dim=rotated_dim, block_size=cache.shape[2],
                   scale_bytes=scale_bytes(cache))

    @property
    def pad_width(self) -> int:
        return max(16, triton.next_power_of_2(self.width))

    def rows(self, num_queries: int) -> int:
        """Rows that so many queries of a sequence fill."""
        return max(LEAST_ROWS, triton.next_power_of_2(num_queries * self.num_heads))


@dataclass(slots=True, kw_only=True)
class Rows:
    """Queries at the latents' width, their rotated parts, and where what they sum goes: [N, T, L], [T, N, R] (a view)
    and [N, T, L]."""

    q_NTL: Tensor
    turned_TNR: Tensor
    sums_NTL: Tensor

    def strides(self) -> tuple[int, ...]:
        """Of a head and of a token, of each."""
        return (*self.q_NTL.stride()[:2], *self.turned_TNR.stride()[1::-1], *self.sums_NTL.stride()[:2])


def latent_attention(q_TNX: Tensor, up_NYL: Tensor, cache: Tensor, batch: Batch, *, scale: float) -> Tensor:
    """[T, N * V], of which rows of no sequence stay undefined."""
    shape = Shape.of(up_NYL, cache)
    key_dim = q_TNX.shape[2] - shape.rotated_dim
    q_NTL = torch.bmm(q_TNX[..., :key_dim].transpose(0, 1), up_NYL[:, :key_dim])
    rows = Rows(q_NTL=q_NTL, turned_TNR=q_TNX[..., key_dim:], sums_NTL=torch.empty_like(q_NTL))
    assert rows.turned_TNR.stride(2) == 1
    decode(rows, cache, batch, shape, scale)
    if batch.max_query_len > DECODE_QUERIES:
        prefill(rows, cache, batch, shape, scale)
    out_TNV = q_TNX.new_empty(len(q_TNX), shape.num_heads, up_NYL.shape[1] - key_dim)
    torch.bmm(rows.sums_NTL, up_NYL[:, key_dim:].transpose(1, 2), out=out_TNV.transpose(0, 1))
    return out_TNV.flatten(1)


def numbers_of(op: str, shape: Shape, num_rows: int, like: Tensor) -> dict[str, int]:
    """The entry for the largest tile of rows that the table has for this width and at most as many as there are."""
    kind = f"{'wide' if like.element_size() == 4 else 'half'}_L{shape.pad_width}{'_codes' if shape.scale_bytes else ''}"
    return dict(config(op, f"{kind}_{min(num_rows, MOST_ROWS)}", like))


def decode(rows: Rows, cache: Tensor, batch: Batch, shape: Shape, scale: float) -> None:
    """The sequences of at most `DECODE_QUERIES` queries."""
    drafts = batch.max_query_len if batch.max_query_len <= DECODE_QUERIES else 1
    numbers = numbers_of("latent_decode", shape, shape.rows(drafts), rows.q_NTL)
    num_programs = numbers.pop("PER_SM") * device_facts(rows.q_NTL.device)[1]
    S, device, pad_width = len(batch.seq_lens_S), rows.q_NTL.device, shape.pad_width
    part = torch.empty(2 * num_programs, numbers["ROWS"], pad_width, dtype=torch.float32, device=device)
    part_most, part_total = (torch.empty(part.shape[:2], dtype=torch.float32, device=device) for _ in range(2))
    launch(latent_decode_kernel, (num_programs,), rows.q_NTL, rows.turned_TNR, for_kernels(cache), rows.sums_NTL, part,
           part_most, part_total, *_metadata(batch), block_stride(cache), *rows.strides(), DECODE_QUERIES,
           scale * LOG2E, **_constants(batch, shape), **numbers)  # fmt: skip
    most_rows = triton.cdiv(min(batch.max_query_len, DECODE_QUERIES) * shape.num_heads, numbers["ROWS"])
    columns = min(MERGED_COLUMNS, pad_width)
    launch(latent_merge_kernel, (S, most_rows, pad_width // columns), rows.sums_NTL, part, part_most, part_total,
           batch.query_start_S1, batch.seq_lens_S, S, *rows.sums_NTL.stride()[:2], DECODE_QUERIES, num_programs,
           N=shape.num_heads, L=shape.width, PAD_L=pad_width, COLUMNS=columns, BLOCK_S=pad_seqs(S), num_warps=4,
           **{name: numbers[name] for name in ("ROWS", "TILE", "LEAST", "PDL")})  # fmt: skip


def prefill(rows: Rows, cache: Tensor, batch: Batch, shape: Shape, scale: float) -> None:
    """The sequences of more than `DECODE_QUERIES` queries."""
    numbers = numbers_of("latent_prefill", shape, shape.rows(DECODE_QUERIES + 1), rows.q_NTL)
    # Each sequence has one tile at most that is not full of rows.
    most_tiles = batch.num_tokens * shape.num_heads // numbers["ROWS"]
    most_tiles += min(len(batch.seq_lens_S), batch.num_tokens // (DECODE_QUERIES + 1))
    launch(latent_prefill_kernel, (most_tiles,), rows.q_NTL, rows.turned_TNR, for_kernels(cache), rows.sums_NTL,
           *_metadata(batch), block_stride(cache), *rows.strides(), DECODE_QUERIES, scale * LOG2E,
           **_constants(batch, shape), **numbers)  # fmt: skip


def _metadata(batch: Batch) -> tuple[Tensor | None | int, ...]:
    return (batch.query_start_S1, batch.seq_lens_S, batch.block_table_SM, batch.kv_base_S, len(batch.seq_lens_S),
            batch.block_table_SM.stride(0))


def _constants(batch: Batch, shape: Shape) -> dict[str, int | bool]:
    return {
        "N": shape.num_heads, "P": shape.block_size, "L": shape.width, "R": shape.rotated_dim,
        "PAD_L": shape.pad_width, "PAD_R": max(16, triton.next_power_of_2(shape.rotated_dim)),
        "BLOCK_S": pad_seqs(len(batch.seq_lens_S)), "SCALE_BYTES": shape.scale_bytes,
        "BASE": batch.kv_base_S is not None, "UPCAST": INTERPRETED,
    }  # fmt: skip
