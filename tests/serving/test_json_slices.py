"""Answers that are written in slices say the same, and no piece of them is large."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from serving.api.json_slices import PART_BYTES, Items, Slices, json_pieces, parts, sliced

NUMBERS = list(range(20_000))


def written() -> tuple[dict[str, Any], dict[str, Any]]:
    """One with slices, and the same without."""
    def choice(index: int, sliced_: bool) -> dict[str, Any]:
        ids = Slices(sliced(NUMBERS)) if sliced_ else NUMBERS
        return {"index": index, "text": "\u2028 ü", "none": None, "logprobs": {"content": ids, "of": {}}}

    return ({"id": "x", "choices": Items(choice(i, True) for i in range(3)), "empty": Slices([]), "no": Items([])},
            {"id": "x", "choices": [choice(i, False) for i in range(3)], "empty": [], "no": []})


def test_the_same_is_said() -> None:
    given, expected = written()
    assert json.loads(b"".join(json_pieces(given))) == expected


@pytest.mark.parametrize("value", [{}, [], {"a": []}, [1, {"b": "c"}], None, "x"])
def test_plain_values(value: object) -> None:
    assert json.loads(b"".join(json_pieces(value))) == value


def test_other_tasks_run_between_parts() -> None:
    async def count() -> tuple[int, list[bytes]]:
        turns, found, going = 0, list[bytes](), True

        async def other() -> None:
            nonlocal turns
            while going:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        async for part in parts(written()[0]):
            found.append(part)
        going = False
        await task
        return turns, found

    turns, found = asyncio.run(count())
    assert turns >= len(found) - 1 > 5
    assert max(map(len, found)) < PART_BYTES + 4096


def test_an_empty_slice_leaves_no_comma() -> None:
    assert b"".join(json_pieces(Slices([[], [1], [], [2]]))) == b"[1,2]"
