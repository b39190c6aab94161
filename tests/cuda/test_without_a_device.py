"""What holds without a GPU, a driver or Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends import get_backend
from backends.backend import BackendError

ROOT = Path(__file__).parents[2]


def test_importing_the_package_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import cuda_ops, cuda_ops.vmm, backends"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_triton_the_backend_says_so() -> None:
    code = "import sys; sys.modules['triton'] = None; from backends import get_backend; get_backend('cuda')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode and "BackendError: the cuda backend needs triton" in done.stderr


def test_without_a_device_the_backend_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BackendError, match="the cuda backend needs"):
        get_backend("cuda")
    assert get_backend("auto", compiled=False).name == "cpu"


def test_the_table_has_an_entry_for_every_shape() -> None:
    table = json.loads((ROOT / "cuda_ops" / "configs.json").read_text())
    for op, entries in table.items():
        assert set(entries) == {"sm80", "sm90"}, op
        for buckets in entries.values():
            assert "any" in buckets, op
            assert len({frozenset(numbers) for numbers in buckets.values()}) == 1, f"{op}: not all numbers everywhere"
            for numbers in buckets.values():
                sizes = {name: n for name, n in numbers.items() if name.isupper() and name not in ("LEAST", "PER_SM")}
                assert all(n & (n - 1) == 0 for n in sizes.values()), f"{op}: {sizes} are no powers of two"
