"""Amounts of memory as people write and read them: `4GiB`, `512MB`, `25%`, `1000000`."""

from __future__ import annotations

import re

from xllm.errors import ConfigError

_UNITS = {"": 1, "B": 1, "K": 2**10, "KB": 10**3, "KIB": 2**10, "M": 2**20, "MB": 10**6, "MIB": 2**20,
          "G": 2**30, "GB": 10**9, "GIB": 2**30, "T": 2**40, "TB": 10**12, "TIB": 2**40}
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*|%)\s*")


def parse_amount(name: str, text: str) -> tuple[int, float]:
    """(bytes, share): one of the two is 0. Raises ConfigError, naming the setting."""
    match = _AMOUNT.fullmatch(str(text))
    unit = match.group(2).upper() if match else None
    if match is None or (unit != "%" and unit not in _UNITS):
        raise ConfigError(f"{name} must be an amount such as 4GiB, 512MB or 25%, got {text!r}")
    value = float(match.group(1))
    if unit == "%":
        if value > 100.0:
            raise ConfigError(f"{name} is a share of more than everything: {text!r}")
        return 0, value / 100.0
    return int(value * _UNITS[unit or ""]), 0.0


def resolve_amount(name: str, text: str, available_bytes: int) -> int:
    """Bytes; a share is one of `available_bytes`. Raises like `parse_amount`."""
    num_bytes, share = parse_amount(name, text)
    return num_bytes or int(share * available_bytes)


def is_zero(name: str, text: str) -> bool:
    """Whether the amount is nothing at all. Raises like `parse_amount`."""
    return parse_amount(name, text) == (0, 0.0)


def size_text(num_bytes: int) -> str:
    """For people: `1.5 GiB`, `620 MiB`."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
