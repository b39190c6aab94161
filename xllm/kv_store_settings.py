"""Checks of the settings of the shared KV store."""

from __future__ import annotations

from pathlib import Path

from xllm.errors import ConfigError
from xllm.sizes import parse_amount


def check_kv_store(store: str | None, size: str, disk_cache_dir: str | None, *, has_host_tier: bool,
                   is_dummy: bool) -> None:
    """Raise ConfigError, naming what is wrong. is_dummy: the weights are random."""
    parse_amount("kv_store_size", size)
    if store is None:
        return
    scheme, colon, _ = store.partition("://")
    if colon:
        raise ConfigError(f"kv_store {store}: a store behind {scheme}:// is not built into xLLM; name a folder on a "
                          "file system that the servers share")
    if is_dummy:
        raise ConfigError("kv_store and load_format dummy do not go together: the store outlives the weights")
    if not has_host_tier:
        raise ConfigError("kv_store needs host_cache_size: blocks go to the store through host memory")
    if disk_cache_dir is not None and Path(disk_cache_dir).absolute() == Path(store).absolute():
        raise ConfigError("kv_store and disk_cache_dir are the same folder: the disk tier's belongs to one process")
