"""What this machine's processor is called. No torch."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """As Linux names it, with the numbers that tell generations apart; elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    # What a virtual machine calls its processor may be no more than the maker's name.
    numbers = " ".join(f"{name} {found[name]}" for name in ("cpu family", "model", "stepping") if name in found)
    return f"{found.get('model name', 'unknown')} ({numbers})" if numbers else found.get("model name", "unknown")
