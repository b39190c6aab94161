"""`max_gap` in the draw of every op set that this process can run."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from backends import get_backend
from backends.reference import REFERENCE
from xllm import env

ROWS, V = 6, 700


def op_sets():
    if os.environ.get("TRITON_INTERPRET") == "1":
        from backends.cuda import OPS

        return {"cuda": OPS.sample}
    from npu_ops.sampling import sample

    return {"reference": REFERENCE.sample, "npu": sample,
            "cpu": get_backend("cpu", cache_dir=env.cache_dir()).ops.sample}


SAMPLES = op_sets()


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (40, 1.0), (0, 0.95)])
def test_what_lies_below_the_gap_is_not_drawn(name: str, top_k: int, top_p: float) -> None:
    torch.manual_seed(3)
    logits, gaps = torch.randn(ROWS, V) * 2, torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0, 1e-6])
    temperature = torch.tensor([1.0, 0.7, 1.3, 1.0, 5.0, 1.0])
    for uniform in torch.linspace(0, 0.999, 7):
        drawn = SAMPLES[name](logits.clone(), temperature, torch.full((ROWS,), top_k, dtype=torch.int32),
                              torch.full((ROWS,), top_p), torch.zeros(ROWS), gaps, uniform.repeat(ROWS))
        for row in range(ROWS):
            assert int(drawn[row]) in allowed(logits[row], float(temperature[row]), float(gaps[row]), top_k, top_p,
                                              float(uniform))


def allowed(logits_V: Tensor, temperature: float, gap: float, top_k: int, top_p: float, uniform: float) -> set[int]:
    """Tokens that may be drawn there, with sums that are off by a little."""
    scaled = logits_V.double() / temperature
    if top_k:
        scaled[scaled < scaled.sort(descending=True).values[top_k - 1]] = -math.inf
    weights = torch.softmax(scaled, 0)
    order = weights.argsort(descending=True)
    before = weights[order].cumsum(0) - weights[order]
    found = set()
    for shift in (-1e-5, 0.0, 1e-5):
        kept = weights.clone()
        if top_p < 1:
            kept[order[before >= top_p + shift]] = 0
        if gap > 0:
            kept[logits_V < logits_V.max() - gap - abs(shift)] = 0
        cdf = kept.cumsum(0)
        for u in (uniform - 1e-5, uniform, uniform + 1e-5):
            found.add(int((cdf <= max(u, 0.0) * cdf[-1]).sum()))
    return found
