"""What is computed before the first request."""

from __future__ import annotations

import pytest

from xllm.runner.warm_up import WarmUpChunk, warm_up_chunks


@pytest.mark.parametrize(("longest", "max_len", "varies", "expected"), [
    (2048, 8192, False, [WarmUpChunk(512)]),
    (2048, 8192, True, [WarmUpChunk(512), WarmUpChunk(64), WarmUpChunk(2048, 2048)]),
    (2048, 3000, True, [WarmUpChunk(512), WarmUpChunk(64), WarmUpChunk(2048, 952)]),
    (8192, 4096, True, [WarmUpChunk(512), WarmUpChunk(64), WarmUpChunk(4096)]),
    (300, 4096, True, [WarmUpChunk(300), WarmUpChunk(64), WarmUpChunk(300, 300)]),
    (40, 40, True, [WarmUpChunk(40)]),
    (40, 40, False, [WarmUpChunk(40)]),
])
def test_chunks(longest: int, max_len: int, varies: bool, expected: list[WarmUpChunk]) -> None:
    assert warm_up_chunks(longest=longest, max_len=max_len, varies=varies) == expected
