"""Quantised caches, what the compiled operators alone promise: any address for a scale, and the same bits in any
company and on any number of threads."""

from __future__ import annotations

import pytest
import torch

from backends.metadata import AttentionMetadata
from backends.opset import OpSet
from backends.reference.kv_codes import QUANTISED
from tests.ops.conftest import Groups, Paged, spread_cache
from tests.ops.test_attention import check
from tests.ops.test_elementwise import rope_case
from tests.ops.test_quantised_kv import assert_holds, filled, memory_of, paged, write
from tests.ops.test_transfer import Store, copy_in_threads


@pytest.fixture
def compiled(op_sets: dict[str, OpSet]) -> OpSet:
    if "compiled" not in op_sets:
        pytest.skip("no C compiler here")
    return op_sets["compiled"]


@pytest.mark.parametrize("shape", [(6, 5), (6, 1), (10, 3), (2, 7)], ids=str)
def test_scales_on_odd_addresses(compiled: OpSet, kv_dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for step in ("decode", "mixed", "long"):
        check(compiled, paged(compiled, kv_dtype, step, shape=shape, gap=7))
    H, P = shape
    qkv, *rest = rope_case(31, 2, 2, H, P)
    _, *plain = write(compiled, (31, 2, 2, H, P), torch.float32, qkv, tuple(rest))
    _, *caches = write(compiled, (31, 2, 2, H, P), kv_dtype, qkv, tuple(rest))
    for cache, numbers, keys in zip(caches, plain, (True, False)):
        assert_holds(compiled, cache, numbers, rest[2], keys=keys)


@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
def test_nan_scales_that_a_window_hides(compiled: OpSet, kv_dtype: torch.dtype, keys: bool) -> None:
    """In a block of which it shows other positions; with any bits in the NaN."""
    case = paged(compiled, kv_dtype, "decode")
    q_TNH, block = case.queries(), int(case.meta.block_table_SM[1, 0])
    clean = case.attend(compiled, q_TNH, window=4)
    Groups.of(compiled, case.k_cache if keys else case.v_cache, keys=keys).scales[block, :, :11] = 0xFF
    assert torch.equal(case.attend(compiled, q_TNH, window=4), clean)
    assert case.attend(compiled, q_TNH, window=5)[1].isnan().all()


@pytest.mark.parametrize("step", ["decode", "chunk", "mixed", "long"])
def test_a_sequence_alone_gives_the_same_bits(compiled: OpSet, kv_dtype: torch.dtype, step: str) -> None:
    case = paged(compiled, kv_dtype, step)
    q_TNH, meta, begin = case.queries(), case.meta, 0
    together = case.attend(compiled, q_TNH)
    for s, query_len in enumerate(case.query_lens):
        rows = slice(begin, begin + query_len)
        case.meta = AttentionMetadata(
            query_start_S1=torch.tensor([0, query_len], dtype=torch.int32), seq_lens_S=meta.seq_lens_S[s : s + 1],
            block_table_SM=meta.block_table_SM[s : s + 1], slot_mapping_T=meta.slot_mapping_T[rows],
            max_query_len=query_len, max_seq_len=case.seq_lens[s], num_tokens=query_len, block_size=case.block_size,
        )  # fmt: skip
        assert torch.equal(case.attend(compiled, q_TNH[rows].contiguous()), together[rows])
        begin += query_len


def test_threads(compiled: OpSet, kv_dtype: torch.dtype) -> None:
    """Their number changes no bit of what is read or written."""
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        torch.manual_seed(1)
        case = Paged(ops=compiled, kv_dtype=kv_dtype, query_lens=[1, 90, 1, 1], seq_lens=[700, 200, 33, 600],
                     num_heads=6, num_kv_heads=2, head_dim=32, block_size=16)  # fmt: skip
        q_TNH = case.queries()
        qkv, *rest = rope_case(200, 4, 2, 64, 16)
        written = write(compiled, (200, 4, 2, 64, 16), kv_dtype, qkv, tuple(rest))
        results.append([case.attend(compiled, q_TNH), case.attend(compiled, q_TNH, window=100), written[0],
                        *(memory_of(cache) for cache in written[1:])])  # fmt: skip
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0]))


def test_several_copying_threads_at_once(compiled: OpSet, kv_dtype: torch.dtype) -> None:
    """Each with its own blocks and slots, in one store: the workers of two directions."""
    k_cache, v_cache = filled(compiled, kv_dtype, (2, 16, 64), num_blocks=64)
    store = Store(compiled, k_cache, v_cache, QUANTISED[kv_dtype], 64)
    back = spread_cache(compiled, 64, 16, 2, 64, 12, kv_dtype), spread_cache(compiled, 64, 16, 2, 64, 12, kv_dtype)
    copy_in_threads(store, (k_cache, v_cache), back)
    for new, old in zip(back, (k_cache, v_cache)):
        assert torch.equal(memory_of(new), memory_of(old))
