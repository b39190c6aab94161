"""`DummyWeights`: random tensors instead of a checkpoint's, made on the device; for measurements."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from xllm.layers.layer_context import Part
from xllm.parallel.shard import Shard


class DummyWeights:
    """A `Weights` that has every tensor. The same name, shape, dtype and device give the same numbers each time, and
    shards of them are parts of the same tensor."""

    is_bare = False

    def __init__(self, *, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device

    def take(self, name: str, shape: tuple[int, ...], shard: Shard | None = None, *,
             dtype: torch.dtype | None = None) -> Tensor:
        whole = dummy_weight(name, shape, dtype=dtype or self._dtype, device=self._device)
        return whole if shard is None or shard.count == 1 else whole[shard.of(shape)].clone(
            memory_format=torch.contiguous_format)

    def take_matrix(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> Tensor:
        return self.take(name, shape, shard)

    def take_experts(self, name: str, shape: tuple[int, int, int], parts: Sequence[Part]) -> Iterator[Tensor]:
        for expert in range(shape[0]):
            whole_YX = dummy_weight(f"{name}.{expert}", shape[1:], dtype=self._dtype, device=self._device)
            yield torch.cat([whole_YX[part] for part in parts])

    def has(self, name: str) -> bool:
        """Nothing is here that a checkpoint may leave out."""
        return False

    def skip(self, prefix: str) -> int:
        return 0


def dummy_weight(name: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Scaled so that activations keep their size from layer to layer: norms near one, biases small, matrices by the
    square root of their inputs."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
    generator = torch.Generator(device).manual_seed(seed)
    mean, deviation = (1.0, 0.1) if len(shape) == 1 and "norm" in name else (0.0, shape[-1] ** -0.5)
    return torch.empty(shape, dtype=dtype, device=device).normal_(mean, deviation, generator=generator)
