"""Which part of a model's tensors and heads a tensor-parallel rank holds. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from xllm.errors import ConfigError


@dataclass(frozen=True)
class Shard:
    """The run number `index` of `count` equal ones along an axis of a tensor.

    Where `count` does not divide the axis, runs are rounded up: the last ones are shorter, or empty.
    """

    axis: int
    index: int
    count: int

    def __post_init__(self) -> None:
        assert self.axis >= 0 and 0 <= self.index < self.count

    def width(self, size: int) -> int:
        """The length of a run, but for the last ones, of an axis of that size."""
        return -(-size // self.count)

    def even_width(self, size: int, what: str) -> int:
        """The length of every run. Raises ConfigError, with `what` the axis is, if they are not all equal."""
        if size % self.count:
            raise ConfigError(f"tensor_parallel_size {self.count} does not divide {what} ({size})")
        return size // self.count

    def bounds(self, size: int) -> tuple[int, int]:
        """The first index and the one behind the last, of an axis of that size."""
        width = self.width(size)
        return min(self.index * width, size), min((self.index + 1) * width, size)

    def of(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The index that takes this part of a tensor of that shape."""
        return tuple(slice(*self.bounds(size)) if axis == self.axis else slice(None) for axis, size in enumerate(shape))


@dataclass(frozen=True, kw_only=True)
class HeadShare:
    """The heads of one rank. query, kv: the rows of the projections to all query heads, and to all kv heads."""

    num_heads: int
    num_kv_heads: int
    query: Shard
    kv: Shard


def share_heads(num_heads: int, num_kv_heads: int, *, rank: int, size: int) -> HeadShare:
    """Query heads are split evenly, kv heads as `share_of_kv_heads` says, so that each query head finds its kv head on
    its own rank. Raises ConfigError if they cannot be."""
    query = Shard(0, rank, size)
    kept = query.even_width(num_heads, "the number of query heads")
    held = share_of_kv_heads(num_kv_heads, size)
    count = num_kv_heads // held  # different shares; each is held by size / count ranks in a row
    return HeadShare(num_heads=kept, num_kv_heads=held, query=query, kv=Shard(0, rank * count // size, count))


def share_of_kv_heads(num_kv_heads: int, size: int) -> int:
    """How many kv heads each of `size` ranks holds: an even split, or one that several ranks hold alike where there are
    fewer heads than ranks. Raises ConfigError if neither works out."""
    if num_kv_heads >= size:
        return Shard(0, 0, size).even_width(num_kv_heads, "the number of kv heads")
    if size % num_kv_heads:
        raise ConfigError(f"tensor_parallel_size {size} is no multiple of the number of kv heads ({num_kv_heads})")
    return 1
