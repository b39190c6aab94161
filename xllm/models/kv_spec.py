"""`KVSpec`: what a KV block of one layer holds. The model states it; the runner allocates, copies and stores by it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from xllm.parallel.shard import share_of_kv_heads


@dataclass(frozen=True, kw_only=True)
class KVSpec:
    """For each position of a block: `num_heads` heads in every part, of so many numbers each.

    widths: one entry a part: (H, H) for keys and values, whose widths may differ, or (R,) for one latent.
    rotated_width: of the numbers of a latent, how many at its end are the rotated part, which a device may lay out as a
    part of its own (`Backend.latent_cache_shapes`); 0: it is no such latent.
    sliding_window: how many positions the layer reads back at most; None: all.
    """

    num_heads: int
    widths: tuple[int, ...]
    rotated_width: int = 0
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        assert self.num_heads >= 1 and len(self.widths) in (1, 2) and all(width >= 1 for width in self.widths)
        assert not self.rotated_width or (len(self.widths) == 1 and 0 < self.rotated_width < self.widths[0])

    def on_one_of(self, num_ranks: int) -> KVSpec:
        """What each of so many tensor-parallel ranks holds. Raises ConfigError if the heads cannot be shared."""
        return replace(self, num_heads=share_of_kv_heads(self.num_heads, num_ranks))
