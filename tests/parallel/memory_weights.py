"""`MemoryWeights`: random tensors made when they are first asked for, and a note of which shapes were handed out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from xllm.layers.layer_context import Part
from xllm.parallel.shard import Shard


class MemoryWeights:
    """A `Weights` whose tensors depend on name and shape alone. taken: the shapes of what ranks got, by name."""

    is_bare = False

    def __init__(self) -> None:
        self.whole: dict[str, Tensor] = {}
        self.taken: dict[str, tuple[int, ...]] = {}

    def take(self, name: str, shape: tuple[int, ...], shard: Shard | None = None, *,
             dtype: torch.dtype | None = None) -> Tensor:
        assert name not in self.taken, f"{name} was taken before"
        generator = torch.Generator().manual_seed(sum(name.encode()) * 1000 + sum(shape))
        self.whole[name] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        part = self.whole[name] if shard is None else self.whole[name][shard.of(shape)]
        self.taken[name] = tuple(part.shape)
        return part.to(dtype or part.dtype, copy=True, memory_format=torch.contiguous_format)

    def take_matrix(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> Tensor:
        return self.take(name, shape, shard)

    def take_experts(self, name: str, shape: tuple[int, int, int], parts: Sequence[Part]) -> Iterator[Tensor]:
        raise AssertionError("experts stand apart here")

    def has(self, name: str) -> bool:
        return False

    def skip(self, prefix: str) -> int:
        return 0
