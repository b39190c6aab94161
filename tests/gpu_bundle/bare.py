"""A Python that has the bundle's packages, what these need, and nothing else that is installed here."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy")
# Required by a command-line library that transformers requires; older versions of that do not have them.
LACKING = {"pydantic", "pydantic_core"}


def needed(roots: tuple[str, ...]) -> set[str]:
    """The installed distributions among the roots and all that these require, extras left out."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        if package.metadata["Name"] not in found:
            found.add(package.metadata["Name"])
            wanted = (Requirement(line) for line in package.requires or ())
            waiting += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def make_python(folder: Path) -> Path:
    """A virtual environment whose packages are links to those that are installed here; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    site = next((folder / "lib").glob("python*/site-packages"))
    for name in needed(PACKAGES) - LACKING:
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(package.locate_file(top))))
    return folder / "bin" / "python"
