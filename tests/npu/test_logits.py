"""Bitmasks and penalties for all rows at once, against the reference, which takes one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.reference import REFERENCE
from tests.npu.device import npu
from tests.ops import test_logits as shared


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def on_npu(name: str, logits: Tensor, *arguments: Tensor) -> Tensor:
    memory = logits.to(npu().device)
    getattr(npu().ops, name)(memory, *(x.to(npu().device) for x in arguments))
    return memory.cpu()


@pytest.mark.parametrize("vocab_size", [1, 31, 33, 700])
@pytest.mark.parametrize("words", [0, -1, 3])
def test_bitmask(vocab_size: int, words: int) -> None:
    """words: more or fewer words than the vocabulary needs."""
    width = max(1, -(-vocab_size // 32) + words)
    masks = torch.randint(-(2**31), 2**31, (3, width)).int()
    logits, rows = torch.randn(5, vocab_size), torch.tensor([4, 0, 1])
    truth = logits.clone()
    REFERENCE.apply_token_bitmask(truth, masks, rows)
    assert torch.equal(on_npu("apply_token_bitmask", logits, masks, rows), truth)


def test_no_masks() -> None:
    logits = torch.randn(2, 40)
    none = torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)
    assert torch.equal(on_npu("apply_token_bitmask", logits, *none), logits)


@pytest.mark.parametrize(("vocab_size", "longest"), [(1, 3), (37, 40), (5000, 600)])
def test_penalties(vocab_size: int, longest: int) -> None:
    histories, num_prompts, rows = shared.step(vocab_size, longest)
    logits = torch.randn(len(rows) + 2, vocab_size) * 3
    given = shared.arguments(histories, num_prompts, shared.PENALTIES, rows)
    truth = logits.clone()
    REFERENCE.penalise(truth, *given)
    assert torch.equal(on_npu("penalise", logits, *given), truth)
    assert not torch.equal(truth, logits)


def test_penalties_of_rows_without_a_history() -> None:
    logits = torch.randn(4, 30)
    given = shared.arguments([[], []], [0, 0], [(1.5, 0.5, 0.5)] * 2, [2, 1])
    assert torch.equal(on_npu("penalise", logits, *given), logits)
    nothing = [x[:0] if i in (0, 1, 3, 4, 5, 6) else x[:1] for i, x in enumerate(given)]
    assert torch.equal(on_npu("penalise", logits, *nothing), logits)
