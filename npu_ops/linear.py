"""Matrix products: plain, with int8 weights (W8A16), and with int8 weights and activations (W8A8).

Letters: M rows, X in, Y out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from npu_ops.contracts import check
from npu_ops.format import FRACTAL_NZ, cast_format
from npu_ops.quant_contracts import LARGEST_AXIS, fills_fractals


@dataclass(frozen=True, slots=True)
class Int8Part:
    """Up to 65535 columns of an int8 weight. codes_YX int8; scale_Y, bias_Y: as the operator wants them."""

    codes_YX: Tensor
    scale_Y: Tensor
    bias_Y: Tensor | None


class PackedWeight:
    """A weight ready for `linear`: plain, or int8 in parts that the operator's limit allows."""

    __slots__ = ("bias_Y", "nbytes", "parts", "weight_YX")

    def __init__(self, weight_YX: Tensor | None, bias_Y: Tensor | None, parts: tuple[Int8Part, ...] = ()):
        self.weight_YX, self.bias_Y, self.parts = weight_YX, bias_Y, parts
        tensors = [weight_YX, bias_Y, *(t for part in parts for t in (part.codes_YX, part.scale_Y, part.bias_Y))]
        self.nbytes = sum(t.nbytes for t in tensors if t is not None)


def check_quantization(quantization: str | None) -> None:
    """Raise ValueError for a form of weights that no product of an NPU takes."""
    if quantization not in (None, "int8", "w8a8"):
        raise ValueError(f"products on an NPU take weights as they are or in int8, not in {quantization}")


def pack_int8(*, codes_YX: Tensor, scale_Y: Tensor, bias_Y: Tensor | None, dtype: torch.dtype) -> PackedWeight:
    """An int8 weight [Y, X] with one scale per row for activations of `dtype`, which the scales are rounded to."""
    _check_inputs(codes_YX.shape[1])
    bias_dtype = torch.float32 if dtype is torch.bfloat16 else dtype
    parts = []
    for rows in _parts(len(codes_YX)):
        bias = None if bias_Y is None else bias_Y[rows].to(bias_dtype).contiguous()
        parts.append(Int8Part(codes_YX[rows].contiguous(), scale_Y[rows].to(dtype).contiguous(), bias))
    return PackedWeight(None, None, tuple(parts))


def _check_inputs(num_inputs: int) -> None:
    if num_inputs > LARGEST_AXIS:
        raise ValueError(f"quantised products on an NPU take up to {LARGEST_AXIS} inputs, not {num_inputs}")


def _parts(num_outputs: int) -> list[slice]:
    """As few and as even as the operators' limit allows."""
    num_parts = -(-num_outputs // LARGEST_AXIS)
    return [slice(num_outputs * i // num_parts, num_outputs * (i + 1) // num_parts) for i in range(num_parts)]


def linear(x_TX: Tensor, packed: PackedWeight | W8A8Weight) -> Tensor:
    """y = x @ weight.T + bias, in x's dtype."""
    if isinstance(packed, W8A8Weight):
        return linear_w8a8(x_TX, packed)
    if not packed.parts:
        assert packed.weight_YX is not None
        return F.linear(x_TX, packed.weight_YX, packed.bias_Y)
    parts = [weight_quant_matmul(x_MX=x_TX.contiguous(), part=part) for part in packed.parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def weight_quant_matmul(*, x_MX: Tensor, part: Int8Part) -> Tensor:
    """x @ (codes * scale).T + bias; the weight is handed over as the transposed view, which the docs recommend."""
    arguments = {"x": x_MX, "weight": part.codes_YX.t(), "antiquant_scale": part.scale_Y, "bias": part.bias_Y}
    check("npu_weight_quant_batchmatmul", **arguments)
    out: Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(**arguments)
    return out


def embedding(ids_T: Tensor, weight_VD: Tensor) -> Tensor:
    return F.embedding(ids_T, weight_VD)


# --- both sides int8


@dataclass(frozen=True, slots=True)
class W8A8Part:
    """Up to 65535 columns. codes_XY int8, in FRACTAL_NZ where it fills tiles; scale_Y float32; bias_Y as results."""

    codes_XY: Tensor
    scale_Y: Tensor
    bias_Y: Tensor | None


class W8A8Weight:
    """An int8 weight for activations that are brought to int8, in parts that the operator's limit allows."""

    __slots__ = ("dtype", "nbytes", "parts")

    def __init__(self, parts: tuple[W8A8Part, ...], dtype: torch.dtype):
        self.parts, self.dtype = parts, dtype
        tensors = [t for part in parts for t in (part.codes_XY, part.scale_Y, part.bias_Y)]
        self.nbytes = sum(t.nbytes for t in tensors if t is not None)


def pack_w8a8(*, codes_YX: Tensor, scale_Y: Tensor, bias_Y: Tensor | None, dtype: torch.dtype) -> W8A8Weight:
    """An int8 weight [Y, X] for results of `dtype`, in the order and format that the cube unit multiplies fastest."""
    _check_inputs(codes_YX.shape[1])
    parts = []
    for rows in _parts(len(codes_YX)):
        codes_XY = codes_YX[rows].t().contiguous()
        if fills_fractals(codes_XY.shape, 1):
            codes_XY = cast_format(x=codes_XY, acl_format=FRACTAL_NZ)
        bias = None if bias_Y is None else bias_Y[rows].to(dtype).contiguous()
        parts.append(W8A8Part(codes_XY, scale_Y[rows].float().contiguous(), bias))
    return W8A8Weight(tuple(parts), dtype)


def dynamic_quant(*, x: Tensor, smooth_scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes and a float32 scale for each row: x ~ codes * scale, scale = the row's largest / 127."""
    check("npu_dynamic_quant", input=x, smooth_scales=smooth_scales)
    codes, scale = torch.ops.npu.npu_dynamic_quant(x, smooth_scales=smooth_scales)
    return codes, scale


def quant_matmul(*, codes_MX: Tensor, scale_M: Tensor, part: W8A8Part, dtype: torch.dtype) -> Tensor:
    """(codes * scale) @ (weight's codes * scale) + bias in `dtype`, the products summed in int32."""
    arguments = {"x1": codes_MX, "x2": part.codes_XY, "scale": part.scale_Y, "pertoken_scale": scale_M,
                 "bias": part.bias_Y, "output_dtype": dtype}
    check("npu_quant_matmul", **arguments)
    out: Tensor = torch.ops.npu.npu_quant_matmul(**arguments)
    return out


def linear_w8a8(x_MX: Tensor, weight: W8A8Weight) -> Tensor:
    """A product whose activations are brought to int8 row by row."""
    codes_MX, scale_M = dynamic_quant(x=x_MX.contiguous())
    parts = [quant_matmul(codes_MX=codes_MX, scale_M=scale_M, part=part, dtype=weight.dtype) for part in weight.parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
