"""`ParallelContext`: which share of a model's tensors this process holds."""

from __future__ import annotations

from dataclasses import dataclass

from xllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelContext:
    """Place of this process among the `tp_size` that share each layer's heads and ffn columns.

    Raises:
        ConfigError: a size that is not built, or a rank outside it.
    """

    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        if self.tp_size != 1:
            raise ConfigError(f"tensor_parallel_size: only 1 is built, got {self.tp_size}")
        if self.tp_rank != 0:
            raise ConfigError(f"tp_rank {self.tp_rank} is outside [0, {self.tp_size})")
