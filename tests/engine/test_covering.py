"""The generator of covering arrays, against every row that there could be."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import test_feature_matrix as matrix
from tests.engine.covering import Columns, Exclusions, Row, covering_rows

ROOT = Path(__file__).parent.parent.parent


def every_row(columns: Columns, exclusions: Exclusions) -> list[Row]:
    rows = [dict(zip(columns, values)) for values in itertools.product(*columns.values())]
    return [row for row in rows if not any(all(row[n] == v for n, v in e.items()) for e in exclusions)]


def met(rows: list[Row], strength: int) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(some) for row in rows for some in itertools.combinations(row.items(), strength)}


def random_case(rng: random.Random) -> tuple[Columns, Exclusions]:
    columns = {name: "abcd"[:rng.randint(1, 4)] for name in "PQRSTU"[:rng.randint(3, 6)]}
    exclusions = [{name: rng.choice(columns[name]) for name in rng.sample(list(columns), rng.randint(1, 3))}
                  for _ in range(rng.randint(0, 4))]
    return columns, exclusions


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_all_that_can_meet_does_and_nothing_else(strength: int) -> None:
    saved = 0
    for seed in range(60):
        columns, exclusions = random_case(random.Random(seed))
        possible, rows = every_row(columns, exclusions), covering_rows(columns, exclusions, strength=strength)
        assert all(row in possible for row in rows)
        assert met(rows, strength) == met(possible, strength)
        saved += len(possible) - len(rows)
    assert saved > 60 * 20  # or it would be no array


def test_few_rows() -> None:
    """Of 2^20 rows. The least number for pairs is 8 (Kleitman and Spencer 1973)."""
    assert len(covering_rows({f"c{i}": ("off", "on") for i in range(20)})) <= 12


def test_the_same_rows_in_every_process() -> None:
    code = "from tests.engine.covering import covering_rows; print(covering_rows(" \
           "{name: ('off', 'on', 'auto') for name in 'PQRSTUVW'}, [{'P': 'on', 'Q': 'on'}, {'R': 'off', 'S': 'auto'}]))"
    printed = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed},
                              capture_output=True, text=True, check=True).stdout for seed in ("1", "2")]
    assert printed[0] == printed[1] and "'P'" in printed[0]


def test_a_new_column_needs_few_more_rows() -> None:
    columns = matrix.COLUMNS
    more = {**columns, "another": ("off", "on")}
    before, after = (len(covering_rows(c, matrix.EXCLUSIONS, strength=matrix.STRENGTH)) for c in (columns, more))
    assert after <= before + 8


# --- the matrix


def as_row(made: matrix.Case) -> Row:
    return {**{name: "on" if name in made.features else "off" for name in matrix.FEATURES},
            "way": made.way, "layout": made.layout, "model": made.model}


def test_every_pair_of_the_matrix_is_in_a_row() -> None:
    """Counted without the generator: a pair may be missing only if every row that has it is excluded."""
    rows = [as_row(case) for case in matrix.COVERING]
    excluded = [frozenset(pair.items()) for pair in matrix.EXCLUSIONS if len(pair) == 2]
    assert all(matrix.is_possible(case) for case in matrix.COVERING)
    found = met(rows, 2)
    for (name, values), (other, other_values) in itertools.combinations(matrix.COLUMNS.items(), 2):
        for value, other_value in itertools.product(values, other_values):
            pair = frozenset({(name, value), (other, other_value)})
            assert (pair in found) == (pair not in excluded), pair


def test_every_pair_of_features_is_on_in_every_layout() -> None:
    """What the matrix was before it was an array; on the capped layout there must be several sequences."""
    for layout, (one, other) in itertools.product(matrix.LAYOUTS, itertools.combinations(matrix.FEATURES, 2)):
        if {one, other} != matrix.WEIGHTS:
            assert any({one, other} <= case.features and case.layout == layout for case in matrix.COVERING)
