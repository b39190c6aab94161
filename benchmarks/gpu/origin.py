"""What was measured: the commit, and a digest of the source for where there is no git."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

PACKAGES = ("backends", "benchmarks/gpu", "cuda_ops", "graph", "xllm")
SUFFIXES = (".py", ".c", ".h")


def commit(root: Path) -> str:
    """The commit, with "+" if the tree has other changes; "unknown" where git does not say."""
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def source_digest(root: Path) -> str:
    """Of every source file that a measurement runs through; equal digests mean equal code."""
    state = hashlib.blake2b(digest_size=8)
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in SUFFIXES or path.name == "configs.json":
                state.update(str(path.relative_to(root)).encode())
                state.update(path.read_bytes())
    return state.hexdigest()
