"""Linear layers and the embedding against float64 truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.cpu_kernels import PanelLinear
from backends.opset import OpSet
from tests.ops.conftest import sizes

ROWS = sizes([0, 1, 2, 3, 5, 7, 8, 12, 13, 17, 33, 70], [0, 1, 17, 70])
SIZES = sizes([(33, 7), (100, 64), (31, 530), (1, 1), (100, 530), (129, 1100)], [(33, 7), (1, 1), (100, 530)])
QUANTISED = ["int8", "fp8"]
QUANTIZATIONS = [None, *QUANTISED]


def weights(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return torch.randn(size) / size[1] ** 0.5, torch.randn(size[0])


def stored_weight(weight_YX: Tensor, quantization: str | None) -> Tensor:
    """The weight after rounding to int8 or fp8 with a scale per row, in float64."""
    if quantization is None:
        return weight_YX.double()
    scale = weight_YX.abs().amax(1, keepdim=True) / (127 if quantization == "int8" else 448)
    codes = weight_YX / scale
    return (codes.round() if quantization == "int8" else codes.to(torch.float8_e4m3fn)).double() * scale.double()


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_linear(ops: OpSet, size: tuple[int, int], num_rows: int, quantization: str | None, with_bias: bool) -> None:
    weight_YX, bias_Y = weights(size)
    x = torch.randn(num_rows, size[1])
    packed = ops.pack_linear(weight_YX.clone(), bias_Y if with_bias else None, quantization=quantization)
    truth = x.double() @ stored_weight(weight_YX, quantization).T
    y = ops.linear(x, packed)
    assert y.shape == (num_rows, size[0])
    torch.testing.assert_close(y.double(), truth + bias_Y if with_bias else truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_x_may_be_a_view_of_columns(ops: OpSet, quantization: str | None) -> None:
    weight_YX, _ = weights((20, 48))
    wide = torch.full((5, 100), float("nan"))
    wide[:, 4:52] = torch.randn(5, 48)
    y = ops.linear(wide[:, 4:52], ops.pack_linear(weight_YX, quantization=quantization))
    truth = wide[:, 4:52].double() @ stored_weight(weight_YX, quantization).T
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_row_does_not_see_its_batch(ops: OpSet, quantization: str | None) -> None:
    packed = ops.pack_linear(weights((70, 600))[0], quantization=quantization)
    x = torch.randn(77, 600)
    together = ops.linear(x, packed)
    for begin, end in ((0, 1), (3, 5), (10, 22), (20, 33), (76, 77)):
        alone = ops.linear(x[begin:end], packed)
        torch.testing.assert_close(alone, together[begin:end], rtol=0, atol=1e-5)
        if type(packed) is PanelLinear:
            assert torch.equal(alone, together[begin:end])


def test_packed_weights_stand_alone(ops: OpSet) -> None:
    """The packed form is a copy where it says so by its size; a byte a number is a quarter of fp32."""
    weight_YX, _ = weights((64, 64))
    assert ops.pack_linear(weight_YX).nbytes == weight_YX.nbytes
    for quantization in QUANTISED:
        assert ops.pack_linear(weight_YX, quantization=quantization).nbytes == weight_YX.nbytes // 4 + 64 * 4


@pytest.mark.parametrize("quantization", QUANTISED)
def test_packing_leaves_the_weight_alone(ops: OpSet, quantization: str) -> None:
    weight_YX, _ = weights((5, 9))
    before = weight_YX.clone()
    ops.pack_linear(weight_YX, quantization=quantization)
    assert torch.equal(weight_YX, before)


@pytest.mark.parametrize("quantization", QUANTISED)
def test_a_row_of_zeros_is_quantised(ops: OpSet, quantization: str) -> None:
    y = ops.linear(torch.ones(2, 16), ops.pack_linear(torch.zeros(3, 16), quantization=quantization))
    assert torch.equal(y, torch.zeros(2, 3))


@pytest.mark.parametrize("quantization", QUANTISED)
def test_nan_in_a_weight_stays_in_its_output(ops: OpSet, quantization: str) -> None:
    weight_YX, _ = weights((3, 16))
    weight_YX[1, 5] = float("nan")
    y = ops.linear(torch.ones(2, 16), ops.pack_linear(weight_YX, quantization=quantization))
    assert y[:, 1].isnan().all() and y[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("num_rows", sizes([1, 254], [60, 254]))
def test_every_fp8_number_is_exact(ops: OpSet, num_rows: int) -> None:
    """Subnormal ones too: with 448 among them the scale is one."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    weight_YX = numbers[numbers.isfinite()].repeat(2, 1)
    packed = ops.pack_linear(weight_YX, quantization="fp8")
    one_hot = torch.eye(254)
    found = torch.cat([ops.linear(one_hot[i : i + num_rows], packed) for i in range(0, 254, num_rows)])
    assert torch.equal(found.T, weight_YX)


def test_unknown_quantization(ops: OpSet) -> None:
    with pytest.raises(ValueError, match="int4"):
        ops.pack_linear(torch.ones(2, 2), quantization="int4")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [3, 70])
def test_half_precision(ops: OpSet, num_rows: int, dtype: torch.dtype, quantization: str | None) -> None:
    """Many rows of x may be brought to fp8 too, where the weight is (`Linear`)."""
    weight_YX, _ = weights((48, 208))
    x = torch.randn(num_rows, 208).to(dtype)
    y = ops.linear(x, ops.pack_linear(weight_YX.to(dtype), quantization=quantization))
    assert y.dtype is dtype
    truth = x.double() @ stored_weight(weight_YX.to(dtype).float(), quantization).T
    rounded_too = ops.name == "cuda" and quantization == "fp8" and dtype is torch.bfloat16 and num_rows > 64
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=0.2 if rounded_too else 0.05)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embedding(ops: OpSet, dtype: torch.dtype) -> None:
    table = torch.randn(50, 12)
    ids = torch.tensor([49, 0, 7, 7], dtype=dtype)
    assert torch.equal(ops.embedding(ids, table), torch.stack([table[i] for i in ids.tolist()]))
