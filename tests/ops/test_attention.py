"""Attention against float64 truth: both layouts, shapes, windows, poison, and independence of the batch."""

from __future__ import annotations

import pytest
import torch

from backends.opset import OpSet
from tests.ops.conftest import NAN, Paged

HEADS = [(1, 1), (4, 2), (8, 2), (7, 1), (6, 6)]
P = 16
STEPS = {
    "decode": ([1, 1, 1, 1, 1], [1, P - 1, P, P + 1, 83]),
    "prefill": ([1, P - 1, P, P + 1, 83], [1, P - 1, P, P + 1, 83]),
    "chunk": ([5, 33, 64], [70, 40, 150]),
    "mixed": ([1, 40, 1, 7], [17, 40, 200, 31]),
    "long": ([1, 2, 3], [513, 1030, 530]),
    "idle": ([0, 1], [3, 5]),
}


def paged(step: str, heads: tuple[int, int] = (4, 2), head_dim: int = 64, block_size: int = P, *,
          contiguous: bool = False, gap: int = 0) -> Paged:
    query_lens, seq_lens = STEPS[step]
    return Paged(query_lens=query_lens, seq_lens=seq_lens, num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim,
                 block_size=block_size, contiguous=contiguous, gap=gap)  # fmt: skip


def check(ops: OpSet, case: Paged, window: int | None = None) -> None:
    q_TNH = case.queries()
    torch.testing.assert_close(case.attend(ops, q_TNH, window).double(), case.truth(q_TNH, window), rtol=0, atol=2e-6)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"N{h[0]}-K{h[1]}")
def test_heads(ops: OpSet, step: str, heads: tuple[int, int]) -> None:
    check(ops, paged(step, heads))


@pytest.mark.parametrize("head_dim", [32, 80, 128, 6])
@pytest.mark.parametrize("step", ["mixed", "long"])
def test_head_dims(ops: OpSet, step: str, head_dim: int) -> None:
    check(ops, paged(step, head_dim=head_dim))


@pytest.mark.parametrize("block_size", [1, 3, 8, 32, 128])
@pytest.mark.parametrize("step", ["mixed", "long"])
def test_block_sizes(ops: OpSet, step: str, block_size: int) -> None:
    check(ops, paged(step, block_size=block_size))


@pytest.mark.parametrize("window", [1, 15, 16, 17, 600, 5000])
@pytest.mark.parametrize("step", ["decode", "chunk", "mixed", "long"])
def test_windows(ops: OpSet, step: str, window: int) -> None:
    check(ops, paged(step), window)


@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (32, 3), (80, 16), (6, 8), (64, 128)])
@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("step", STEPS)
def test_contiguous_blocks_give_the_same_bits_as_a_table(ops: OpSet, step: str, window: int | None, head_dim: int,
                                                         block_size: int) -> None:
    case = paged(step, head_dim=head_dim, block_size=block_size, contiguous=True, gap=24)
    q_TNH = case.queries()
    by_base = case.attend(ops, q_TNH, window)
    torch.testing.assert_close(by_base.double(), case.truth(q_TNH, window), rtol=0, atol=2e-6)
    case.by_table()
    assert torch.equal(case.attend(ops, q_TNH, window), by_base)


@pytest.mark.parametrize("step", ["mixed", "long"])
@pytest.mark.parametrize("block_size", [3, 16])
def test_blocks_that_lie_apart(ops: OpSet, step: str, block_size: int) -> None:
    check(ops, paged(step, block_size=block_size, gap=40))


@pytest.mark.parametrize("step", ["decode", "chunk", "mixed", "long"])
def test_a_sequence_does_not_see_its_neighbours(ops: OpSet, step: str) -> None:
    case = paged(step)
    q_TNH = case.queries()
    together = case.attend(ops, q_TNH)
    meta, begin = case.meta, 0
    for s, query_len in enumerate(case.query_lens):
        rows = slice(begin, begin + query_len)
        case.meta = type(meta)(
            query_start_S1=torch.tensor([0, query_len], dtype=torch.int32), seq_lens_S=meta.seq_lens_S[s : s + 1],
            block_table_SM=meta.block_table_SM[s : s + 1], slot_mapping_T=meta.slot_mapping_T[rows],
            max_query_len=query_len, max_seq_len=case.seq_lens[s], num_tokens=query_len, block_size=P,
        )  # fmt: skip
        alone = case.attend(ops, q_TNH[rows].contiguous())
        begin += query_len
        if ops.attention.__module__ == "backends.cpu_kernels":
            assert torch.equal(alone, together[rows])
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-5)


def test_nan_stays_in_its_sequence(ops: OpSet) -> None:
    case = paged("mixed")
    q_TNH = case.queries()
    clean = case.attend(ops, q_TNH)
    q_TNH[0] = NAN
    dirty = case.attend(ops, q_TNH)
    assert dirty[0].isnan().all()
    assert torch.equal(dirty[1:], clean[1:])


def test_large_scores_do_not_overflow(ops: OpSet) -> None:
    case = paged("chunk")
    q_TNH = case.queries() * 1000
    torch.testing.assert_close(case.attend(ops, q_TNH).double(), case.truth(q_TNH), rtol=0, atol=2e-3)


def test_without_a_plan(ops: OpSet) -> None:
    case = paged("mixed")
    q_TNH = case.queries()
    out = ops.attention(q_TNH, case.k_cache, case.v_cache, case.meta, scale=case.head_dim**-0.5)
    torch.testing.assert_close(out.double(), case.truth(q_TNH), rtol=0, atol=2e-6)


@pytest.mark.parametrize("contiguous", [False, True], ids=["table", "base"])
def test_bfloat16(ops: OpSet, contiguous: bool) -> None:
    case = paged("mixed", contiguous=contiguous)
    q_TNH = case.queries().bfloat16()
    case.k_cache, case.v_cache = case.k_cache.bfloat16(), case.v_cache.bfloat16()
    out = case.attend(ops, q_TNH)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), case.truth(q_TNH), rtol=0, atol=5e-2)
