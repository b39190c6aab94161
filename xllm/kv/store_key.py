"""The seal of an engine's blocks in a shared store: made alike by its ranks, which write them, and by its engine."""

from __future__ import annotations

from pathlib import Path

from xllm.config import CacheSettings
from xllm.kv.disk_seal import Seal, read_key


def store_seal(cache: CacheSettings, rank: int, num_ranks: int) -> Seal:
    """With the key of `disk_cache_key_file`, if there is one. Raises ConfigError if that cannot be read."""
    if cache.disk_cache_key_file is None:
        return Seal()
    return Seal(read_key(Path(cache.disk_cache_key_file)), b"store, rank %d of %d" % (rank, num_ranks))
