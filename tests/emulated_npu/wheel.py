"""Where the torch_npu wheel lies that the emulator runs, how it gets there, and why it cannot where it cannot."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".npu"  # ignored by git
SITE = HOME / "site"
REQUIREMENT = ROOT / "requirements" / "npu.txt"
PYTHONS = range(10, 15)  # minor versions that there are wheels for


def version() -> str:
    line = next(line for line in REQUIREMENT.read_text().splitlines() if line.startswith("torch-npu=="))
    return line.removeprefix("torch-npu==").strip()


def unsupported() -> str | None:
    """Why this machine can have no emulated NPU, whatever is installed; None: it can."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"it is made for Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    if sys.implementation.name != "cpython" or sys.version_info[0] != 3 or sys.version_info[1] not in PYTHONS:
        return f"there is no wheel of torch_npu {version()} for this Python, {platform.python_version()}"
    torch_version = importlib.metadata.version("torch")
    if not torch_version.startswith(version()):
        return f"torch_npu {version()} needs torch {version()}, and this is {torch_version}"
    missing = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    if missing:
        return f"there is no {' and no '.join(missing)}, which build the emulated ACL runtime"
    return None


def reason() -> str | None:
    """Why there is no emulated NPU here; None: there is."""
    why_not = unsupported()
    if why_not is None and not (HOME / ".installed").exists():
        return f"torch_npu is not in {SITE}: `make {HOME.name}/.installed` puts it there"
    return why_not


def install() -> None:
    """Put the wheel into `SITE`, without what it depends on. Raises CalledProcessError if pip cannot."""
    HOME.mkdir(exist_ok=True)
    shutil.rmtree(SITE, ignore_errors=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    ]
    subprocess.run([*pip, "--target", str(SITE), "-r", str(REQUIREMENT)], check=True)
    (HOME / ".installed").touch()
