"""Products of int8 weights and int8 activations: the operators, and whole engines whose every product is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backends.reference.linear import quantise_tokens, quantize_rows
from npu_ops import linear as linear_ops
from npu_ops.format import FRACTAL_NZ, format_of
from npu_ops.quant_contracts import LARGEST_AXIS
from tests.npu.device import HALVES, assert_near, npu, randn
from tests.npu.engines import BUNDLED, assert_same, plain, start, tokens

EAGER: dict[str, Any] = {"graph_mode": "off"}
GRAPHS: dict[str, Any] = {"graph_mode": "auto"}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [96, 40, 70000])
def test_product(rows: int, bias: bool, dtype: torch.dtype) -> None:
    """40 outputs fill no tiles; 70000 are more than the operator takes at once."""
    inputs = 64 if rows < LARGEST_AXIS else 32
    x, weight = randn(9, inputs, dtype=dtype), randn(rows, inputs, dtype=dtype)
    added = randn(rows, dtype=dtype) if bias else None
    codes, scale = quantize_rows(weight, "w8a8")
    packed = npu().ops.pack_linear(weight, added, quantization="w8a8")
    assert len(packed.parts) == (2 if rows > LARGEST_AXIS else 1)
    assert [format_of(part.codes_XY) == FRACTAL_NZ for part in packed.parts] == [rows == 96] * len(packed.parts)
    assert packed.nbytes == weight.numel() + 4 * rows + (2 * rows if bias else 0)
    x_codes, x_scale = linear_ops.dynamic_quant(x=x)
    truth = (x_codes.cpu().double() * x_scale.cpu().double()[:, None]) @ (
        codes.cpu().double() * scale.cpu().double()[:, None]).t()
    if added is not None:
        truth += added.cpu().double()
    assert_near(npu().ops.linear(x, packed), truth, roundings=2)
    near = x.cpu().double() @ weight.cpu().double().t() + (0 if added is None else added.cpu().double())
    assert (truth - near).abs().max() < 0.03 * near.abs().max()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_are_rounded_as_the_contract_says(dtype: torch.dtype) -> None:
    """But that a number half way between two codes may take either."""
    x = randn(40, 96, dtype=dtype) * randn(40, 1, dtype=dtype).exp()
    x[7] = 0
    (codes, scale), (expected, expected_scale) = linear_ops.dynamic_quant(x=x), quantise_tokens(x.cpu())
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=2.0**-22, atol=0)
    assert (codes.cpu().int() - expected.int()).abs().max() <= 1
    assert (codes.cpu() != expected).double().mean() < 0.01
    assert not codes[7].any()


def test_x_may_be_a_view_of_columns() -> None:
    wide, weight = randn(5, 200, dtype=torch.float16), randn(40, 96, dtype=torch.float16)
    packed = npu().ops.pack_linear(weight, quantization="w8a8")
    x = wide[:, 8:104]
    assert torch.equal(npu().ops.linear(x, packed).cpu(), npu().ops.linear(x.contiguous(), packed).cpu())


def test_a_row_does_not_see_its_batch() -> None:
    x, weight = (randn(n, 96, dtype=torch.bfloat16) for n in (33, 48))
    packed = npu().ops.pack_linear(weight, quantization="w8a8")
    together = npu().ops.linear(x, packed)
    for begin, end in ((0, 1), (3, 9), (32, 33)):
        assert torch.equal(npu().ops.linear(x[begin:end], packed).cpu(), together[begin:end].cpu())


def test_too_many_inputs() -> None:
    with pytest.raises(ValueError, match="up to 65535 inputs, not 65536"):
        npu().ops.pack_linear(torch.zeros(1, 65536, dtype=torch.bfloat16), quantization="w8a8")


@pytest.mark.parametrize("mode", [EAGER, GRAPHS], ids=["eager", "graphs"])
@pytest.mark.parametrize("model", [BUNDLED, "qwen3"])
def test_engine(model: str, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of activations in float16 may differ by one from those in the CPU's."""
    product, products = linear_ops.linear_w8a8, []
    monkeypatch.setattr(linear_ops, "linear_w8a8", lambda *args: products.append(1) or product(*args))
    with start(model, "npu", quantization="w8a8", **mode) as llm:
        found = tokens(llm)
        assert_same(found, plain(model, "w8a8"), tie=0.1)
        if mode is GRAPHS:
            assert sum(llm._core.link.worker.runner.graphs.stats().replays_total.values()) > 0
        assert tokens(llm) == found and products
