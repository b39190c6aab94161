"""Linear layers and the embedding against float64 truth."""

from __future__ import annotations

import pytest
import torch

from backends.opset import OpSet
from tests.ops.test_linear import int8_truth, weights


@pytest.mark.parametrize("size", [(33, 7), (1, 1), (100, 530)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("num_rows", [0, 1, 17, 70])
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


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_x_may_be_a_view_of_columns(ops: OpSet, quantization: str | None) -> None:
    weight_YX, _ = weights((20, 48))
    wide = torch.full((5, 100), float("nan"))
    wide[:, 4:52] = torch.randn(5, 48)
    packed = ops.pack_linear(weight_YX, quantization=quantization)
    torch.testing.assert_close(ops.linear(wide[:, 4:52], packed), ops.linear(wide[:, 4:52].contiguous(), packed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [3, 70])
def test_int8_of_half_precision(ops: OpSet, num_rows: int, dtype: torch.dtype) -> None:
    weight_YX, _ = weights((40, 200))
    x = torch.randn(num_rows, 200).to(dtype)
    y = ops.linear(x, ops.pack_linear(weight_YX.to(dtype), quantization="int8"))
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), x.double() @ weight_YX.double().T, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embedding(ops: OpSet, dtype: torch.dtype) -> None:
    table = torch.randn(50, 12)
    ids = torch.tensor([49, 0, 7, 7], dtype=dtype)
    assert torch.equal(ops.embedding(ids, table), torch.stack([table[i] for i in ids.tolist()]))
