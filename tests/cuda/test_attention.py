"""How attention kernels share their work, and what a plan is for; their results are in `tests/ops`."""

from __future__ import annotations

import pytest
import torch

from backends.opset import OpSet
from cuda_ops import launch
from tests.ops.conftest import Paged
from tests.ops.test_attention import check, paged


@pytest.mark.parametrize("num_sms", [1, 3, 20])
@pytest.mark.parametrize("window", [None, 70])
def test_any_number_of_programs_shares_the_work(ops: OpSet, monkeypatch: pytest.MonkeyPatch, num_sms: int,
                                                window: int | None) -> None:
    """From two programs that have several sequences each to more than there are tiles."""
    monkeypatch.setattr(launch, "INTERPRETED_SMS", num_sms)
    case = Paged(ops=ops, query_lens=[1, 2, 1, 1], seq_lens=[5, 300, 33, 129], num_heads=4, num_kv_heads=2, head_dim=16,
                 block_size=32)  # fmt: skip
    check(ops, case, window)


def test_one_long_sequence_among_short_ones_and_padding(ops: OpSet) -> None:
    """The rows that a graph pads with: one token, at the first slot of a block that others own."""
    case = Paged(ops=ops, query_lens=[1] * 9, seq_lens=[700, *[1] * 8], num_heads=2, num_kv_heads=1, head_dim=16,
                 block_size=32)  # fmt: skip
    case.meta.block_table_SM[1:, 0] = case.meta.block_table_SM[0, 0]
    for s in range(1, 9):
        case.keys[s], case.values[s] = case.keys[0][:1], case.values[0][:1]
    check(ops, case)


def test_a_plan_serves_all_layers_of_its_step(ops: OpSet) -> None:
    case = paged(ops, "mixed")
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


def test_the_longest_prompt_is_prefilled_first(ops: OpSet) -> None:
    """As wide as several comparisons at once, with equals, and with sequences that are decoded in between."""
    query_lens = [20, 1, 40, 17, 17, 1, 30, 18, 19, 33, 20]
    seq_lens = [50, 400, 90, 17, 17, 3, 90, 300, 19, 33, 20]
    case = Paged(ops=ops, query_lens=query_lens, seq_lens=seq_lens, num_heads=4, num_kv_heads=2, head_dim=16,
                 block_size=32)  # fmt: skip
    check(ops, case)
    plan = case.meta.plan[None]
    prefilled = sorted((-n, s) for s, (n, q) in enumerate(zip(seq_lens, query_lens)) if q > 1)
    order = plan.order_S.tolist()
    assert order[: len(prefilled)] == [s for _, s in prefilled] and sorted(order) == [*range(len(order))]
    counts = plan.blocks_S1.diff().tolist()
    assert all(counts[: len(prefilled)]) and not any(counts[len(prefilled) :])
