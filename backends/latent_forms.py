"""Which form of multi-head latent attention (DeepSeek-V2, 2024) is less work for a sequence: keys and values made of
its latents, or the absorbed one, which computes on latents alone."""

from __future__ import annotations


def expanding_is_less(num_queries: int, seq_len: int, key_dim: int, value_dim: int, width: int) -> bool:
    """Whether making keys and values of all latents takes fewer multiplications, by head, than bringing the queries and
    their results to the latents' width and back, where each pair of a query and a position costs more."""
    pairs = num_queries * seq_len - num_queries * (num_queries - 1) // 2
    made = width * (key_dim + value_dim)
    return (seq_len - num_queries) * made < pairs * (2 * width - key_dim - value_dim)
