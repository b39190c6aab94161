"""Acceptance against a loop, and the law behind it: what comes out follows the target distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.speculative.verify import num_accepted


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=5, max_size=5), st.lists(st.integers(0, 2), max_size=4)),
                min_size=1, max_size=5), st.integers(0, 4))
def test_equals_a_loop(rows: list[tuple[list[int], list[int]]], width: int) -> None:
    drafts_SR = np.array([(drafts + [-1] * 4)[:width] for _, drafts in rows], dtype=np.int32).reshape(len(rows), width)
    drawn_SR1 = np.array([(drawn[: min(len(drafts), width) + 1] + [-1] * 5)[: width + 1] for drawn, drafts in rows])
    expected = []
    for drawn, drafts in zip(drawn_SR1.tolist(), drafts_SR.tolist()):
        count = 0
        while count < width and drafts[count] >= 0 and drafts[count] == drawn[count]:
            count += 1
        expected.append(count)
    drafts_SR = np.vstack([drafts_SR, np.full((1, width), -1, dtype=np.int32)])  # a row that draws nothing
    drawn_SR1 = np.vstack([drawn_SR1, np.full((1, width + 1), -1)])
    expected.append(0)
    found = num_accepted(drawn_SR1, drafts_SR)
    assert found.dtype == np.int32
    assert found.tolist() == expected


@pytest.mark.parametrize("drafts", [(0, 1), (2, 2), (4, 0)], ids=str)
def test_output_follows_the_target(drafts: tuple[int, int]) -> None:
    """A two-step Markov chain over 5 tokens: pairs (first, second) as they come out of drawing, accepting,
    and redrawing what was not accepted, compared with the chain's own law (chi-squared, 24 degrees)."""
    generator = np.random.default_rng(7)
    first_V, second_VV = generator.dirichlet(np.ones(5)), generator.dirichlet(np.ones(5), size=5)
    num_rows = 40_000
    draw = np.random.default_rng(8).random((3, num_rows))
    drawn_SR1 = np.stack([
        np.searchsorted(first_V.cumsum(), draw[0]),
        np.searchsorted(second_VV[drafts[0]].cumsum(), draw[1]),
        np.searchsorted(second_VV[drafts[1]].cumsum(), draw[2]),
    ], axis=1)
    accepted = num_accepted(drawn_SR1, np.tile(np.array(drafts, dtype=np.int32), (num_rows, 1)))
    assert abs((accepted > 0).mean() - first_V[drafts[0]]) < 0.02
    first = drawn_SR1[:, 0]
    later = np.random.default_rng(9).random(num_rows)
    redrawn = np.array([np.searchsorted(second_VV[t].cumsum(), u) for t, u in zip(first.tolist(), later.tolist())])
    second = np.where(accepted > 0, drawn_SR1[:, 1], redrawn)
    counts = np.bincount(first * 5 + second, minlength=25)
    expected = num_rows * (first_V[:, None] * second_VV).ravel()
    assert expected.min() > 5.0
    assert float(((counts - expected) ** 2 / expected).sum()) < 56.0  # p = 2e-4
