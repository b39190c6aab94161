"""Attention kernels against float64 truth. NaN is wherever nothing may be read."""

from __future__ import annotations

import pytest
import torch

from backends.opset import OpSet
from cuda_ops import launch
from tests.cuda.conftest import CudaPaged
from tests.ops.conftest import NAN

P = 16
STEPS = {
    "decode": ([1, 1, 1, 1, 1], [1, P - 1, P, P + 1, 83]),
    "drafts": ([3, 1, 4], [40, 33, 4]),
    "prefill": ([P - 1, P + 1, 83], [P - 1, P + 1, 83]),
    "chunk": ([33, 64], [40, 150]),
    "mixed": ([1, 40, 1, 7], [17, 40, 200, 31]),
    "idle": ([0, 1, 0], [3, 5, 9]),
}


def paged(step: str, heads: tuple[int, int] = (4, 2), head_dim: int = 16, block_size: int = P, *,
          contiguous: bool = False, gap: int = 0) -> CudaPaged:
    query_lens, seq_lens = STEPS[step]
    return CudaPaged(query_lens=query_lens, seq_lens=seq_lens, num_heads=heads[0], num_kv_heads=heads[1],
                     head_dim=head_dim, block_size=block_size, contiguous=contiguous, gap=gap)  # fmt: skip


def check(ops: OpSet, case: CudaPaged, window: int | None = None) -> None:
    q_TNH = case.queries()
    out = case.attend(ops, q_TNH, window)
    torch.testing.assert_close(out.double(), case.truth(q_TNH, window), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("step", "heads"), [
    ("decode", (2, 2)), ("decode", (8, 2)), ("decode", (8, 1)), ("decode", (7, 1)), ("decode", (17, 1)),
    ("drafts", (1, 1)), ("drafts", (4, 1)), ("prefill", (2, 2)), ("prefill", (8, 1)), ("chunk", (4, 2)),
    ("chunk", (7, 1)), ("mixed", (4, 2)), ("idle", (4, 2)),
], ids=str)  # fmt: skip
def test_heads(ops: OpSet, step: str, heads: tuple[int, int]) -> None:
    check(ops, paged(step, heads))


@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 128), (128, 16), (80, 32), (6, 8), (16, 3), (32, 1)])
@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_shapes(ops: OpSet, step: str, head_dim: int, block_size: int) -> None:
    check(ops, paged(step, (4, 2), head_dim, block_size, gap=40))


@pytest.mark.parametrize("window", [1, 15, 17, 80])
@pytest.mark.parametrize("step", ["decode", "drafts", "chunk", "mixed"])
def test_windows(ops: OpSet, step: str, window: int) -> None:
    check(ops, paged(step), window)


@pytest.mark.parametrize("block_size", [3, 16])
@pytest.mark.parametrize(("step", "window"), [("decode", None), ("decode", 17), ("mixed", None), ("chunk", 17)])
def test_contiguous_blocks_give_the_same_bits_as_a_table(ops: OpSet, step: str, window: int | None,
                                                         block_size: int) -> None:
    case = paged(step, block_size=block_size, contiguous=True, gap=24)
    q_TNH = case.queries()
    by_base = case.attend(ops, q_TNH, window)
    torch.testing.assert_close(by_base.double(), case.truth(q_TNH, window), rtol=0, atol=2e-6)
    case.by_table()
    assert torch.equal(case.attend(ops, q_TNH, window), by_base)


@pytest.mark.parametrize("num_sms", [1, 3, 20])
@pytest.mark.parametrize("window", [None, 70])
def test_any_number_of_programs_shares_the_work(ops: OpSet, monkeypatch: pytest.MonkeyPatch, num_sms: int,
                                                window: int | None) -> None:
    """From two programs that have several sequences each to more than there are tiles."""
    monkeypatch.setattr(launch, "INTERPRETED_SMS", num_sms)
    case = CudaPaged(query_lens=[1, 2, 1, 1], seq_lens=[5, 300, 33, 129], num_heads=4, num_kv_heads=2, head_dim=16,
                     block_size=32)  # fmt: skip
    check(ops, case, window)


def test_one_long_sequence_among_short_ones_and_padding(ops: OpSet) -> None:
    """The rows that a graph pads with: one token, at the first slot of a block that others own."""
    case = CudaPaged(query_lens=[1] * 9, seq_lens=[700, *[1] * 8], num_heads=2, num_kv_heads=1, head_dim=16,
                     block_size=32)  # fmt: skip
    case.meta.block_table_SM[1:, 0] = case.meta.block_table_SM[0, 0]
    for s in range(1, 9):
        case.keys[s], case.values[s] = case.keys[0][:1], case.values[0][:1]
    check(ops, case)


def test_a_plan_serves_all_layers_of_its_step(ops: OpSet) -> None:
    case = paged("mixed")
    first, second = case.queries(), case.queries()
    case.attend(ops, first)
    plan = case.meta.plan
    assert set(plan) == {None}
    for window in (None, 17):
        out = ops.attention(second, case.k_cache, case.v_cache, case.meta, scale=0.25, sliding_window=window)
        torch.testing.assert_close(out.double(), case.truth(second, window), rtol=0, atol=2e-6)
    assert case.meta.plan is plan and set(plan) == {None, 17}
    case.meta.plan = None
    out = ops.attention(second, case.k_cache, case.v_cache, case.meta, scale=0.25, sliding_window=10**6)
    torch.testing.assert_close(out.double(), case.truth(second), rtol=0, atol=2e-6)


@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_nan_stays_in_its_sequence(ops: OpSet, step: str) -> None:
    case = paged(step)
    q_TNH = case.queries()
    clean = case.attend(ops, q_TNH)
    q_TNH[0] = NAN
    dirty = case.attend(ops, q_TNH)
    assert dirty[0].isnan().all()
    assert torch.equal(dirty[1:], clean[1:])


@pytest.mark.parametrize("step", ["decode", "chunk"])
def test_large_scores_do_not_overflow(ops: OpSet, step: str) -> None:
    case = paged(step)
    q_TNH = case.queries() * 1000
    torch.testing.assert_close(case.attend(ops, q_TNH).double(), case.truth(q_TNH), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 4e-3), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_half_precision(ops: OpSet, step: str, dtype: torch.dtype, atol: float) -> None:
    case = paged(step, head_dim=64).to(dtype)
    q_TNH = case.queries().to(dtype)
    out = case.attend(ops, q_TNH)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), case.truth(q_TNH), rtol=0, atol=atol)
