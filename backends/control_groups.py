"""Reads what Linux control groups (versions 1 and 2) allow this process: a container's limits, which the machine's own
figures do not show.

root: where `proc` and `sys` are found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def usable_cpus(root: Path = ROOT) -> int:
    """Processors that this process may keep busy: those it may run on, or fewer where a quota is smaller. At least 1.

    Of a quota that is no whole number the rest is left: threads that wait for each other at every operator would all
    wait for the one that the kernel holds back.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _folders(root, "cpu") for quota in _cpu_quota(folder)]
    return max(1, int(min([allowed, *quotas])))


def memory_headrooms(root: Path = ROOT) -> Iterator[int]:
    """Limit minus use in bytes, of this process's group and of each of its parents that has a limit."""
    for folder in _folders(root, "memory"):
        yield from _headroom(folder, "memory.max", "memory.current")
        yield from _headroom(folder, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Of the groups that a controller has this process in, and their parents."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers:
            if controller not in controllers.split(","):
                continue
            mount /= controller
        folder = mount / path.lstrip("/")
        while folder.is_relative_to(mount):  # inside a container the path may not exist; its parents do
            yield folder
            folder = folder.parent


def _cpu_quota(folder: Path) -> Iterator[float]:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except FileNotFoundError:
        try:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except FileNotFoundError:
            return
    if quota not in ("max", "-1"):
        yield int(quota) / int(period)


def _headroom(folder: Path, limit: str, used: str) -> Iterator[int]:
    try:
        limit_text = (folder / limit).read_text().strip()
        used_bytes = int((folder / used).read_text())
        statistics = (folder / "memory.stat").read_text().split()
    except FileNotFoundError:
        return
    if limit_text != "max":
        counts = dict(zip(statistics[::2], statistics[1::2]))
        reclaimable = int(counts.get("inactive_file", 0))
        yield int(limit_text) - used_bytes + reclaimable
