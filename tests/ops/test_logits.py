"""Token bitmasks and penalties against float64 definitions in plain Python, and against each other bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from backends.opset import OpSet
from backends.reference import REFERENCE
from tests.ops.conftest import NAN

# repetition, frequency, presence
PENALTIES = [(1.0, 0.0, 0.0), (1.7, 0.0, 0.0), (0.6, 0.0, 0.0), (1.0, 0.8, 0.0), (1.0, -0.3, 0.0), (1.0, 0.0, 1.5),
             (1.2, 0.3, -0.2)]  # fmt: skip


def words(allowed_XV: Tensor) -> Tensor:
    """int32 [X, ceil(V / 32)] of a table of bools."""
    masks = [[sum(1 << (t - w) for t in range(w, min(w + 32, len(row))) if row[t]) for w in range(0, len(row), 32)]
             for row in allowed_XV.tolist()]  # fmt: skip
    return torch.tensor(masks, dtype=torch.int64).where(torch.tensor(masks) < 2**31, torch.tensor(masks) - 2**32).int()


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 700, 5000])
def test_bitmask(ops: OpSet, vocab_size: int) -> None:
    logits = torch.randn(5, vocab_size)
    before = logits.clone()
    allowed = torch.rand(3, vocab_size) < torch.tensor([[0.5], [0.01], [1.0]])
    ops.apply_token_bitmask(logits, words(allowed), torch.tensor([4, 0, 1]))
    expected = before.clone()
    expected[[4, 0, 1]] = before[[4, 0, 1]].masked_fill(~allowed, -math.inf)
    assert torch.equal(logits, expected)


def test_tokens_past_the_mask_are_forbidden_and_bits_past_the_vocabulary_ignored(ops: OpSet) -> None:
    logits = torch.zeros(2, 100)
    ops.apply_token_bitmask(logits, torch.full((1, 2), -1, dtype=torch.int32), torch.tensor([1]))
    assert (logits[0] == 0).all() and (logits[1, :64] == 0).all() and (logits[1, 64:] == -math.inf).all()
    ops.apply_token_bitmask(logits, torch.full((1, 9), -1, dtype=torch.int32), torch.tensor([0]))
    assert (logits[0] == 0).all()


def test_no_masks(ops: OpSet) -> None:
    logits = torch.zeros(2, 100)
    ops.apply_token_bitmask(logits, torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, dtype=torch.int64))
    assert (logits == 0).all()


def penalised(logits: list[float], history: list[int], num_prompt: int, penalties: tuple[float, float, float]) -> list:
    repetition, frequency, presence = penalties
    output, found = history[num_prompt:], []
    for token, value in enumerate(logits):
        if token in history:
            value = value / repetition if value > 0 else value * repetition
        count = output.count(token)
        found.append(value - (frequency * count + presence) if count else value)
    return found


def arguments(histories: list[list[int]], num_prompts: list[int], penalties: list[tuple[float, float, float]],
              rows: list[int]) -> tuple[Tensor, ...]:
    """As `PenaliseOp` takes them, behind the logits; there is something before the first history."""
    lengths = torch.tensor([3, *map(len, histories)])
    starts = lengths.cumsum(0).int()
    columns = list(zip(*penalties))
    return (torch.tensor(rows), torch.tensor([-5, 2**30, -1, *(t for h in histories for t in h)], dtype=torch.int32),
            starts, starts[:-1] + torch.tensor(num_prompts, dtype=torch.int32), torch.tensor(columns[0]),
            *(torch.tensor(c, dtype=torch.float64) for c in columns[1:]))  # fmt: skip


def step(vocab_size: int, longest: int) -> tuple[list[list[int]], list[int], list[int]]:
    """Histories with many repeats, how much of each is the prompt, and rows in no order."""
    kinds = torch.randint(0, vocab_size, (len(PENALTIES), 7))
    lengths = [0, 1, 2, longest, longest // 2, 5, longest]
    histories = [kind[torch.randint(0, 7, (n,))].tolist() for kind, n in zip(kinds, lengths)]
    histories[3] += torch.randint(0, vocab_size, (longest,)).tolist()
    return histories, [n // 3 if n != 5 else 5 for n in lengths], torch.randperm(len(PENALTIES) + 2)[2:].tolist()


@pytest.mark.parametrize(("vocab_size", "longest"), [(1, 3), (37, 40), (5000, 1300)])
def test_penalties(ops: OpSet, vocab_size: int, longest: int) -> None:
    histories, num_prompts, rows = step(vocab_size, longest)
    wide = torch.full((len(PENALTIES) + 2, vocab_size + 11), NAN)
    logits = wide[:, 4 : 4 + vocab_size]
    logits.copy_(torch.randn(logits.shape) * 2)
    before, reference = logits.clone(), logits.clone()
    ops.penalise(logits, *arguments(histories, num_prompts, PENALTIES, rows))
    for x, row in enumerate(rows):
        truth = penalised(before[row].double().tolist(), histories[x], num_prompts[x], PENALTIES[x])
        torch.testing.assert_close(logits[row].double(), torch.tensor(truth, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    others = [row for row in range(len(logits)) if row not in rows]
    assert torch.equal(logits[others], before[others])
    assert int(wide.isnan().sum()) == len(wide) * 11
    REFERENCE.penalise(reference, *arguments(histories, num_prompts, PENALTIES, rows))
    assert torch.equal(logits, reference)


def test_what_cannot_be_drawn_stays_so(ops: OpSet) -> None:
    """But for a penalty that is nothing in fp32: there it becomes NaN, which the sampler reports."""
    logits = torch.full((3, 9), -math.inf)
    logits[2] = 1.0
    ops.penalise(logits, *arguments([[1, 1], [1], [1]], [0, 0, 1], [(2.0, 1.0, 1.0), (1e-50, 0.0, 0.0)] * 1
                                    + [(1e-50, 0.0, 0.0)], [0, 1, 2]))  # fmt: skip
    assert (logits[0] == -math.inf).all()
    assert logits[1, 1].isnan() and logits[1].isnan().sum() == 1
    assert logits[2, 1] == math.inf and (logits[2, 2:] == 1.0).all()


def test_rows_are_independent(ops: OpSet) -> None:
    histories, num_prompts, rows = step(300, 200)
    logits = torch.randn(len(PENALTIES) + 2, 300)
    alone = logits.clone()
    ops.penalise(logits, *arguments(histories, num_prompts, PENALTIES, rows))
    for x in range(len(rows)):
        ops.penalise(alone, *arguments(histories[x : x + 1], num_prompts[x : x + 1], PENALTIES[x : x + 1],
                                       rows[x : x + 1]))  # fmt: skip
    assert torch.equal(alone, logits)
