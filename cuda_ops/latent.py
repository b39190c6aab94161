"""Multi-head latent attention (DeepSeek-V2, 2024) over the blocks of the cache, in the absorbed form: queries are
brought to the latents' width, and what they sum of latents back from it, so that one latent a position is key and value
of all heads.

Rows of the dots are (query, head) pairs, in the order in which they lie: query i, head n of a sequence is row
i * N + n. A tile of rows reads each latent once. Sequences with few queries are decoded, in equal parts of the whole
batch's work (Stream-K), and those with many are prefilled, a program for each tile of rows, as in `attention.py`, which
has the sources. Nothing is planned: each program finds from the lengths on the device what is its own, and launches
depend on the *numbers* of tokens and sequences alone.

Letters: T tokens, S sequences, N heads, D width of a key without its rotated part, R of that part, L of a latent, V of
a value, P tokens a block.
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
MOST_ROWS = 32  # of a tile that is decoded: with 64 what a program keeps beside its loop does not fit its registers
MERGED_COLUMNS = 128  # of a program that joins parts. Chosen: four for a latent of 512

VARYING = ["query_start_ptr", "seq_lens_ptr", "table_ptr", "base_ptr", "S", "table_stride"]


@triton.jit
def _attend(
    q, turned, cache_ptr, table_ptr, first_block, begin_tile, end_tile, seq_len, limit, block, scale,
    P: tl.constexpr, L: tl.constexpr, R: tl.constexpr, PAD_L: tl.constexpr, PAD_R: tl.constexpr, TILE: tl.constexpr,
    SCALE_BYTES: tl.constexpr, BASE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, end) of latents into a running softmax in base 2: (acc, most, total).

    limit: the last position that each row sees; looked at in every tile, since a second loop for those that all rows
    see whole would take more registers than there are.
    """
    column, turned_column = tl.arange(0, PAD_L)[None, :], tl.arange(0, PAD_R)[None, :]
    n = tl.arange(0, TILE)
    acc = tl.zeros([q.shape[0], PAD_L], tl.float32)
    most = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    block_ids = ids_of_tile(table_ptr, first_block, begin_tile, end_tile, seq_len, P, TILE, BASE)
    # Weights times scales would be too small for fp16 where numbers of that dtype are not; at most 1 * 65504 / 127.
    LIFT: tl.constexpr = 64.0 if q.dtype == tl.float16 else 1.0
    for tile in tl.range(begin_tile, end_tile):
        position = tile * TILE + n
        if P % TILE == 0:
            rows = cache_ptr + block_ids * block + (position % P * (L + R))[:, None]
        else:
            rows = cache_ptr + (block_ids * block + position % P * (L + R))[:, None]
        latents = tl.load(rows + column, (position[:, None] < seq_len) & (column < L), 0.0)
        shared = tl.load(rows + L + turned_column, (position[:, None] < seq_len) & (turned_column < R), 0.0)
        if SCALE_BYTES:
            scales = scales_of_tile(cache_ptr, block_ids, block, tile, position, seq_len, P, L + R, TILE, True,
                                    SCALE_BYTES)  # fmt: skip
            latents = widen(latents, q.dtype, SCALE_BYTES == 1, False)
            shared = widen(shared, q.dtype, SCALE_BYTES == 1, False)
        block_ids = ids_of_tile(table_ptr, first_block, tile + 1, end_tile, seq_len, P, TILE, BASE)
        if UPCAST:
            latents, shared = latents.to(tl.float32), shared.to(tl.float32)
        scores = tl.dot(turned, tl.trans(shared), input_precision="ieee")
        scores = tl.dot(q, tl.trans(latents), scores, input_precision="ieee")
        if SCALE_BYTES:
            scores = scores * (scales * scale)[None, :]
        else:
            scores = scores * scale
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
    return acc, most, total


@triton.jit
def _queries(
    q_ptr, turned_ptr, first_row, used, turned_stride, L: tl.constexpr, R: tl.constexpr, PAD_L: tl.constexpr,
    PAD_R: tl.constexpr, ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of rows: at the latents' width, and their rotated parts. Those that are not used are 0."""
    column, turned_column = tl.arange(0, PAD_L)[None, :], tl.arange(0, PAD_R)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    q = tl.load(q_ptr + first_row * L + row * L + column, used[:, None] & (column < L), 0.0)
    turned_ptr += first_row * turned_stride
    turned = tl.load(turned_ptr + row * turned_stride + turned_column, used[:, None] & (turned_column < R), 0.0)
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
    table_ptr, base_ptr, S, table_stride, block, turned_stride, decode_len, scale, N: tl.constexpr, P: tl.constexpr,
    L: tl.constexpr, R: tl.constexpr, PAD_L: tl.constexpr, PAD_R: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    LEAST: tl.constexpr, BLOCK_S: tl.constexpr, SCALE_BYTES: tl.constexpr, BASE: tl.constexpr, UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One equal part of the batch's work, tile of rows by tile of rows."""
    wait_for_previous(PDL)
    work = tl.sum(_work(query_start_ptr, seq_lens_ptr, S, decode_len, N, ROWS, TILE, BLOCK_S))
    program = tl.program_id(0)
    share = tl.maximum(tl.cdiv(work, tl.num_programs(0)), LEAST)
    at = program * share
    end = tl.minimum(at + share, work)
    while at < end:
        works = _work(query_start_ptr, seq_lens_ptr, S, decode_len, N, ROWS, TILE, BLOCK_S)  # again: it takes registers
        s = tl.sum((tl.cumsum(works) <= at).to(tl.int32))
        start = tl.load(query_start_ptr + s)
        query_len = tl.load(query_start_ptr + s + 1) - start
        seq_len = tl.load(seq_lens_ptr + s)
        tiles = tl.cdiv(seq_len, TILE)
        in_sequence = at - tl.sum(tl.where(tl.arange(0, BLOCK_S) < s, works, 0))
        rows = in_sequence // tiles
        begin = in_sequence - rows * tiles
        stop = tl.minimum(tiles, begin + end - at)
        row = rows * ROWS + tl.arange(0, ROWS)
        used, first_row = row < query_len * N, start.to(tl.int64) * N + rows * ROWS
        q, turned = _queries(q_ptr, turned_ptr, first_row, used, turned_stride, L, R, PAD_L, PAD_R, ROWS, UPCAST)
        table = table_ptr + s.to(tl.int64) * table_stride
        first_block = 0
        if BASE:
            first_block = tl.load(base_ptr + s)
        acc, most, total = _attend(
            q, turned, cache_ptr, table, first_block, begin, stop, seq_len, seq_len - query_len + row // N, block,
            scale, P, L, R, PAD_L, PAD_R, TILE, SCALE_BYTES, BASE, UPCAST,
        )  # fmt: skip
        column = tl.arange(0, PAD_L)[None, :]
        part_row = tl.arange(0, ROWS)
        if stop - begin == tiles:
            out_at = first_row * L + part_row[:, None] * L + column
            tl.store(out_ptr + out_at, acc / total[:, None], used[:, None] & (column < L))
        else:
            # Two parts a program at most are not whole: of rows begun before it, and of those that it leaves.
            slot = program * 2 + (begin == 0).to(tl.int32)
            tl.store(part_ptr + slot.to(tl.int64) * (ROWS * PAD_L) + part_row[:, None] * PAD_L + column, acc)
            tl.store(part_most_ptr + slot * ROWS + part_row, most)
            tl.store(part_total_ptr + slot * ROWS + part_row, total)
        at += stop - begin


@triton.jit(do_not_specialize=["query_start_ptr", "seq_lens_ptr", "S"])
def latent_merge_kernel(
    out_ptr, part_ptr, part_most_ptr, part_total_ptr, query_start_ptr, seq_lens_ptr, S, decode_len, num_programs,
    N: tl.constexpr, L: tl.constexpr, PAD_L: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
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
        used = rows * ROWS + row < (tl.load(query_start_ptr + s + 1) - start) * N
        out_ptr += (start.to(tl.int64) * N + rows * ROWS) * L
        tl.store(out_ptr + row[:, None] * L + column, acc / total[:, None], used[:, None] & (column < L))


@triton.jit(do_not_specialize=VARYING)
def latent_prefill_kernel(
    q_ptr, turned_ptr, cache_ptr, out_ptr, query_start_ptr, seq_lens_ptr, table_ptr, base_ptr, S, table_stride, block,
    turned_stride, decode_len, scale, N: tl.constexpr,
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
        begin = (tl.sum(tl.where(index == s, ends, 0)) - 1 - number) * ROWS
        row = begin + tl.arange(0, ROWS)
        used, first_row = row < query_len * N, start.to(tl.int64) * N + begin
        q, turned = _queries(q_ptr, turned_ptr, first_row, used, turned_stride, L, R, PAD_L, PAD_R, ROWS, UPCAST)
        past = seq_len - query_len
        end = tl.cdiv(tl.minimum(past + (begin + ROWS - 1) // N + 1, seq_len), TILE)
        table = table_ptr + s.to(tl.int64) * table_stride
        first_block = 0
        if BASE:
            first_block = tl.load(base_ptr + s)
        acc, _, total = _attend(
            q, turned, cache_ptr, table, first_block, 0, end, seq_len, past + row // N, block, scale, P, L, R, PAD_L,
            PAD_R, TILE, SCALE_BYTES, BASE, UPCAST,
        )  # fmt: skip
        column = tl.arange(0, PAD_L)[None, :]
        out_at = tl.arange(0, ROWS)[:, None] * L + column
        tl.store(out_ptr + first_row * L + out_at, acc / total[:, None], used[:, None] & (column < L))


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSizes:
    """What of a model and its cache decides the kernels' constants."""

    num_heads: int
    width: int
    rotated_dim: int
    block_size: int
    scale_bytes: int

    @classmethod
    def of(cls, up_NYL: Tensor, cache: Tensor) -> LatentSizes:
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
    """Queries at the latents' width, their rotated parts, and where what they sum goes: [T, N, L], [T, N, R] (a view
    of rows that are wider) and [T, N, L]."""

    q_TNL: Tensor
    turned_TNR: Tensor
    sums_TNL: Tensor


def latent_attention(q_TNX: Tensor, up_NYL: Tensor, cache: Tensor, batch: Batch, *, scale: float) -> Tensor:
    """[T, N * V], of which rows of no sequence stay undefined."""
    assert q_TNX.is_contiguous()
    (T, N, X), sizes = q_TNX.shape, LatentSizes.of(up_NYL, cache)
    key_dim = X - sizes.rotated_dim
    rows = Rows(q_TNL=q_TNX.new_empty(T, N, sizes.width), turned_TNR=q_TNX[..., key_dim:],
                sums_TNL=q_TNX.new_empty(T, N, sizes.width))
    torch.bmm(q_TNX[..., :key_dim].transpose(0, 1), up_NYL[:, :key_dim], out=rows.q_TNL.transpose(0, 1))
    decode(rows, cache, batch, sizes, scale)
    if batch.max_query_len > DECODE_QUERIES:
        prefill(rows, cache, batch, sizes, scale)
    out_TNV = q_TNX.new_empty(T, N, up_NYL.shape[1] - key_dim)
    torch.bmm(rows.sums_TNL.transpose(0, 1), up_NYL[:, key_dim:].transpose(1, 2), out=out_TNV.transpose(0, 1))
    return out_TNV.flatten(1)


def numbers_of(op: str, sizes: LatentSizes, like: Tensor, num_rows: int | None = None) -> dict[str, int]:
    """num_rows: that a sequence fills, where the entry depends on it."""
    codes = "_codes" if sizes.scale_bytes else ""
    bucket = f"{'wide' if like.element_size() == 4 else 'half'}_L{sizes.pad_width}{codes}"
    numbers = config(op, bucket if num_rows is None else f"{bucket}_{min(num_rows, MOST_ROWS)}", like)
    if sizes.block_size % numbers["TILE"]:
        numbers = config(op, "any", like)  # addresses of a tile of several blocks take many registers
    return {**numbers, "maxnreg": 255}  # or the assembler spills some, to make room for more programs than there are


def decode(rows: Rows, cache: Tensor, batch: Batch, sizes: LatentSizes, scale: float) -> None:
    """The sequences of at most `DECODE_QUERIES` queries."""
    drafts = batch.max_query_len if batch.max_query_len <= DECODE_QUERIES else 1
    numbers = numbers_of("latent_decode", sizes, rows.q_TNL, sizes.rows(drafts))
    num_programs = numbers.pop("PER_SM") * device_facts(rows.q_TNL.device)[1]
    S, device, pad_width = len(batch.seq_lens_S), rows.q_TNL.device, sizes.pad_width
    part = torch.empty(2 * num_programs, numbers["ROWS"], pad_width, dtype=torch.float32, device=device)
    part_most, part_total = (torch.empty(part.shape[:2], dtype=torch.float32, device=device) for _ in range(2))
    launch(latent_decode_kernel, (num_programs,), rows.q_TNL, rows.turned_TNR, for_kernels(cache), rows.sums_TNL, part,
           part_most, part_total, *_metadata(batch), block_stride(cache), rows.turned_TNR.stride(1), DECODE_QUERIES,
           scale * LOG2E, **_constants(batch, sizes), **numbers)  # fmt: skip
    most_rows = triton.cdiv(min(batch.max_query_len, DECODE_QUERIES) * sizes.num_heads, numbers["ROWS"])
    columns = min(MERGED_COLUMNS, pad_width)
    launch(latent_merge_kernel, (S, most_rows, pad_width // columns), rows.sums_TNL, part, part_most, part_total,
           batch.query_start_S1, batch.seq_lens_S, S, DECODE_QUERIES, num_programs, N=sizes.num_heads, L=sizes.width,
           PAD_L=pad_width, COLUMNS=columns, BLOCK_S=pad_seqs(S), num_warps=4,
           **{name: numbers[name] for name in ("ROWS", "TILE", "LEAST", "PDL")})  # fmt: skip


def prefill(rows: Rows, cache: Tensor, batch: Batch, sizes: LatentSizes, scale: float) -> None:
    """The sequences of more than `DECODE_QUERIES` queries."""
    numbers = numbers_of("latent_prefill", sizes, rows.q_TNL)
    # Each sequence has one tile at most that is not full of rows.
    most_tiles = batch.num_tokens * sizes.num_heads // numbers["ROWS"]
    most_tiles += min(len(batch.seq_lens_S), batch.num_tokens // (DECODE_QUERIES + 1))
    launch(latent_prefill_kernel, (most_tiles,), rows.q_TNL, rows.turned_TNR, for_kernels(cache), rows.sums_TNL,
           *_metadata(batch), block_stride(cache), rows.turned_TNR.stride(1), DECODE_QUERIES, scale * LOG2E,
           **_constants(batch, sizes), **numbers)  # fmt: skip


def _metadata(batch: Batch) -> tuple[Tensor | int | None, ...]:
    return (batch.query_start_S1, batch.seq_lens_S, batch.block_table_SM, batch.kv_base_S, len(batch.seq_lens_S),
            batch.block_table_SM.stride(0))


def _constants(batch: Batch, sizes: LatentSizes) -> dict[str, int | bool]:
    return {
        "N": sizes.num_heads, "P": sizes.block_size, "L": sizes.width, "R": sizes.rotated_dim,
        "PAD_L": sizes.pad_width, "PAD_R": max(16, triton.next_power_of_2(sizes.rotated_dim)),
        "BLOCK_S": pad_seqs(len(batch.seq_lens_S)), "SCALE_BYTES": sizes.scale_bytes,
        "BASE": batch.kv_base_S is not None, "UPCAST": INTERPRETED,
    }  # fmt: skip
