"""Linear layers and the embedding against float64 truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from backends.cpu.kernels import PanelLinear
from backends.opset import OpSet
from backends.reference.linear import quantize_rows
from tests.ops.conftest import INTERPRETED, NAN, sizes

ROWS = sizes([0, 1, 2, 3, 5, 7, 8, 12, 13, 17, 33, 70], [0, 1, 17, 70])
SIZES = sizes([(33, 7), (100, 64), (31, 530), (1, 1), (100, 530), (129, 1100)], [(33, 7), (1, 1), (100, 530)])
QUANTIZATIONS = [None, "int8", "fp8"]  # whose x stays as it is
QUANTISED = ["int8", "fp8", "w8a8"]


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


@pytest.mark.parametrize("quantization", [None, *QUANTISED])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_a_row_does_not_see_its_batch(ops: OpSet, quantization: str | None, with_bias: bool) -> None:
    weight_YX, bias_Y = weights((70, 600))
    packed = ops.pack_linear(weight_YX, bias_Y if with_bias else None, quantization=quantization)
    x = torch.randn(77, 600)
    together = ops.linear(x, packed)
    for begin, end in ((0, 1), (3, 5), (10, 22), (20, 33), (76, 77)):
        alone = ops.linear(x[begin:end], packed)
        torch.testing.assert_close(alone, together[begin:end], rtol=0, atol=1e-5)
        if type(packed) is PanelLinear or quantization == "w8a8":
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
    """Many rows of x may be brought to fp8 too, where the weight is (`LinearOp`)."""
    weight_YX, _ = weights((48, 208))
    x = torch.randn(num_rows, 208).to(dtype)
    y = ops.linear(x, ops.pack_linear(weight_YX.to(dtype), quantization=quantization))
    assert y.dtype is dtype
    truth = x.double() @ stored_weight(weight_YX.to(dtype).float(), quantization).T
    rounded_too = ops.name == "cuda" and quantization == "fp8" and dtype is torch.bfloat16 and num_rows > 64
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=0.2 if rounded_too else 0.05)


# --- weights and activations in int8


def in_int8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes as int64, fp32 scale) of each row, as `LinearOp` says."""
    largest = np.abs(rows).max(1)
    small = largest < np.float32(2.0**-100)
    factor = np.where(small, np.float32(0), np.float32(127) / np.where(small, np.float32(1), largest))
    return np.rint(rows * factor[:, None]).astype(np.int64), largest * np.float32(1 / 127)


def w8a8_truth(x: Tensor, weight_YX: Tensor, bias_Y: Tensor | None = None) -> Tensor:
    """In integers and fp32, to the last bit if there is no bias."""
    codes_TX, scale_T = in_int8(x.float().numpy())
    codes_YX, scale_Y = (t.numpy() for t in quantize_rows(weight_YX, "w8a8"))
    y = (codes_TX @ codes_YX.astype(np.int64).T).astype(np.float32) * scale_T[:, None] * scale_Y
    return torch.from_numpy(y if bias_Y is None else y + bias_Y.float().numpy())


def spread_rows(num_rows: int, size: int) -> Tensor:
    """Rows of very different sizes."""
    return torch.randn(num_rows, size) * torch.randn(num_rows, 1).mul(4).exp()


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("num_rows", ROWS)
def test_w8a8(ops: OpSet, size: tuple[int, int], num_rows: int) -> None:
    (weight_YX, bias_Y), x = weights(size), spread_rows(num_rows, size[1])
    exact = ops.linear(x, ops.pack_linear(weight_YX.clone(), quantization="w8a8"))
    assert torch.equal(exact, w8a8_truth(x, weight_YX))
    y = ops.linear(x, ops.pack_linear(weight_YX.clone(), bias_Y, quantization="w8a8"))
    assert ((y - exact - bias_Y).abs() <= 2.0**-22 * (exact.abs() + bias_Y.abs())).all()
    assert num_rows == 0 or not torch.equal(y, exact)


def test_w8a8_is_near_the_product(ops: OpSet) -> None:
    (weight_YX, _), x = weights((64, 530)), spread_rows(9, 530)
    y, truth = ops.linear(x, ops.pack_linear(weight_YX, quantization="w8a8")), x.double() @ weight_YX.double().T
    error = (y - truth).norm(dim=1) / truth.norm(dim=1)
    assert ((error > 0.002) & (error < 0.02)).all()


def test_codes_are_rounded_to_even(ops: OpSet) -> None:
    """With 127 in the row the scale is as good as one."""
    row = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -125.5]
    eye = torch.eye(len(row))
    y = ops.linear(torch.tensor([row]), ops.pack_linear(eye, quantization="w8a8"))
    torch.testing.assert_close(y[0], torch.tensor([127.0, 0, 2, 2, 0, -2, -2, 126, -126]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_row_that_is_not_finite_stays_alone(ops: OpSet, num_rows: int, bad: float) -> None:
    (weight_YX, bias_Y), x = weights((40, 70)), torch.randn(num_rows, 70)
    x[0, 66] = bad
    y = ops.linear(x, ops.pack_linear(weight_YX, bias_Y, quantization="w8a8"))
    assert y[0].isnan().all() and y[1:].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-45, 2.0**-101, 2.0**-100, 1e30], ids=str)
def test_the_smallest_and_the_largest_rows(ops: OpSet, size: float) -> None:
    (weight_YX, bias_Y), x = weights((40, 70)), torch.full((2, 70), size)
    x[1, 3:] *= -0.5
    packed = ops.pack_linear(weight_YX / 100, quantization="w8a8")
    y = ops.linear(x, packed)
    assert torch.equal(y, w8a8_truth(x, weight_YX / 100))
    assert y.isfinite().all() and y.any() == (size >= 2.0**-100)
    assert torch.equal(ops.linear(x, ops.pack_linear(weight_YX, bias_Y, quantization="w8a8"))[0], bias_Y) == (
        size < 1e-20)


def test_the_most_inputs(ops: OpSet) -> None:
    """Sums next to 2^31, which no fp32 could hold on the way."""
    most = (2**31 - 1) // 127**2
    weight_YX = torch.ones(2, most)
    weight_YX[1] = -1
    weight_YX[:, 0] = 0.5  # its code is 64
    y = ops.linear(torch.full((1, most), 127.0), ops.pack_linear(weight_YX, quantization="w8a8"))
    total = (most - 1) * 127**2
    expected = np.float32([total + 127 * 64, -total + 127 * 64]) * np.float32(127 * np.float32(1 / 127))
    assert torch.equal(y[0], torch.from_numpy(expected * np.float32(1 / 127)))
    with pytest.raises(ValueError, match=f"up to {most} inputs, not {most + 1}"):
        ops.pack_linear(torch.ones(1, most + 1), quantization="w8a8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [3, 70])
def test_w8a8_in_half_precision(ops: OpSet, num_rows: int, dtype: torch.dtype) -> None:
    """Sums and scales are fp32's; only the result is rounded."""
    weight_YX, bias_Y = (t.to(dtype) for t in weights((48, 208)))
    wide = torch.full((num_rows, 300), NAN).to(dtype)
    wide[:, 40:248] = torch.randn(num_rows, 208)
    unit = torch.finfo(dtype).eps * (1 if INTERPRETED else 0.5)  # Triton's interpreter cuts bits off
    for bias in (None, bias_Y):
        y = ops.linear(wide[:, 40:248], ops.pack_linear(weight_YX, bias, quantization="w8a8"))
        truth = w8a8_truth(wide[:, 40:248], weight_YX, bias)
        assert y.dtype is dtype
        assert (y.float() - truth).abs().le(truth.abs() * unit * 1.01 + 1e-6).all()


def test_threads_do_not_show(ops: OpSet) -> None:
    (weight_YX, bias_Y), x = weights((300, 400)), torch.randn(7, 400)
    packed = ops.pack_linear(weight_YX, bias_Y, quantization="w8a8")
    alone = ops.linear(x, packed)
    torch.set_num_threads(2)
    assert torch.equal(ops.linear(x, packed), alone)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embedding(ops: OpSet, dtype: torch.dtype) -> None:
    table = torch.randn(50, 12)
    ids = torch.tensor([49, 0, 7, 7], dtype=dtype)
    assert torch.equal(ops.embedding(ids, table), torch.stack([table[i] for i in ids.tolist()]))
