"""Covering arrays: few rows in which all values of any two (or three) columns meet.

Made as AETG makes them (Cohen et al. 1997): row by row, each the best of some candidates, a candidate filled column by
column with the value that covers the most that is still uncovered. The same columns give the same rows everywhere.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

Columns = Mapping[str, Sequence[str]]  # the values of each
Row = dict[str, str]  # column -> value
Exclusions = Sequence[Mapping[str, str]]  # values that may not all be in one row
Combination = tuple[tuple[str, str], ...]  # (column, value), by the columns' names

NUM_CANDIDATES = 10


def covering_rows(columns: Columns, exclusions: Exclusions = (), *, strength: int = 2, seed: int = 0) -> list[Row]:
    """Rows without an excluded combination, such that every combination of the values of `strength` columns that some
    such row can have is in one of them."""
    rng = random.Random(seed)
    # A dict, as a set would be walked in an order that differs from process to process.
    uncovered = dict.fromkeys(combination for combination in combinations(columns, strength)
                              if is_allowed(dict(combination), columns, exclusions))
    rows = []
    while uncovered:
        first = next(iter(uncovered))
        found = [_candidate(dict(first), columns, exclusions, strength, uncovered, rng) for _ in range(NUM_CANDIDATES)]
        best = max(found, key=lambda row: sum(c in uncovered for c in combinations_of(row, strength)))
        for combination in combinations_of(best, strength):
            uncovered.pop(combination, None)
        rows.append({name: best[name] for name in columns})
    return rows


def combinations(columns: Columns, strength: int) -> Iterator[Combination]:
    """Every combination of the values of so many columns."""
    for names in itertools.combinations(sorted(columns), strength):
        for values in itertools.product(*(columns[name] for name in names)):
            yield tuple(zip(names, values))


def combinations_of(row: Row, strength: int) -> Iterator[Combination]:
    """Those of a row, which may be unfinished."""
    return itertools.combinations(sorted(row.items()), strength)


def is_allowed(row: Row, columns: Columns, exclusions: Exclusions) -> bool:
    """Whether an unfinished row can become one without an excluded combination."""
    if any(excluded.items() <= row.items() for excluded in exclusions):
        return False
    # Any value will do in a column that no exclusion is about.
    name = next((name for excluded in exclusions for name in excluded if name not in row), None)
    return name is None or any(is_allowed({**row, name: value}, columns, exclusions) for value in columns[name])


def _candidate(row: Row, columns: Columns, exclusions: Exclusions, strength: int,
               uncovered: Mapping[Combination, None], rng: random.Random) -> Row:
    """A whole row that begins as this one."""
    open_names = [name for name in columns if name not in row]
    rng.shuffle(open_names)
    for name in open_names:
        values = [value for value in columns[name] if is_allowed({**row, name: value}, columns, exclusions)]
        rng.shuffle(values)
        others = [*combinations_of(row, strength - 1)]
        row[name] = max(values, key=lambda value, name=name, others=others: sum(
            tuple(sorted((*other, (name, value)))) in uncovered for other in others))
    return row
