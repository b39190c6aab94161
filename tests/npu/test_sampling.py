"""Choosing tokens: the CPU's tokens from the same logits, and the fused filter against its own definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.reference import REFERENCE
from npu_ops.sampling import top_k_top_p
from tests.npu.device import npu

NAN = float("nan")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def there(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(npu().device) for tensor in tensors]


def parameters(rows: int) -> tuple[Tensor, ...]:
    """Every combination turns up: greedy, all of the vocabulary, one token, edges of each rule. No sum of equal
    probabilities is a top_p here: on which side it lies would be a matter of its last bit."""
    choose = lambda *values: torch.tensor(values)[torch.randint(0, len(values), (rows,))]  # noqa: E731
    return (choose(0.0, 0.3, 1.0, 2.5), choose(0, 1, 5, 40, 10**6).int(), choose(1.0, 0.913, 0.487, 0.0131, 0.0),
            choose(0.0, 0.0, 0.02, 0.3, 1.0), torch.rand(rows))


@pytest.mark.parametrize("vocab_size", [1, 7, 211, 5000])
def test_the_cpu_s_tokens(vocab_size: int) -> None:
    logits, given = torch.randn(300, vocab_size) * 4, parameters(300)
    truth = REFERENCE.sample(logits.clone(), *given)
    found = npu().ops.sample(*there(logits, *given))
    assert found.dtype is torch.int64
    assert torch.equal(found.cpu(), truth)


@pytest.mark.parametrize("vocab_size", [7, 211])
def test_the_cpu_s_tokens_among_equals(vocab_size: int) -> None:
    """Most logits are shared by several tokens, so that every rule ends among equals."""
    logits, given = torch.randint(-2, 3, (400, vocab_size)).float(), parameters(400)
    assert torch.equal(npu().ops.sample(*there(logits, *given)).cpu(), REFERENCE.sample(logits.clone(), *given))


def test_each_token_as_often_as_it_is_likely() -> None:
    logits, count = torch.tensor([0.0, 1.0, 2.0, -1.0]), 4000
    uniform = (torch.arange(count) + 0.5) / count
    full = [torch.full((count,), value) for value in (1.0, 0, 1.0, 0.0)]
    found = npu().ops.sample(*there(logits.repeat(count, 1), full[0], full[1].int(), full[2], full[3], uniform))
    shares = found.cpu().bincount(minlength=4) / count
    torch.testing.assert_close(shares, logits.softmax(0), rtol=0, atol=2 / count)


def test_what_was_forbidden_is_never_drawn() -> None:
    logits = torch.full((50, 100), float("-inf"))
    logits[:, [3, 70]] = torch.randn(50, 2)
    given = parameters(50)
    assert set(npu().ops.sample(*there(logits, *given)).tolist()) <= {3, 70}


def test_rows_without_a_largest_stay_in_range() -> None:
    logits = torch.randn(3, 20)
    logits[1] = NAN
    given = [torch.tensor([0.7] * 3), torch.zeros(3, dtype=torch.int32), torch.full((3,), 0.9), torch.zeros(3),
             torch.rand(3)]
    found, truth = npu().ops.sample(*there(logits, *given)), REFERENCE.sample(logits.clone(), *given)
    assert 0 <= int(found[1]) < 20 and found.cpu()[[0, 2]].tolist() == truth[[0, 2]].tolist()
    assert 0 <= int(npu().ops.argmax(*there(logits))[1]) < 20


def test_argmax_takes_the_smallest_index_among_equals() -> None:
    logits = torch.randint(-3, 3, (200, 50)).float()
    found = npu().ops.argmax(*there(logits))
    assert torch.equal(found.cpu(), REFERENCE.argmax(logits)) and found.dtype is torch.int64


# --- the fused filter


def filter_truth(logits: Tensor, p: Tensor | None, k: Tensor | None) -> Tensor:
    """Which tokens are kept, by the operator's documentation, in float64."""
    kept = torch.ones(logits.shape, dtype=torch.bool)
    for row, x in enumerate(logits.double()):
        values, ids = x.sort(stable=True)
        if k is not None:
            values = values.masked_fill(values < values[-int(k[row])], float("-inf"))
        if p is not None:
            dropped = values.softmax(0).cumsum(0) <= 1 - p[row].double()
            dropped[-1] = False
            values = values.masked_fill(dropped, float("-inf"))
        kept[row, ids] = values > float("-inf")
    return kept


@pytest.mark.parametrize("rules", ["p", "k", "pk"])
def test_the_fused_filter(rules: str) -> None:
    logits = torch.randn(40, 500) * 3
    p = 0.05 + 0.9 * torch.rand(40) if "p" in rules else None
    k = torch.randint(1, 400, (40,), dtype=torch.int32) if "k" in rules else None
    found = top_k_top_p(logits_SV=logits.to(npu().device), **{f"{name}_S": None if x is None else x.to(npu().device)
                                                              for name, x in (("p", p), ("k", k))}).cpu()
    kept = filter_truth(logits, p, k)
    assert torch.equal(found[kept], logits[kept]) and (found[~kept] == float("-inf")).all()
    assert not kept.all()
