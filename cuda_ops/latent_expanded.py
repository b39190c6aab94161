"""Multi-head latent attention (DeepSeek-V2, 2024) in the expanded form, for sequences with many queries. Their latents
are gathered from the blocks, a product makes of them the keys and values of some of the heads, and these are attended
to where that leaves them (FlashAttention-2, Dao 2023), beside the rotated parts that all heads share.

The kernel of `attention.py` is not the one: it knows keys and values of one width, a power of two (256 for DeepSeek's
192 and 128, so that a pair would take 512 multiplications instead of 320), and would want the rotated part copied into
the keys of each head.

The host knows which sequences these are (`Chunk`), and tables made there say what is each program's, so that nothing
is compiled for how many or how long they are.

Letters: T tokens, N heads, D width of a key without its rotated part, R of that part, L of a latent, V of a value,
P tokens a block, C positions of sequences that are expanded together, one sequence after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.attention import LOG2E, Batch, ids_of_tile, scales_of_tile
from cuda_ops.kv import block_stride, for_kernels, scale_bytes, to_device
from cuda_ops.kv_codes import widen
from cuda_ops.launch import INTERPRETED, config, device_facts, launch, wait_for_previous

HALF_MOST = tl.constexpr(65504.0)  # of fp16


@triton.jit(do_not_specialize=["tiles_ptr", "table_ptr", "base_ptr", "table_stride"])
def latent_gather_kernel(
    cache_ptr, kept_ptr, tiles_ptr, table_ptr, base_ptr, table_stride, block, P: tl.constexpr, X: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, SCALE_BYTES: tl.constexpr, BASE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What the cache has of one tile of positions, some columns of it, to rows that follow each other.

    tiles: of each (sequence, number of the tile in it, row of its first position, length of the sequence).
    """
    wait_for_previous(PDL)
    entry = tiles_ptr + tl.program_id(0) * 4
    s, tile, row, seq_len = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    n, column = tl.arange(0, TILE), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    position = tile * TILE + n
    inside = (position[:, None] < seq_len) & (column < X)
    first_block = 0
    if BASE:
        first_block = tl.load(base_ptr + s)
    table = table_ptr + s.to(tl.int64) * table_stride
    block_ids = ids_of_tile(table, first_block, tile, tile + 1, seq_len, P, TILE, BASE)
    if P % TILE == 0:
        source = cache_ptr + block_ids * block + (position % P * X)[:, None]
    else:
        source = cache_ptr + (block_ids * block + position % P * X)[:, None]
    x = tl.load(source + column, inside, 0.0)
    if SCALE_BYTES:
        scales = scales_of_tile(cache_ptr, block_ids, block, tile, position, seq_len, P, X, TILE, True, SCALE_BYTES)
        x = widen(x, tl.float32, SCALE_BYTES == 1, False) * scales[:, None]
        if kept_ptr.dtype.element_ty == tl.float16:
            # The largest numbers of fp16 are rounded up to what it does not have; NaN stays.
            x = tl.where(x > HALF_MOST, HALF_MOST, tl.where(x < -HALF_MOST, -HALF_MOST, x))
    tl.store(kept_ptr + row.to(tl.int64) * X + n[:, None] * X + column, x, inside)


@triton.jit
def _attend(
    q, turned, acc, most, total, keys_ptr, values_ptr, shared_ptr, begin_tile, end_tile, seq_len, limit, made_stride,
    scale, X: tl.constexpr, D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, PAD_D: tl.constexpr,
    PAD_R: tl.constexpr, PAD_V: tl.constexpr, TILE: tl.constexpr, MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, end) of positions into a running softmax in base 2. limit, MASK: as in `attention.py`."""
    key_column, column = tl.arange(0, PAD_D)[None, :], tl.arange(0, PAD_V)[None, :]
    turned_column, n = tl.arange(0, PAD_R)[None, :], tl.arange(0, TILE)
    for tile in tl.range(begin_tile, end_tile):
        position = tile * TILE + n
        made_at = position[:, None] * made_stride
        inside = position[:, None] < seq_len
        if MASK or PAD_D != D:
            keys = tl.load(keys_ptr + made_at + key_column, inside & (key_column < D), 0.0)
        else:
            keys = tl.load(keys_ptr + made_at + key_column)
        if MASK or PAD_R != R:
            shared = tl.load(shared_ptr + position[:, None] * X + turned_column, inside & (turned_column < R), 0.0)
        else:
            shared = tl.load(shared_ptr + position[:, None] * X + turned_column)
        if MASK or PAD_V != V:
            values = tl.load(values_ptr + made_at + column, inside & (column < V), 0.0)
        else:
            values = tl.load(values_ptr + made_at + column)
        if UPCAST:
            keys, shared, values = keys.to(tl.float32), shared.to(tl.float32), values.to(tl.float32)
        scores = tl.dot(turned, tl.trans(shared), input_precision="ieee")
        scores = tl.dot(q, tl.trans(keys), scores, input_precision="ieee") * scale
        if MASK:
            scores = tl.where(position[None, :] <= limit[:, None], scores, float("-inf"))
        now_most = tl.maximum(most, tl.max(scores, 1))
        # A row that has seen nothing yet has no largest score to subtract.
        shift = tl.where(now_most == float("-inf"), 0.0, now_most)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(most - shift)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        most = now_most
    return acc, most, total


@triton.jit(do_not_specialize=["blocks_ptr", "first_head"])
def latent_expanded_kernel(
    q_ptr, made_ptr, kept_ptr, out_ptr, blocks_ptr, first_head, q_stride, made_stride, out_stride, scale,
    L: tl.constexpr, D: tl.constexpr, R: tl.constexpr, V: tl.constexpr, PAD_D: tl.constexpr, PAD_R: tl.constexpr,
    PAD_V: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block of a sequence's queries, of one head.

    made: [C, H, D + V], keys and values of H heads, `first_head` the first of them. kept: [C, L + R]. blocks: of each
    (row of its first query, how many queries it has, how many positions come before that query, row of the sequence's
    first position, length of the sequence).
    """
    wait_for_previous(PDL)
    entry = blocks_ptr + tl.program_id(0) * 5
    first_row, num_queries, past = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    first_position, seq_len = tl.load(entry + 3), tl.load(entry + 4)
    head = tl.program_id(1)
    row = tl.arange(0, ROWS)
    used = (row < num_queries)[:, None]
    key_column, turned_column, column = (tl.arange(0, PAD_D)[None, :], tl.arange(0, PAD_R)[None, :],
                                         tl.arange(0, PAD_V)[None, :])
    q_ptr += first_row.to(tl.int64) * q_stride + (first_head + head) * (D + R)
    q = tl.load(q_ptr + row[:, None] * q_stride + key_column, used & (key_column < D), 0.0)
    turned = tl.load(q_ptr + row[:, None] * q_stride + D + turned_column, used & (turned_column < R), 0.0)
    if UPCAST:
        q, turned = q.to(tl.float32), turned.to(tl.float32)
    keys_ptr = made_ptr + first_position.to(tl.int64) * made_stride + head * (D + V)
    shared_ptr = kept_ptr + first_position.to(tl.int64) * (L + R) + L
    acc = tl.zeros([ROWS, PAD_V], tl.float32)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # All rows see the first `whole` tiles, some of them the others up to `end` in part.
    whole, end = (past + 1) // TILE, tl.cdiv(past + num_queries, TILE)
    acc, most, total = _attend(
        q, turned, acc, most, total, keys_ptr, keys_ptr + D, shared_ptr, 0, whole, seq_len, past + row, made_stride,
        scale, L + R, D, R, V, PAD_D, PAD_R, PAD_V, TILE, False, UPCAST,
    )  # fmt: skip
    acc, most, total = _attend(
        q, turned, acc, most, total, keys_ptr, keys_ptr + D, shared_ptr, whole, end, seq_len, past + row, made_stride,
        scale, L + R, D, R, V, PAD_D, PAD_R, PAD_V, TILE, True, UPCAST,
    )  # fmt: skip
    out_ptr += first_row.to(tl.int64) * out_stride + (first_head + head) * V
    tl.store(out_ptr + row[:, None] * out_stride + column, acc / total[:, None], used & (column < V))


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Of a model: of a latent, of the rotated part, of the rest of a key, of a value."""

    latent: int
    rotated: int
    key: int
    value: int

    @classmethod
    def of(cls, q_TNX: Tensor, up_NYL: Tensor, cache: Tensor) -> Widths:
        latent = up_NYL.shape[2]
        rotated = cache.shape[3] - scale_bytes(cache) - latent
        key = q_TNX.shape[2] - rotated
        return cls(latent=latent, rotated=rotated, key=key, value=up_NYL.shape[1] - key)

    def most_heads(self, num_positions: int, itemsize: int, num_bytes: int) -> int:
        """Of how many heads keys and values of so many positions fit into the bytes, beside their latents."""
        left = num_bytes // (num_positions * itemsize) - self.latent - self.rotated
        return max(0, left // (self.key + self.value))


def group_of(num_heads: int, most_heads: int) -> int:
    """How many heads take turns at a time: groups of one size or almost."""
    return triton.cdiv(num_heads, triton.cdiv(num_heads, most_heads))


def fits(num_queries: int, seq_len: int, num_heads: int, widths: Widths, like: Tensor, num_bytes: int) -> bool:
    """Whether a sequence can be expanded within the bytes, and if heads must take turns, whether each group of them has
    work for half of the multiprocessors. like: a tensor of the queries' dtype and device."""
    most_heads = widths.most_heads(seq_len, like.element_size(), num_bytes)
    if not 0 < most_heads < num_heads:
        return most_heads > 0
    num_programs = triton.cdiv(num_queries, numbers_of(widths, like)["ROWS"]) * group_of(num_heads, most_heads)
    return 2 * num_programs >= device_facts(like.device)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A sequence that is expanded. sequence: its number in the step. first_row: of its queries, in the T axis."""

    sequence: int
    first_row: int
    num_queries: int
    seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Sequences that are expanded together: what each program of the kernels has to do, int32 on the device, and of how
    many heads keys and values are made at a time, at most."""

    tiles_X4: Tensor
    blocks_X5: Tensor
    num_positions: int
    most_heads: int


def plan(chunks: Sequence[Chunk], widths: Widths, like: Tensor, num_bytes: int) -> list[Run]:
    """For all layers of a step. Each chunk must be one that `fits`. like: as there."""
    runs = []
    for together in _that_fit(chunks, widths, like.element_size(), num_bytes):
        num_positions = sum(chunk.seq_len for chunk in together)
        tiles_X4, blocks_X5 = _tables(together, widths, like)
        runs.append(Run(tiles_X4=tiles_X4, blocks_X5=blocks_X5, num_positions=num_positions,
                        most_heads=widths.most_heads(num_positions, like.element_size(), num_bytes)))
    return runs


def _that_fit(chunks: Sequence[Chunk], widths: Widths, itemsize: int, num_bytes: int) -> Iterator[list[Chunk]]:
    together: list[Chunk] = []
    num_positions = 0
    for chunk in chunks:
        if together and not widths.most_heads(num_positions + chunk.seq_len, itemsize, num_bytes):
            yield together
            together, num_positions = [], 0
        together.append(chunk)
        num_positions += chunk.seq_len
    if together:
        yield together


def _tables(chunks: Sequence[Chunk], widths: Widths, like: Tensor) -> tuple[Tensor, Tensor]:
    tile, rows = config("latent_gather", "any", like)["TILE"], numbers_of(widths, like)["ROWS"]
    tiles: list[tuple[int, ...]] = []
    blocks: list[tuple[int, ...]] = []
    first_position = 0
    for chunk in chunks:
        tiles += ((chunk.sequence, i, first_position + i * tile, chunk.seq_len)
                  for i in range(triton.cdiv(chunk.seq_len, tile)))
        past = chunk.seq_len - chunk.num_queries
        blocks += ((chunk.first_row + i, min(rows, chunk.num_queries - i), past + i, first_position, chunk.seq_len)
                   for i in range(0, chunk.num_queries, rows))
        first_position += chunk.seq_len
    blocks.sort(key=lambda block: -block[2])  # no long one begins when all others end
    table = to_device(torch.tensor([number for entry in (*tiles, *blocks) for number in entry], dtype=torch.int32),
                      like.device)
    return table[: 4 * len(tiles)].view(-1, 4), table[4 * len(tiles) :].view(-1, 5)


def numbers_of(widths: Widths, like: Tensor) -> dict[str, int]:
    kind = "wide" if like.element_size() == 4 else "half"
    return config("latent_expanded", f"{kind}_D{_padded(widths.key)}_V{_padded(widths.value)}", like)


def attend(q_TNX: Tensor, up_NYL: Tensor, cache: Tensor, batch: Batch, run: Run, out_TNV: Tensor, *,
           scale: float) -> None:
    """The rows of the run's sequences. batch: of the step."""
    assert q_TNX.is_contiguous() and out_TNV.is_contiguous()
    widths, num_heads = Widths.of(q_TNX, up_NYL, cache), len(up_NYL)
    kept_CX = gather(cache, batch, run, widths, q_TNX)
    group = group_of(num_heads, run.most_heads)
    for first in range(0, num_heads, group):
        _attend_heads(q_TNX, up_NYL[first : first + group], first, kept_CX, run, out_TNV, widths, scale)


def gather(cache: Tensor, batch: Batch, run: Run, widths: Widths, like: Tensor) -> Tensor:
    """What the cache has of the run's sequences: [C, L + R], in the dtype of `like`."""
    width, numbers = widths.latent + widths.rotated, config("latent_gather", "any", like)
    kept_CX = like.new_empty(run.num_positions, width)
    launch(latent_gather_kernel, (len(run.tiles_X4), triton.cdiv(width, numbers["COLUMNS"])), for_kernels(cache),
           kept_CX, run.tiles_X4, batch.block_table_SM, batch.kv_base_S, batch.block_table_SM.stride(0),
           block_stride(cache), P=cache.shape[2], X=width, SCALE_BYTES=scale_bytes(cache),
           BASE=batch.kv_base_S is not None, **numbers)  # fmt: skip
    return kept_CX


def _attend_heads(q_TNX: Tensor, up_HYL: Tensor, first_head: int, kept_CX: Tensor, run: Run, out_TNV: Tensor,
                  widths: Widths, scale: float) -> None:
    """A function of its own, so that its keys and values are gone before there are others."""
    made_CX = kept_CX[:, : widths.latent] @ up_HYL.flatten(0, 1).t()
    launch(latent_expanded_kernel, (len(run.blocks_X5), len(up_HYL)), q_TNX, made_CX, kept_CX, out_TNV, run.blocks_X5,
           first_head, q_TNX.stride(0), made_CX.stride(0), out_TNV.stride(0), scale * LOG2E, L=widths.latent,
           D=widths.key, R=widths.rotated, V=widths.value, PAD_D=_padded(widths.key), PAD_R=_padded(widths.rotated),
           PAD_V=_padded(widths.value), UPCAST=INTERPRETED, **numbers_of(widths, q_TNX))  # fmt: skip


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))
