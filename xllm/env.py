"""The only reader of environment variables. They are for debugging; settings are flags."""

from __future__ import annotations

import os
from pathlib import Path


def log_level() -> str:
    """XLLM_LOG: level of the engine's own log lines (default INFO)."""
    return os.environ.get("XLLM_LOG", "INFO").upper()


def cache_dir() -> Path:
    """XLLM_CACHE: where compiled kernels are kept (default ~/.cache/xllm)."""
    configured = os.environ.get("XLLM_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(configured) if configured else base / "xllm"


def compiled_kernels_allowed() -> bool:
    """XLLM_NO_COMPILED_KERNELS=1: run the CPU backend on plain torch."""
    return os.environ.get("XLLM_NO_COMPILED_KERNELS", "") not in ("1", "true")


def check_integrity() -> bool:
    """XLLM_CHECK=1: audit the KV pool and the scheduler after every step (slow)."""
    return os.environ.get("XLLM_CHECK", "") in ("1", "true")


def check_contracts() -> bool:
    """XLLM_NPU_CHECK=1: check the arguments of every operator of an NPU against its documentation (slow)."""
    return os.environ.get("XLLM_NPU_CHECK", "") in ("1", "true")


def failpoints() -> str:
    """XLLM_FAILPOINTS: where this process shall die or fail, for tests (`xllm/kv/failpoints.py`)."""
    return os.environ.get("XLLM_FAILPOINTS", "")


def api_keys() -> tuple[str, ...]:
    """XLLM_API_KEY: keys for `xllm serve`, separated by commas; unlike a flag it does not show in a process list."""
    return _keys("XLLM_API_KEY")


def admin_api_keys() -> tuple[str, ...]:
    """XLLM_ADMIN_API_KEY: the same for --admin-api-key."""
    return _keys("XLLM_ADMIN_API_KEY")


def _keys(name: str) -> tuple[str, ...]:
    """Set but empty is not the same as not set: the former gives an empty key, which the server refuses."""
    value = os.environ.get(name)
    return () if value is None else tuple(value.split(","))
