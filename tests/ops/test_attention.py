"""Attention against float64 truth: both layouts, shapes, windows, poison, and independence of the batch."""

from __future__ import annotations

import pytest
import torch

from backends.opset import OpSet
from tests.ops.conftest import NAN, Paged, sizes

P = 16
STEPS = {
    "decode": ([1, 1, 1, 1, 1], [1, P - 1, P, P + 1, 83]),
    "drafts": ([3, 1, 4], [40, 33, 4]),
    "prefill": sizes([([1, P - 1, P, P + 1, 83], [1, P - 1, P, P + 1, 83])],
                     [([P - 1, P + 1, 83], [P - 1, P + 1, 83])])[0],
    "chunk": sizes([([5, 33, 64], [70, 40, 150])], [([33, 64], [40, 150])])[0],
    "mixed": ([1, 40, 1, 7], [17, 40, 200, 31]),
    "long": ([1, 2, 3], [513, 1030, 530]),
    "idle": ([0, 1, 0], [3, 5, 9]),
}
SHORT_STEPS = sizes([*STEPS], ["decode", "drafts", "chunk", "mixed"])
# Query heads, kv heads; each step with each, or those that differ in how a kernel shares its work.
HEADS = [(1, 1), (2, 2), (4, 2), (8, 2), (8, 1), (7, 1), (17, 1), (6, 6)]
STEPS_AND_HEADS = sizes([(step, heads) for step in STEPS for heads in HEADS], [
    ("decode", (2, 2)), ("decode", (8, 2)), ("decode", (8, 1)), ("decode", (7, 1)), ("decode", (17, 1)),
    ("drafts", (1, 1)), ("drafts", (4, 1)), ("prefill", (2, 2)), ("prefill", (8, 1)), ("chunk", (4, 2)),
    ("chunk", (7, 1)), ("mixed", (4, 2)), ("long", (4, 2)), ("idle", (4, 2))])  # fmt: skip
HEAD_DIM = sizes([64], [16])[0]
# Head dim, tokens a block.
SHAPES = sizes([(H, B) for H in (6, 16, 32, 80, 128) for B in (1, 3, 8, 16, 32, 128)],
               [(64, 128), (128, 16), (80, 32), (6, 8), (16, 3), (32, 1)])


def paged(ops: OpSet, step: str, heads: tuple[int, int] = (4, 2), head_dim: int = HEAD_DIM, block_size: int = P, *,
          contiguous: bool = False, gap: int = 0) -> Paged:
    query_lens, seq_lens = STEPS[step]
    return Paged(ops=ops, query_lens=query_lens, seq_lens=seq_lens, num_heads=heads[0], num_kv_heads=heads[1],
                 head_dim=head_dim, block_size=block_size, contiguous=contiguous, gap=gap)  # fmt: skip


def check(ops: OpSet, case: Paged, window: int | None = None) -> None:
    q_TNH = case.queries()
    torch.testing.assert_close(case.attend(ops, q_TNH, window).double(), case.truth(q_TNH, window), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("step", "heads"), STEPS_AND_HEADS, ids=str)
def test_heads(ops: OpSet, step: str, heads: tuple[int, int]) -> None:
    check(ops, paged(ops, step, heads))


@pytest.mark.parametrize(("head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("step", sizes(["decode", "mixed", "long"], ["decode", "mixed"]))
def test_shapes(ops: OpSet, step: str, head_dim: int, block_size: int) -> None:
    check(ops, paged(ops, step, head_dim=head_dim, block_size=block_size, gap=40))


@pytest.mark.parametrize("window", sizes([1, 15, 16, 17, 80, 600, 5000], [1, 15, 17, 80]))
@pytest.mark.parametrize("step", SHORT_STEPS)
def test_windows(ops: OpSet, step: str, window: int) -> None:
    check(ops, paged(ops, step), window)


@pytest.mark.parametrize(("head_dim", "block_size"), sizes([(64, 16), (32, 3), (80, 16), (6, 8), (64, 128)],
                                                           [(16, 16), (16, 3)]))
@pytest.mark.parametrize(("step", "window"), sizes([(step, window) for step in STEPS for window in (None, 17)],
                                                   [("decode", None), ("decode", 17), ("mixed", None), ("chunk", 17)]))
def test_contiguous_blocks_give_the_same_bits_as_a_table(ops: OpSet, step: str, window: int | None, head_dim: int,
                                                         block_size: int) -> None:
    case = paged(ops, step, head_dim=head_dim, block_size=block_size, contiguous=True, gap=24)
    q_TNH = case.queries()
    by_base = case.attend(ops, q_TNH, window)
    torch.testing.assert_close(by_base.double(), case.truth(q_TNH, window), rtol=0, atol=2e-6)
    case.by_table()
    assert torch.equal(case.attend(ops, q_TNH, window), by_base)


@pytest.mark.parametrize("step", sizes(["decode", "chunk", "mixed", "long"], ["decode", "mixed"]))
def test_a_sequence_does_not_see_its_neighbours(ops: OpSet, step: str) -> None:
    case = paged(ops, step)
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
        if ops.attention.__module__ == "backends.cpu.kernels":
            assert torch.equal(alone, together[rows])
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", sizes(["decode", "mixed", "long"], ["decode", "mixed"]))
def test_nan_stays_in_its_sequence(ops: OpSet, step: str) -> None:
    case = paged(ops, step)
    q_TNH = case.queries()
    clean = case.attend(ops, q_TNH)
    q_TNH[0] = NAN
    dirty = case.attend(ops, q_TNH)
    assert dirty[0].isnan().all()
    assert torch.equal(dirty[case.query_lens[0] :], clean[case.query_lens[0] :])


@pytest.mark.parametrize("step", ["decode", "chunk"])
def test_large_scores_do_not_overflow(ops: OpSet, step: str) -> None:
    case = paged(ops, step)
    q_TNH = case.queries() * 1000
    torch.testing.assert_close(case.attend(ops, q_TNH).double(), case.truth(q_TNH), rtol=0, atol=2e-3)


def test_without_a_plan(ops: OpSet) -> None:
    case = paged(ops, "mixed")
    q_TNH = case.queries()
    out = ops.attention(q_TNH, case.k_cache, case.v_cache, case.meta, scale=case.head_dim**-0.5)
    torch.testing.assert_close(out.double(), case.truth(q_TNH), rtol=0, atol=2e-6)


@pytest.mark.parametrize("contiguous", [False, True], ids=["table", "base"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 4e-3), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_half_precision(ops: OpSet, step: str, dtype: torch.dtype, atol: float, contiguous: bool) -> None:
    case = paged(ops, step, head_dim=64, contiguous=contiguous).to(dtype)
    q_TNH = case.queries().to(dtype)
    out = case.attend(ops, q_TNH)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), case.truth(q_TNH), rtol=0, atol=atol)
