"""Which part a rank holds: every row once, every query head beside its kv head."""

from __future__ import annotations

import itertools

import pytest
import torch

from xllm.errors import ConfigError
from xllm.parallel.shard import Shard, share_heads, share_of_kv_heads


@pytest.mark.parametrize(("size", "count"), list(itertools.product([1, 2, 5, 7, 16, 211], [1, 2, 3, 4, 6])))
def test_shards_are_the_whole_in_order(size: int, count: int) -> None:
    rows = list(range(size))
    shards = [Shard(0, index, count) for index in range(count)]
    parts = [rows[slice(*shard.bounds(size))] for shard in shards]
    assert list(itertools.chain(*parts)) == rows
    assert all(len(part) <= shard.width(size) for part, shard in zip(parts, shards))
    assert len(parts[0]) == shards[0].width(size)


def test_a_shard_of_an_axis() -> None:
    x = torch.arange(24).view(2, 6, 2)
    assert torch.equal(x[Shard(1, 2, 3).of((2, 6, 2))], x[:, 4:6])
    assert Shard(0, 1, 2).even_width(6, "x") == 3
    with pytest.raises(ConfigError, match=r"tensor_parallel_size 4 does not divide the rows of x \(6\)"):
        Shard(0, 1, 4).even_width(6, "the rows of x")


HEADS = [(n * k, k, size) for n, k, size in itertools.product([1, 2, 4, 7], [1, 2, 4, 8], [1, 2, 4, 8])
         if n * k % size == 0]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), HEADS)
def test_each_query_head_finds_its_kv_head(num_heads: int, num_kv_heads: int, size: int) -> None:
    """On one device query head n reads kv head n // (N / K); on a rank, local numbers by the same rule."""
    seen, copies = [], []
    for rank in range(size):
        heads = share_heads(num_heads, num_kv_heads, rank=rank, size=size)
        queries = range(*heads.query.bounds(num_heads))
        kvs = range(*heads.kv.bounds(num_kv_heads))
        assert (len(queries), len(kvs)) == (heads.num_heads, heads.num_kv_heads)
        group = heads.num_heads // heads.num_kv_heads
        assert [kvs[i // group] for i in range(len(queries))] == [n // (num_heads // num_kv_heads) for n in queries]
        seen += queries
        copies += kvs
    assert seen == list(range(num_heads))
    assert sorted(copies) == sorted(list(range(num_kv_heads)) * max(1, size // num_kv_heads))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size", "words"), [
    (6, 2, 4, "does not divide the number of query heads"), (12, 3, 2, "does not divide the number of kv heads"),
    (12, 3, 4, "is no multiple of the number of kv heads"),
])
def test_heads_that_cannot_be_shared(num_heads: int, num_kv_heads: int, size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size {size} {words}"):
        share_heads(num_heads, num_kv_heads, rank=0, size=size)


def test_how_many_kv_heads_a_rank_holds() -> None:
    assert [share_of_kv_heads(4, size) for size in (1, 2, 4, 8)] == [4, 2, 1, 1]
