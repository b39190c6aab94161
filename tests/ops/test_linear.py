"""Linear layers and the embedding against float64 truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.cpu_kernels import PanelLinear
from backends.opset import OpSet

ROWS = [0, 1, 2, 3, 5, 7, 8, 12, 13, 33, 70]
SIZES = [(33, 7), (100, 64), (31, 530), (1, 1), (129, 1100)]


def weights(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return torch.randn(size) / size[1] ** 0.5, torch.randn(size[0])


def int8_truth(weight_YX: Tensor) -> Tensor:
    """The weight after symmetric int8 rounding per row, in float64."""
    scale = weight_YX.abs().amax(1, keepdim=True) / 127
    return (weight_YX / scale).round().double() * scale.double()


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_linear(ops: OpSet, size: tuple[int, int], num_rows: int, quantization: str | None, with_bias: bool) -> None:
    weight_YX, bias_Y = weights(size)
    x = torch.randn(num_rows, size[1])
    packed = ops.pack_linear(weight_YX.clone(), bias_Y if with_bias else None, quantization=quantization)
    truth = x.double() @ (int8_truth(weight_YX) if quantization else weight_YX.double()).T
    y = ops.linear(x, packed)
    assert y.shape == (num_rows, size[0])
    torch.testing.assert_close(y.double(), truth + bias_Y if with_bias else truth, rtol=0, atol=1e-5)


def test_x_may_be_a_view_of_columns(ops: OpSet) -> None:
    weight_YX, _ = weights((20, 48))
    wide = torch.full((5, 100), float("nan"))
    wide[:, 4:52] = torch.randn(5, 48)
    y = ops.linear(wide[:, 4:52], ops.pack_linear(weight_YX))
    torch.testing.assert_close(y, wide[:, 4:52] @ weight_YX.T)


@pytest.mark.parametrize("quantization", [None, "int8"])
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
    """The packed form is a copy where it says so by its size; int8 is a quarter of fp32."""
    weight_YX, _ = weights((64, 64))
    fp32, int8 = ops.pack_linear(weight_YX), ops.pack_linear(weight_YX, quantization="int8")
    assert fp32.nbytes == weight_YX.nbytes
    assert int8.nbytes == weight_YX.nbytes // 4 + 64 * 4


def test_a_row_of_zeros_is_quantised(ops: OpSet) -> None:
    y = ops.linear(torch.ones(2, 16), ops.pack_linear(torch.zeros(3, 16), quantization="int8"))
    assert torch.equal(y, torch.zeros(2, 3))


def test_unknown_quantization(ops: OpSet) -> None:
    with pytest.raises(ValueError, match="int4"):
        ops.pack_linear(torch.ones(2, 2), quantization="int4")


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_bfloat16(ops: OpSet, quantization: str | None) -> None:
    weight_YX, _ = weights((40, 64))
    x = torch.randn(3, 64).bfloat16()
    y = ops.linear(x, ops.pack_linear(weight_YX.bfloat16(), quantization=quantization))
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), x.float() @ weight_YX.T, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embedding(ops: OpSet, dtype: torch.dtype) -> None:
    table = torch.randn(50, 12)
    ids = torch.tensor([49, 0, 7, 7], dtype=dtype)
    assert torch.equal(ops.embedding(ids, table), torch.stack([table[i] for i in ids.tolist()]))
