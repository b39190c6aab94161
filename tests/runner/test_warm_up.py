"""What is computed before the first request."""

from __future__ import annotations

import pytest

from xllm.runner.warm_up import Chunk, warm_up_chunks


@pytest.mark.parametrize(("longest", "max_len", "varies", "expected"), [
    (2048, 8192, False, [Chunk(512)]),
    (2048, 8192, True, [Chunk(512), Chunk(64), Chunk(2048, 2048)]),
    (2048, 3000, True, [Chunk(512), Chunk(64), Chunk(2048, 952)]),
    (8192, 4096, True, [Chunk(512), Chunk(64), Chunk(4096)]),
    (300, 4096, True, [Chunk(300), Chunk(64), Chunk(300, 300)]),
    (40, 40, True, [Chunk(40)]),
    (40, 40, False, [Chunk(40)]),
])
def test_chunks(longest: int, max_len: int, varies: bool, expected: list[Chunk]) -> None:
    assert warm_up_chunks(longest=longest, max_len=max_len, varies=varies) == expected
