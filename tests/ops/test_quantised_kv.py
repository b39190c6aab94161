"""Caches of int8 and fp8: what is written, what attention makes of it, and how its blocks move.

Truth is float64 over the numbers that codes and scales stand for. All that may not be read has NaN for its scales, but
for the end of a sequence's last block, where anything finite may be.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backends.metadata import AttentionMetadata
from backends.opset import OpSet
from backends.reference.kv_codes import FP8, QUANTISED
from tests.ops.conftest import NAN, Groups, Paged, layout_of, sizes, spread_cache
from tests.ops.test_attention import STEPS, check
from tests.ops.test_elementwise import rope_case
from tests.ops.test_transfer import Store

INF = float("inf")
HEADS = sizes([(1, 1), (8, 2), (7, 1), (17, 1), (6, 6)], [(1, 1), (4, 2), (7, 1)])
# Head dim, tokens a block; a multiple of four numbers, and one that is none.
SHAPES = sizes([(64, 16), (128, 16), (80, 16), (96, 32), (6, 8), (20, 5), (12, 1), (64, 3), (128, 128)],
               [(64, 128), (80, 32), (12, 8), (16, 5)])
HEAD_DIM = sizes([64], [16])[0]


def paged(ops: OpSet, kv_dtype: torch.dtype, step: str, heads: tuple[int, int] = (4, 2),
          shape: tuple[int, int] = (HEAD_DIM, 16), **options: Any) -> Paged:
    (query_lens, seq_lens), (head_dim, block_size) = STEPS[step], shape
    return Paged(ops=ops, kv_dtype=kv_dtype, query_lens=query_lens, seq_lens=seq_lens, num_heads=heads[0],
                 num_kv_heads=heads[1], head_dim=head_dim, block_size=block_size, **options)  # fmt: skip


# ---- attention


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("step", sizes([*STEPS], ["decode", "mixed"]))
def test_heads(ops: OpSet, kv_dtype: torch.dtype, step: str, heads: tuple[int, int]) -> None:
    check(ops, paged(ops, kv_dtype, step, heads))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("step", sizes(["decode", "mixed", "long"], ["mixed"]))
def test_shapes(ops: OpSet, kv_dtype: torch.dtype, step: str, shape: tuple[int, int]) -> None:
    check(ops, paged(ops, kv_dtype, step, shape=shape, gap=40))


@pytest.mark.parametrize("window", sizes([1, 15, 17, 80, 600], [1, 17]))
@pytest.mark.parametrize("step", sizes(["decode", "chunk", "mixed", "long"], ["mixed"]))
def test_windows(ops: OpSet, kv_dtype: torch.dtype, step: str, window: int) -> None:
    check(ops, paged(ops, kv_dtype, step), window)


@pytest.mark.parametrize("shape", sizes([(64, 16), (20, 5), (32, 128)], [(16, 16)]), ids=str)
@pytest.mark.parametrize(("step", "window"), sizes([("decode", None), ("mixed", 17), ("long", None)], [("mixed", 17)]))
def test_contiguous_blocks_give_the_same_bits_as_a_table(ops: OpSet, kv_dtype: torch.dtype, step: str,
                                                         window: int | None, shape: tuple[int, int]) -> None:
    case = paged(ops, kv_dtype, step, shape=shape, contiguous=True, gap=24)
    q_TNH = case.queries()
    by_base = case.attend(ops, q_TNH, window)
    torch.testing.assert_close(by_base.double(), case.truth(q_TNH, window), rtol=0, atol=2e-6)
    case.by_table()
    assert torch.equal(case.attend(ops, q_TNH, window), by_base)


@pytest.mark.parametrize("heads", sizes([(4, 2), (17, 1)], [(4, 2)]), ids=str)
@pytest.mark.parametrize("bad", ["key", "value"])
def test_a_nan_scale_reaches_who_sees_it_and_nobody_else(ops: OpSet, kv_dtype: torch.dtype, bad: str,
                                                         heads: tuple[int, int]) -> None:
    """One decoding row a sequence, one bad position in the second's cache, in its last kv head."""
    case = paged(ops, kv_dtype, "decode", heads)
    q_TNH, K = case.queries(), heads[1]
    clean = case.attend(ops, q_TNH).view(len(case.seq_lens), K, -1)
    assert clean.isfinite().all()
    block, offset = case.meta.block_table_SM[1, :1].long(), torch.tensor([5])
    groups = Groups.of(ops, case.k_cache if bad == "key" else case.v_cache, keys=bad == "key")
    numbers = torch.randn(1, K, HEAD_DIM)
    numbers[:, K - 1] = NAN
    groups.put(block, offset, numbers)
    dirty = case.attend(ops, q_TNH).view(clean.shape)
    assert dirty[1, K - 1].isnan().all()
    others = torch.ones(clean.shape[:2], dtype=torch.bool)
    others[1] = False
    assert torch.equal(dirty[others], clean[others]) and dirty[1, : K - 1].isfinite().all()


@pytest.mark.parametrize(("query_dtype", "atol"), [(torch.float16, 4e-3), (torch.bfloat16, 5e-2)], ids=str)
def test_half_precision_queries(ops: OpSet, kv_dtype: torch.dtype, query_dtype: torch.dtype, atol: float) -> None:
    case = paged(ops, kv_dtype, "mixed")
    q_TNH = case.queries().to(query_dtype)
    out = case.attend(ops, q_TNH)
    assert out.dtype is query_dtype
    torch.testing.assert_close(out.double(), case.truth(q_TNH), rtol=0, atol=atol)


# ---- writing


def write(ops: OpSet, shape: tuple[int, int, int, int, int], kv_dtype: torch.dtype, qkv: Tensor, rest: tuple[Any, ...],
          norms: tuple[Tensor | None, Tensor | None] = (None, None)) -> tuple[Tensor, Tensor, Tensor]:
    """q, and caches that had poison in them; the gaps are such that scales stay where a number of 4 bytes may be."""
    T, N, K, H, P = shape
    k_cache = spread_cache(ops, T // P + 2, P, K, H, 12, kv_dtype)
    v_cache = spread_cache(ops, T // P + 2, P, K, H, 4, kv_dtype)
    positions, cos_sin, meta = rest
    q_TNH = ops.qkv_rope_write(qkv.clone(), positions, cos_sin, k_cache, v_cache, meta, num_heads=N, num_kv_heads=K,
                               head_dim=H, q_norm_H=norms[0], k_norm_H=norms[1])  # fmt: skip
    return q_TNH, k_cache, v_cache


def assert_holds(ops: OpSet, cache: Tensor, plain: Tensor, meta: AttentionMetadata, *, keys: bool) -> None:
    """`cache` has the numbers that `plain` has, encoded, at the slots of a step, and poison anywhere else."""
    slots = meta.slot_mapping_T[meta.slot_mapping_T >= 0].long()
    blocks, offsets = slots // meta.block_size, slots % meta.block_size
    layout = layout_of(ops)
    numbers = (layout.keys if keys else layout.values)(plain)[blocks, :, offsets]
    expected = torch.full((cache.untyped_storage().nbytes(),), 0xFF, dtype=torch.uint8).view(cache.dtype)
    Groups.of(ops, expected.as_strided(cache.shape, cache.stride()), keys=keys).put(blocks, offsets, numbers)
    memory = torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage())
    assert torch.equal(memory, expected.view(torch.uint8))


ROPE_SHAPES = sizes([(1, 1, 1, 64, 16), (7, 4, 2, 32, 16), (90, 8, 2, 128, 16), (23, 7, 1, 80, 3), (9, 2, 2, 6, 2),
                     (30, 2, 3, 20, 5), (40, 4, 2, 64, 128)],
                    [(1, 1, 1, 64, 16), (7, 4, 2, 32, 3), (5, 7, 1, 80, 128)])  # fmt: skip


@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("shape", ROPE_SHAPES, ids=str)
def test_writes_what_quantise_makes_of_it(ops: OpSet, kv_dtype: torch.dtype, shape: tuple[int, int, int, int, int],
                                          normed: bool) -> None:
    qkv, *rest = rope_case(*shape)
    norms = (torch.randn(shape[3]), torch.randn(shape[3])) if normed else (None, None)
    expected, *plain = write(ops, shape, torch.float32, qkv, tuple(rest), norms)
    q_TNH, *caches = write(ops, shape, kv_dtype, qkv, tuple(rest), norms)
    assert torch.equal(q_TNH, expected)
    for cache, numbers, keys in zip(caches, plain, (True, False)):
        assert_holds(ops, cache, numbers, rest[2], keys=keys)


def test_numbers_of_all_sizes(ops: OpSet, kv_dtype: torch.dtype) -> None:
    """Groups around each limit of a scale: nothing, subnormal, at 2^-100, where fp8's exponent steps, huge."""
    tops = [0.0, 1e-42, 2.0**-101, 2.0**-100, 2.0**-99, 1e-20, 1.0, 1.8124999, 1.8125, 1.8125001, 1.9999999, 448.0,
            464.0, 1e20, 1e38]  # fmt: skip
    shape = (3 * len(tops), 1, 1, 16, 16)
    qkv, _, cos_sin, meta = rope_case(*shape)
    heads = qkv.view(len(qkv), 3, 16)
    heads /= heads.abs().amax(-1, keepdim=True)
    heads *= torch.tensor(tops).repeat_interleave(3)[:, None, None]
    rest = torch.zeros(len(qkv), dtype=torch.int32), cos_sin, meta  # an angle of 0 keeps what the limits are about
    _, *plain = write(ops, shape, torch.float32, qkv, rest)
    _, *caches = write(ops, shape, kv_dtype, qkv, rest)
    for cache, numbers, keys in zip(caches, plain, (True, False)):
        assert_holds(ops, cache, numbers, meta, keys=keys)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_group_that_is_not_finite_is_nan(ops: OpSet, kv_dtype: torch.dtype, bad: float) -> None:
    """One value of one head at one position: it is read as NaN there, and nowhere else."""
    shape = T, N, K, H, P = (20, 2, 2, 16, 16)
    qkv, *rest = rope_case(*shape)
    rest[2].slot_mapping_T[:] = torch.randperm(T)
    qkv.view(T, N + 2 * K, H)[4, N + K, 3] = bad  # a value
    qkv.view(T, N + 2 * K, H)[9, N + 1, 7] = bad  # a key
    _, k_cache, v_cache = write(ops, shape, kv_dtype, qkv, tuple(rest))
    clean = qkv.nan_to_num(1.0, 1.0, 1.0)
    _, *plain = write(ops, shape, torch.float32, clean, tuple(rest))
    for cache, numbers, keys, (t, k) in ((k_cache, plain[0], True, (9, 1)), (v_cache, plain[1], False, (4, 0))):
        slot = int(rest[2].slot_mapping_T[t])
        numbers = numbers.clone()
        (layout_of(ops).keys if keys else layout_of(ops).values)(numbers)[slot // P, k, slot % P] = NAN
        assert_holds(ops, cache, numbers, rest[2], keys=keys)


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [7, 1, 30]], ids=str)
def test_written_then_read(ops: OpSet, kv_dtype: torch.dtype, query_lens: list[int]) -> None:
    """A step's own keys and values, of which none has been in the cache before."""
    N, K, H, P = 4, 2, HEAD_DIM, 16
    case = Paged(ops=ops, kv_dtype=kv_dtype, query_lens=query_lens, seq_lens=[20, 1, 40], num_heads=N, num_kv_heads=K,
                 head_dim=H, block_size=P, gap=8)  # fmt: skip
    T, slots = sum(query_lens), case.meta.slot_mapping_T.long()
    qkv, positions, cos_sin, _ = rope_case(T, N, K, H, P)
    caches = (case.k_cache, True), (case.v_cache, False)
    for cache, keys in caches:
        groups = Groups.of(ops, cache, keys=keys)
        groups.codes[slots // P, :, slots % P] = groups.scales[slots // P, :, slots % P] = 0xFF
    heads = {"num_heads": N, "num_kv_heads": K, "head_dim": H}
    q_TNH = ops.qkv_rope_write(qkv, positions, cos_sin, case.k_cache, case.v_cache, case.meta, **heads)
    for (cache, keys), per_seq in zip(caches, (case.keys, case.values)):
        groups, t = Groups.of(ops, cache, keys=keys), 0
        for numbers, query_len in zip(per_seq, query_lens):
            numbers[len(numbers) - query_len :] = read(groups, slots[t : t + query_len], P)
            t += query_len
    torch.testing.assert_close(case.attend(ops, q_TNH).double(), case.truth(q_TNH), rtol=0, atol=2e-6)


def read(groups: Groups, slots: Tensor, block_size: int) -> Tensor:
    """The numbers in these slots: fp32 [X, K, H]."""
    codes, scales = (part[slots // block_size, :, slots % block_size].clone() for part in (groups.codes, groups.scales))
    if groups.format == "int8":
        return codes.view(torch.int8).float() * scales.view(torch.float32)
    return codes.view(FP8).float() * torch.exp2(scales.float() - 127)


# ---- blocks


def filled(ops: OpSet, kv_dtype: torch.dtype, shape: tuple[int, int, int],
           num_blocks: int = 6) -> tuple[Tensor, Tensor]:
    """Caches with known numbers in all blocks, and poison between those."""
    K, P, H = shape
    caches = [spread_cache(ops, num_blocks, P, K, H, 12, kv_dtype) for _ in range(2)]
    slots = torch.arange(num_blocks * P)
    for cache, keys in zip(caches, (True, False)):
        Groups.of(ops, cache, keys=keys).put(slots // P, slots % P, torch.randn(len(slots), K, H))
    return caches[0], caches[1]


def memory_of(cache: Tensor) -> Tensor:
    """Each block with the gap after it: uint8 [B, bytes]."""
    return torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage()).view(len(cache), -1)


BLOCK_SHAPES = [(2, 16, 64), (1, 1, 4), (3, 5, 20)]  # kv heads, tokens a block, head dim


@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_copy_blocks(ops: OpSet, kv_dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    for cache in filled(ops, kv_dtype, shape):
        before, source = memory_of(cache).clone(), torch.tensor([0, 0, 2, 3, 4, 3])
        ops.copy_blocks(cache, torch.tensor([0, 3]), torch.tensor([1, 5]))
        assert torch.equal(memory_of(cache), before[source])


@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_blocks_are_stored_as_they_are(ops: OpSet, kv_dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    k_cache, v_cache = filled(ops, kv_dtype, shape)
    blocks, slots = [5, 0, 3], [1, 4, 0]
    store = Store(ops, k_cache, v_cache, QUANTISED[kv_dtype])
    size = k_cache[0].numel()
    assert store.num_bytes == 2 * size
    stored = store.export(k_cache, v_cache, blocks, slots)
    k_bytes, v_bytes = memory_of(k_cache)[:, :size], memory_of(v_cache)[:, :size]
    assert torch.equal(stored, torch.cat((k_bytes[blocks], v_bytes[blocks]), 1))
    untouched = torch.ones(store.payloads.shape, dtype=torch.bool)
    untouched[slots, 5 : 5 + store.num_bytes] = False
    assert (store.payloads[untouched] == 0xA5).all()

    fresh = spread_cache(ops, 6, shape[1], shape[0], shape[2], 12, kv_dtype), torch.empty_like(v_cache)
    memory_of(fresh[1]).fill_(0xFF)
    store.bring_back(*fresh, [2, 4, 1], slots)
    for new, old in zip(fresh, (k_bytes, v_bytes)):
        expected = torch.full_like(memory_of(new), 0xFF)
        expected[[2, 4, 1], :size] = old[blocks]
        assert torch.equal(memory_of(new), expected)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "int8", "fp8"])
def test_another_format_is_refused(ops: OpSet, kv_dtype: torch.dtype, name: str) -> None:
    own = QUANTISED[kv_dtype]
    if name == own:
        name = "fp8" if own == "int8" else "int8"
    k_cache, v_cache = filled(ops, kv_dtype, (1, 16, 16))
    before, store = memory_of(k_cache).clone(), Store(ops, k_cache, v_cache, name)
    for move in (store.export, store.bring_back):
        with pytest.raises(ValueError, match=f"a KV cache of {own} is stored as that, not as {name}"):
            move(k_cache, v_cache, [0], [0])
    assert (store.payloads == 0xA5).all() and torch.equal(memory_of(k_cache), before)
