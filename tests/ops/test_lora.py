"""`lora_add`, against float64; and `feed_tokens`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.opset import OpSet
from tests.ops.conftest import sizes

SHAPES = sizes([(1, 24, (16,), 4), (7, 33, (20, 8, 8), 3), (19, 130, (70, 131), 16), (3, 16, (5, 1), 1)],
               [(1, 24, (16,), 4), (7, 33, (20, 8, 8), 3), (3, 16, (5, 1), 1)])


def truth(y_TY: Tensor, x_TX: Tensor, a_LRX: Tensor, b_LYR: Tensor, parts: tuple[int, ...], slots: list[int]) -> Tensor:
    rank, out = b_LYR.shape[2], y_TY.double().clone()
    for t, slot in enumerate(slots):
        if slot:
            h_R = a_LRX[slot - 1].double() @ x_TX[t].double()
            pieces = [b.double() @ h_R[p * rank:(p + 1) * rank] for p, b in enumerate(b_LYR[slot - 1].split(parts))]
            out[t] += torch.cat(pieces)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_token_by_its_own_adapter(ops: OpSet, shape: tuple) -> None:
    T, X, parts, rank = shape
    num_slots = 3
    a_LRX, b_LYR = torch.randn(num_slots, len(parts) * rank, X), torch.randn(num_slots, sum(parts), rank)
    x_TX, y_TY = torch.randn(T, X), torch.randn(T, sum(parts))
    slots = [t * 2 % (num_slots + 1) for t in range(T)]
    expected = truth(y_TY, x_TX, a_LRX, b_LYR, parts, slots)
    packed = ops.pack_lora(a_LRX, b_LYR, parts)
    for present in (None, sorted({*slots} - {0})):
        found = y_TY.clone()
        ops.lora_add(found, x_TX, packed, torch.tensor(slots, dtype=torch.int32), present)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        plain = [t for t, slot in enumerate(slots) if not slot]
        assert torch.equal(found[plain], y_TY[plain])


def test_what_stands_in_tokens_without_an_adapter_harms_nobody(ops: OpSet) -> None:
    a_LRX, b_LYR = torch.randn(1, 4, 24), torch.randn(1, 16, 4)
    x_TX, y_TY = torch.randn(3, 24), torch.randn(3, 16)
    x_TX[0], y_TY[2] = float("nan"), float("nan")
    found = y_TY.clone()
    ops.lora_add(found, x_TX, ops.pack_lora(a_LRX, b_LYR, (16,)), torch.tensor([0, 1, 0], dtype=torch.int32))
    assert torch.equal(found[0], y_TY[0]) and found[1].isfinite().all()
    torch.testing.assert_close(found[1].double(), truth(y_TY, x_TX, a_LRX, b_LYR, (16,), [0, 1, 0])[1], rtol=1e-4,
                               atol=1e-4)


@pytest.mark.parametrize("num_tokens", sizes([1, 5, 256, 300], [1, 5, 300]))
def test_tokens_are_fed_from_the_step_before(ops: OpSet, num_tokens: int) -> None:
    ids_T = torch.randint(0, 99, (num_tokens,), dtype=torch.int32)
    sampled_Q = torch.randint(100, 999, (40,))
    sampled_Q[3] = -1  # of logits that were not finite
    feed_T = torch.randint(-1, 40, (num_tokens,), dtype=torch.int32)
    feed_T[0] = 3
    expected = [int(ids_T[t]) if feed < 0 else max(0, int(sampled_Q[feed])) for t, feed in enumerate(feed_T.tolist())]
    found_T = ops.feed_tokens(ids_T, feed_T, sampled_Q)
    assert found_T.dtype is torch.int32 and found_T.tolist() == expected
