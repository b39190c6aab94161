"""Argmax and sampling against a naive float64 sampler in plain Python."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backends.opset import OpSet
from backends.reference import REFERENCE
from tests.ops.conftest import sizes


def possible_tokens(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, uniform: float,
                    slack: float = 3e-6) -> set[int]:  # fmt: skip
    """Tokens that the contract allows when sums may be off by `slack`: mostly one, two at a boundary."""
    if temperature == 0:
        return {logits.index(max(logits))}
    scaled = [x / temperature for x in logits]
    if 0 < top_k < len(scaled):
        kth = sorted(scaled, reverse=True)[top_k - 1]
        scaled = [x if x >= kth else -math.inf for x in scaled]
    most = max(scaled)
    weights = [math.exp(x - most) for x in scaled]
    found = set()
    for p_shift in (-slack, 0.0, slack):
        for m_shift in (1 - slack, 1.0, 1 + slack):
            kept = keep(weights, top_p + p_shift if top_p < 1 else 1.0, min_p * m_shift)
            found |= invert(kept, [min(max(uniform + u_shift, 0.0), 1 - 1e-12) for u_shift in (-slack, 0.0, slack)])
    return found


def keep(weights: list[float], top_p: float, min_p: float) -> list[float]:
    least = min(min_p, 1.0) * max(weights)
    kept = [w if w >= least else 0.0 for w in weights]
    running, total = 0.0, math.fsum(weights)
    for i in sorted(range(len(kept)), key=lambda i: (-kept[i], i)):
        if running >= top_p * total and top_p < 1 and running > 0:
            kept[i] = 0.0
        running += kept[i]
    return kept


def invert(weights: list[float], uniforms: list[float]) -> set[int]:
    """For each of them the first token up to which the weights add up to more than it."""
    sums, total = [*accumulate(weights)], math.fsum(weights)
    found = {bisect_right(sums, uniform * total) for uniform in uniforms}
    return {i if i < len(weights) else max(i for i, w in enumerate(weights) if w > 0) for i in found}


def draw(ops: OpSet, logits: Tensor, temperature: list[float], top_k: list[int], top_p: list[float], min_p: list[float],
         uniform: list[float]) -> list[int]:  # fmt: skip
    return ops.sample(logits.clone(), torch.tensor(temperature), torch.tensor(top_k), torch.tensor(top_p),
                      torch.tensor(min_p), torch.tensor(uniform)).tolist()  # fmt: skip


settings_of_a_row = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 2.5]), st.sampled_from([0, 1, 2, 5, 40, 1000]),
    st.sampled_from([0.0, 0.05, 0.5, 0.9, 0.999, 1.0]), st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.floats(0, 1, exclude_max=True, width=32),
)  # fmt: skip


# temperature, top_k, top_p, min_p
ROWS = [
    (0.0, 5, 0.5, 0.0), (0.3, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (2.5, 40, 0.9, 0.0), (1.0, 0, 0.5, 0.02),
    (1.0, 1000, 0.999, 0.0), (2.5, 0, 0.05, 0.0), (1.0, 2, 0.0, 0.0), (1.0, 0, 1.0, 1.0), (2.5, 7, 1.0, 0.3),
]  # fmt: skip


def check(ops: OpSet, logits: Tensor, rows: list[tuple[float, int, float, float]]) -> None:
    uniform = torch.rand(len(rows)).tolist()
    tokens = draw(ops, logits, *([*column] for column in zip(*rows)), uniform)
    for s, token in enumerate(tokens):
        possible = possible_tokens if logits.shape[1] < 1000 else possible_by_sorting
        assert token in possible(logits[s].tolist(), *rows[s], uniform[s]), s


def possible_by_sorting(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float,
                        uniform: float, slack: float = 3e-6) -> set[int]:
    """`possible_tokens` by the reference, which sorts whole rows in float64: for large vocabularies."""
    off = torch.tensor([-slack, 0.0, slack], dtype=torch.float64)
    p, m, u = (x.flatten() for x in torch.meshgrid(off, off, off, indexing="ij"))
    row = torch.tensor(logits).expand(27, -1)
    limits = torch.full((27,), temperature), torch.full((27,), top_k)
    top_p_S = (top_p + p).clamp(max=1 - slack) if top_p < 1 else torch.ones(27)
    tokens = REFERENCE.sample(row, *limits, top_p_S, min_p * (1 + m), (uniform + u).clamp(0, 1 - 1e-12))
    return set(tokens.tolist())


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("vocab_size", [1, 2, 17, 300])
def test_every_kind_of_row(ops: OpSet, vocab_size: int, coarse: bool) -> None:
    logits = torch.randn(len(ROWS), vocab_size) * 3
    check(ops, logits.round() if coarse else logits, ROWS)


def test_equals_are_kept_in_the_order_of_their_ids(ops: OpSet) -> None:
    """Also those at the end of a row, which fill no whole vector: their weights must be equal to the last bit."""
    rows = [(2.5, 0, 0.9, 0.0), (0.7, 0, 0.5, 0.0), (1.3, 60, 0.95, 0.01)] * sizes([24], [8])[0]
    check(ops, (torch.randn(len(rows), 301) * 3).round(), rows)


@pytest.mark.parametrize("shape", ["flat", "peaked", "ties", "equal", "apart", "zeros"])
def test_large_vocabularies(ops: OpSet, shape: str) -> None:
    """Where thresholds are narrowed over the whole row first, another way to do so fails in each of these."""
    noise = torch.randn(4, 9001)
    logits = {
        "flat": noise * 1e-3, "peaked": noise * 3, "ties": noise.round(), "equal": torch.full_like(noise, -2.5),
        "apart": torch.where(noise > 2.5, noise, -1e30 + noise),
        "zeros": torch.where(noise.abs() > 2, noise, noise * 0.0),  # of either sign, and equal
    }[shape]  # fmt: skip
    check(ops, logits, [(1.0, 5000, 1.0, 0.0), (1.0, 0, 0.7, 0.0), (0.7, 50, 0.9, 0.0), (1.5, 6000, 0.4, 0.01)])


@pytest.mark.parametrize("min_p", [0.0, 0.01])
def test_tokens_anywhere_in_a_large_vocabulary(ops: OpSet, min_p: float) -> None:
    """Those beyond the last that may be drawn take up more than one stretch of the row."""
    logits = torch.randn(5, 27_001)
    logits[:, 18_000:] = -math.inf
    logits[4, :17_990] = -math.inf
    rows, uniform = [(1.0, 0, 1.0, min_p)] * 5, [0.0, 0.45, 0.9, 0.99999994, 0.99999994]
    tokens = draw(ops, logits, *([*column] for column in zip(*rows)), uniform)
    for s, token in enumerate(tokens):
        assert token in possible_by_sorting(logits[s].tolist(), *rows[s], uniform[s]), s
    assert tokens[0] < 100 and tokens[1] > 4000 and 10_000 < tokens[2] <= tokens[3] < 18_000 <= tokens[4] + 10


@settings(max_examples=sizes([60], [6])[0], deadline=None)
@given(rows=st.lists(settings_of_a_row, min_size=1, max_size=4), vocab_size=st.sampled_from([1, 2, 17, 300]),
       seed=st.integers(0, 10_000), coarse=st.booleans())  # fmt: skip
def test_sample_follows_its_contract(
    op_sets: dict[str, OpSet], rows: list[tuple], vocab_size: int, seed: int, coarse: bool
) -> None:
    logits = torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    logits = logits.round() if coarse else logits  # coarse: many ties
    columns = [list(c) for c in zip(*rows)]
    for name, ops in op_sets.items():
        for s, token in enumerate(draw(ops, logits, *columns)):
            assert token in possible_tokens(logits[s].tolist(), *rows[s]), (name, s)


@pytest.mark.parametrize("vocab_size", [1, 31, 9000, 32000])
def test_argmax_takes_the_first_of_equals(ops: OpSet, vocab_size: int) -> None:
    logits = torch.randn(5, vocab_size)
    logits[:, vocab_size // 2] = logits[:, -1] = 99.0
    assert ops.argmax(logits).tolist() == [vocab_size // 2] * 5


def test_logits_may_be_a_view(ops: OpSet) -> None:
    wide = torch.randn(7, 9000)
    view, ones = wide[:, 11:8011], torch.ones(7)
    no_limit = torch.zeros(7, dtype=torch.int64)
    assert torch.equal(ops.argmax(view), ops.argmax(view.contiguous()))
    drawn = ops.sample(view.clone(), ones, no_limit, ones, ones * 0, ones / 3)
    assert torch.equal(ops.sample(view, ones, no_limit, ones, ones * 0, ones / 3), drawn)


def test_argmax_of_infinities(ops: OpSet) -> None:
    lowest = torch.full((1, 40), float("-inf"))
    assert 0 <= ops.argmax(lowest).item() < 40
    lowest[0, 33] = -5.0
    assert ops.argmax(lowest).item() == 33
    assert 0 <= ops.argmax(torch.full((1, 40), float("nan"))).item() < 40


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_a_row_that_is_not_finite_gives_some_token_and_disturbs_no_other(ops: OpSet, bad: str) -> None:
    rows = ROWS[3:7]
    logits = torch.randn(4, 6000)
    columns = [[*column] for column in zip(*rows)]
    clean = draw(ops, logits, *columns, [0.3] * 4)
    for places in (slice(None), slice(17, 18)):
        dirty = logits.clone()
        dirty[2, places] = float(bad)
        tokens = draw(ops, dirty, *columns, [0.3] * 4)
        assert 0 <= tokens[2] < 6000
        assert tokens[:2] + tokens[3:] == clean[:2] + clean[3:]


def test_rows_are_independent(ops: OpSet) -> None:
    logits = torch.randn(6, 5000) * 2
    columns = [[1.0, 0.0, 0.7, 1.3, 1.0, 2.0], [0, 0, 50, 0, 7, 0], [0.9, 1.0, 0.95, 1.0, 1.0, 0.5],
               [0.0, 0.0, 0.0, 0.1, 0.0, 0.0], [0.1, 0.5, 0.9, 0.3, 0.99, 0.7]]  # fmt: skip
    together = draw(ops, logits, *columns)
    alone = [draw(ops, logits[s : s + 1], *([c[s]] for c in columns))[0] for s in range(6)]
    reverse = draw(ops, logits.flip(0), *(c[::-1] for c in columns))[::-1]
    assert together == alone == reverse == draw(ops, logits, *columns)


def test_masked_tokens_are_never_drawn(ops: OpSet) -> None:
    logits = torch.full((3, 1000), float("-inf"))
    logits[:, 700:705] = 0.0
    tokens = draw(ops, logits, [1.0] * 3, [0, 500, 0], [1.0, 1.0, 0.9], [0.0] * 3, [0.0, 0.5, 0.99999994])
    assert tokens[:2] == [700, 702]
    assert 700 <= tokens[2] < 705


def test_frequencies(ops: OpSet) -> None:
    """Evenly spaced uniforms draw each token in proportion to its probability."""
    num_draws, logits = sizes([2000], [60])[0], torch.randn(12)
    uniform = (torch.arange(num_draws) + 0.5) / num_draws
    ones = torch.ones(num_draws)
    unlimited = torch.zeros(num_draws, dtype=torch.int64)
    tokens = ops.sample(logits.repeat(num_draws, 1), ones, unlimited, ones, ones * 0, uniform)
    frequency = tokens.bincount(minlength=12) / num_draws
    torch.testing.assert_close(frequency, logits.softmax(0), rtol=0, atol=1.1 / num_draws)
