"""The text that the model learns from: the sources and help topics that every Python installation carries."""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Folders that hold no ordinary code: tests, installed packages, generated character tables, bundled wheels.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__",
                   "lib-dynload"}
HELD_OUT_MODULUS = 32  # one file in 32, about 3 %


@dataclass(frozen=True)
class SourceFile:
    """One file of the standard library."""

    path: str  # relative to the library's folder, with forward slashes
    text: str

    @property
    def module(self) -> str:
        """The dotted module name."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_held_out(relative_path: str) -> bool:
    """Choose held-out files by a hash of the path, so that the choice is the same everywhere."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_MODULUS == 0


def stdlib_files() -> list[SourceFile]:
    """Read the standard library's Python sources in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            files.append(SourceFile(relative.as_posix(), text))
    return files


def split_files(files: list[SourceFile]) -> tuple[list[SourceFile], list[SourceFile]]:
    """Return the training files and the held-out files."""
    train = [file for file in files if not is_held_out(file.path)]
    held_out = [file for file in files if is_held_out(file.path)]
    return train, held_out


def topic_texts() -> dict[str, str]:
    """Return the language reference's topics, as `help()` shows them."""
    return dict(importlib.import_module("pydoc_data.topics").topics)
