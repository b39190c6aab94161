"""`compare OLD NEW`: what became slower, or stopped working, from one result file to another."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import OK, load

SLOWER = 0.03
SPREADS = 2.0
Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 if anything is flagged."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu compare", description=__doc__)
    parser.add_argument("old", type=Path, help="gpu.json or its folder")
    parser.add_argument("new", type=Path)
    args = parser.parse_args(arguments)
    old, new = load(args.old), load(args.new)
    print(f"old: {old.get('commit')} ({old.get('source')}), new: {new.get('commit')} ({new.get('source')})")
    flagged = list(flags(old, new))
    for line in flagged:
        print(f"FLAG {line}")
    for line in improvements(old, new):
        print(f"     {line}")
    print(f"{len(flagged)} flagged of {len(_by_key(old))} rows")
    return 1 if flagged else 0


def flags(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Rows that were good and are no more, and rows that are slower by more than 3 %, or than twice the spread."""
    found = _by_key(new)
    for key, before in _by_key(old).items():
        if before["status"] != OK:
            continue
        after = found.get(key)
        if after is None or after["status"] != OK:
            yield f"{key[1]}: was ok, is {'missing' if after is None else after['status']}"
        elif "us" in before and "us" in after and is_slower(before, after):
            yield _line(key[1], before, after)


def is_slower(before: Row, after: Row) -> bool:
    difference, spread = after["us"] - before["us"], _spread(before, after)
    return difference > SLOWER * before["us"] or (spread > 0 and difference > SPREADS * spread)


def improvements(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    found = _by_key(new)
    for key, before in _by_key(old).items():
        after = found.get(key, {})
        if "us" in before and "us" in after and is_slower(after, before):
            yield _line(key[1], before, after)


def _by_key(data: dict[str, Any]) -> dict[tuple[str, str], Row]:
    return {(row["section"], row["id"]): row for row in data["rows"]}


def _spread(before: Row, after: Row) -> float:
    return max(before.get("us_spread", 0.0), after.get("us_spread", 0.0))


def _line(id: str, before: Row, after: Row) -> str:
    change, spread = 100 * (after["us"] / before["us"] - 1), _spread(before, after)
    noise = ", within twice the spread" if abs(after["us"] - before["us"]) <= SPREADS * spread else ""
    return f"{id}: {before['us']:.1f} -> {after['us']:.1f} us ({change:+.1f} %, spread {spread:.1f} us{noise})"
