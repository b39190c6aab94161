"""Find a Chromium for `tests/web`, and install one if there is none. Prints what it did; the exit code is always 0,
because the tests of the web console skip themselves without a browser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
APT = (("apt-get", "update", "-q"), ("apt-get", "install", "-q", "-y", "--no-install-recommends", "chromium"))
TIMEOUT_S = 120


def find_chromium() -> str | None:
    """A Chromium of the machine, else one that playwright has downloaded."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


def install() -> None:
    if shutil.which("apt-get") and os.geteuid() == 0:
        for command in APT:
            _run(*command)
    if find_chromium() is None:
        _run(sys.executable, "-m", "playwright", "install", "chromium")


def _run(*command: str) -> None:
    print("+", *command, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
                              env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    except subprocess.TimeoutExpired:
        print(f"  took more than {TIMEOUT_S} s")
        return
    if done.returncode:
        print("  failed:", *(done.stderr or done.stdout).strip().splitlines()[-1:])


def main() -> int:
    if find_chromium() is None:
        install()
    found = find_chromium()
    print(f"browser for the tests: {found}" if found else
          "no Chromium could be installed: the tests of the web console will be skipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
