"""The examples of docs/python.md run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_examples_run():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    sync, asynchronous = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", sync + asynchronous], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    texts, *_, width = done.stdout.splitlines()
    assert texts.startswith("[") and re.fullmatch(r"[1-9]\d* numbers", width)
