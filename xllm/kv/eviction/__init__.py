"""Eviction policies: which contents of a tier are evicted first. `make_policy` makes one by name; `EvictionPolicy` is
the interface."""

from __future__ import annotations

from collections.abc import Callable

from xllm.errors import ConfigError
from xllm.kv.eviction.arc import ARC
from xllm.kv.eviction.duel import Duel
from xllm.kv.eviction.eviction_policy import EvictionPolicy
from xllm.kv.eviction.fifo import FIFO
from xllm.kv.eviction.lfu import LFU
from xllm.kv.eviction.lru import LRU
from xllm.kv.eviction.lru_k import LRUK
from xllm.kv.eviction.protected import Protected
from xllm.kv.eviction.s3_fifo import S3FIFO

__all__ = ["ARC", "FIFO", "LFU", "LRU", "LRUK", "S3FIFO", "Duel", "EvictionPolicy", "Protected", "make_policy"]

_SIMPLE: dict[str, Callable[[int], EvictionPolicy]] = {"lru": LRU, "fifo": FIFO, "lfu": LFU, "arc": ARC,
                                                       "s3-fifo": S3FIFO}


def make_policy(name: str, num_places: int, *, lru_k: int = 2, history: float = 10.0,
                l1_share: float = 0.0) -> EvictionPolicy:
    """A policy for one tier of `num_places`. Raises ConfigError for a name that `EVICTION_POLICIES` does not have.

    lru_k, history: of "lru-k" and "duel". l1_share: above 0, that share of the places is protected (`Protected`).
    """
    policy: EvictionPolicy
    if name == "duel":
        policy = Duel(num_places, lru_k, history)
    elif name == "lru-k":
        policy = LRUK(num_places, lru_k, history)
    elif name in _SIMPLE:
        policy = _SIMPLE[name](num_places)
    else:
        raise ConfigError(f"eviction_policy: unknown policy {name!r}")
    return Protected(num_places, policy, l1_share) if l1_share else policy
