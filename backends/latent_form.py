"""Which form of multi-head latent attention (DeepSeek-V2, 2024) is less work; `opset.py:LatentAttentionOp` names
them."""

from __future__ import annotations

from dataclasses import dataclass

# What gathered latents, keys and values of some heads take at most, where a device makes those of several sequences and
# heads at a time. Chosen: in bf16 125 of DeepSeek V3's 128 heads fit for 8,192 positions, and five for 131,072, whose
# blocks of a chunk's 4,096 queries are more than a GPU has multiprocessors.
EXPANDED_BYTES = 2**29


@dataclass(frozen=True, slots=True)
class LatentWidths:
    """Of the attention of a layer on one rank. key: without its rotated part, which is the latent's. number_bytes: of
    one number that is made."""

    num_heads: int
    key: int
    rotated: int
    value: int
    latent: int
    number_bytes: int

    @property
    def head_bytes(self) -> int:
        """Of the key, with its rotated part, and the value of one head at one position."""
        return (self.key + self.rotated + self.value) * self.number_bytes


def expanded_bytes(widths: LatentWidths, *, num_positions: int) -> int:
    """Of `Backend.expanded_bytes`, where `EXPANDED_BYTES` bound it and heads share the rotated part."""
    position = widths.latent + widths.rotated + widths.num_heads * (widths.key + widths.value)
    return min(num_positions * position * widths.number_bytes, EXPANDED_BYTES)


def expanding_is_less(num_queries: int, seq_len: int, key_dim: int, value_dim: int, width: int, *,
                      least: int = 0) -> bool:
    """Whether making keys and values of all latents takes fewer multiplications, by head, than bringing the queries and
    their results to the latents' width and back, where each pair of a query and a position costs more.

    least: how many fewer it must be, by head, for what expanding costs a device besides.
    """
    pairs = num_queries * seq_len - num_queries * (num_queries - 1) // 2
    made = width * (key_dim + value_dim)
    return pairs * (2 * width - key_dim - value_dim) - (seq_len - num_queries) * made > least
