"""Quantisation and the matrix products on quantised weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch_npu
from torch import Tensor

from tests.emulated_npu.operators.registry import emulates, refuse

FRACTAL_NZ = 29

# torch_npu takes a type as the number that torch has for it.
TYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}
# Of the scale and the result of a grouped product of int8.
OUTPUTS_OF_INT8 = ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16))


def type_of(number: int | None, otherwise: torch.dtype) -> torch.dtype:
    if number is None:
        return otherwise
    if number not in TYPES:
        raise NotImplementedError(f"type {number} is not emulated")
    return TYPES[number]


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and the scale of each row, rowmax / 127; a row of zeros has scale 0 and values 0."""
    wide = x.float()
    scale = wide.abs().amax(-1) / 127
    return (wide / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round().clamp(-128, 127).to(
        torch.int8
    ), scale


@emulates("npu::npu_dynamic_quant")
def dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    refuse("npu_dynamic_quant", {"group_index": group_index, "dst_type_max": dst_type_max}, (None, 0.0))
    refuse("npu_dynamic_quant", {"quant_mode": quant_mode}, ("pertoken",))
    if (
        input.dtype not in (torch.float16, torch.bfloat16)
        or input.dim() < 2
        or type_of(dst_type, torch.int8) is not torch.int8
    ):
        raise RuntimeError(f"npu_dynamic_quant: {input.dtype} of {input.dim()} dimensions to {dst_type}")
    if smooth_scales is not None and (smooth_scales.dtype != input.dtype or smooth_scales.shape != input.shape[-1:]):
        raise RuntimeError(f"npu_dynamic_quant: smooth_scales {smooth_scales.dtype} {tuple(smooth_scales.shape)}")
    return quantised(input if smooth_scales is None else input.float() * smooth_scales.float())


def _product(x1: Tensor, x2: Tensor) -> Tensor:
    """Exact: sums of products of int8 fit a double."""
    return torch.matmul(x1.double(), x2.double())


@emulates("npu::npu_quant_matmul")
def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    scale_dtype: int | None = None,
    group_sizes: Sequence[int] | None = None,
    y_scale: Tensor | None = None,
) -> Tensor:
    """x1 (m, k) and x2 (k, n) int8, scale (1) or (n), pertoken_scale (m). Without output_dtype the result is int8."""
    name = "npu_quant_matmul"
    refuse(name, {"x1_dtype": x1_dtype, "x2_dtype": x2_dtype, "scale_dtype": scale_dtype, "y_scale": y_scale})
    refuse(name, {"pertoken_scale_dtype": pertoken_scale_dtype, "group_sizes": group_sizes}, (None, []))
    if x1.dtype is not torch.int8 or x2.dtype is not torch.int8 or x1.shape[-1] != x2.shape[-2]:
        raise RuntimeError(f"{name}: {x1.dtype} {tuple(x1.shape)} by {x2.dtype} {tuple(x2.shape)}")
    if max(x1.shape[-1], x2.shape[-1]) > 65535:
        raise RuntimeError(f"{name}: a last dimension above 65535")
    if (
        scale.dtype not in (torch.float32, torch.bfloat16)
        or scale.dim() != 1
        or scale.shape[0] not in (1, x2.shape[-1])
    ):
        raise RuntimeError(f"{name}: scale {scale.dtype} {tuple(scale.shape)}")
    if pertoken_scale is not None and (
        pertoken_scale.dtype is not torch.float32 or pertoken_scale.shape != x1.shape[-2:-1]
    ):
        raise RuntimeError(f"{name}: pertoken_scale {pertoken_scale.dtype} {tuple(pertoken_scale.shape)}")
    total = _product(x1, x2)
    if bias is not None and bias.dtype is torch.int32:
        total = total + bias
    result = total.float() * scale.float()
    if pertoken_scale is not None:
        result = result * pertoken_scale[..., None]
    if bias is not None and bias.dtype is not torch.int32:
        result = result + bias.float()
    target = type_of(output_dtype, torch.int8)
    if target is torch.int8:
        result = (result + (offset if offset is not None else 0.0)).round().clamp(-128, 127)
    return result.to(target)


@emulates("npu::npu_weight_quant_batchmatmul")
def weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    """x (m, k) by int8 (k, n); scale and offset (1), (n), (1, n) or, by groups along k, (ceil(k / group), n)."""
    name = "npu_weight_quant_batchmatmul"
    refuse(name, {"quant_scale": quant_scale, "quant_offset": quant_offset, "weight_dtype": weight_dtype})
    if (
        weight.dtype is not torch.int8
        or x.dtype not in (torch.float16, torch.bfloat16)
        or antiquant_scale.dtype != x.dtype
    ):
        raise RuntimeError(f"{name}: {x.dtype} by {weight.dtype}, scale {antiquant_scale.dtype}")
    if antiquant_group_size and (antiquant_group_size % 32 or antiquant_group_size < 32):
        raise RuntimeError(f"{name}: groups of {antiquant_group_size}")

    def spread(part: Tensor) -> Tensor:
        wide = part.float()
        return wide.repeat_interleave(antiquant_group_size, 0)[: weight.shape[0]] if antiquant_group_size else wide

    full = weight.float()
    if antiquant_offset is not None:
        full = full + spread(antiquant_offset)
    result = torch.matmul(x.float(), full * spread(antiquant_scale))
    return (result + bias.float() if bias is not None else result).to(x.dtype)


@emulates("npu::npu_grouped_matmul")
def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    offset: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    activation_input: Sequence[Tensor] | None = None,
    activation_quant_scale: Sequence[Tensor] | None = None,
    activation_quant_offset: Sequence[Tensor] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    output_dtype: int | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
) -> list[Tensor]:
    """Rows of one x (M, K), group by group, by one weight (E, K, N): split_item 2 or 3 and group_type 0, for MoE."""
    name = "npu_grouped_matmul"
    unknown = {
        "offset": offset, "activation_input": activation_input, "activation_quant_scale": activation_quant_scale,
        "activation_quant_offset": activation_quant_offset, "x_dtype": x_dtype, "weight_dtype": weight_dtype,
        "scale_dtype": scale_dtype, "per_token_scale_dtype": per_token_scale_dtype, "act_type": act_type,
    }  # fmt: skip
    refuse(name, unknown, (None, 0, []))
    if group_type != 0 or split_item not in (2, 3) or len(x) != 1 or len(weight) != 1 or weight[0].dim() != 3:
        raise NotImplementedError(
            f"{name}: only split_item 2 or 3 with group_type 0, one x and one weight are emulated"
        )
    rows, experts = x[0], weight[0]
    is_weight_only = bool(antiquant_scale or antiquant_offset)
    is_mixed = rows.dtype != experts.dtype and not is_weight_only
    if rows.shape[-1] != experts.shape[1] or is_mixed or experts.shape[0] > 1024:
        raise RuntimeError(f"{name}: {rows.dtype} {tuple(rows.shape)} by {experts.dtype} {tuple(experts.shape)}")
    if is_weight_only:
        experts = _without_codes(name, rows, experts, antiquant_scale, antiquant_offset)
    if group_list is None or group_list.dtype is not torch.int64:
        raise RuntimeError(f"{name}: group_list must be int64, not {None if group_list is None else group_list.dtype}")
    is_int8 = rows.dtype is torch.int8
    if is_int8 != bool(scale):
        raise RuntimeError(f"{name}: {rows.dtype} {'without' if is_int8 else 'with'} scale")
    target = type_of(output_dtype, torch.int8 if is_int8 else rows.dtype)
    if scale and (scale[0].dtype, target) not in OUTPUTS_OF_INT8:
        raise RuntimeError(f"{name}: scale {scale[0].dtype} for a result of {target}")
    out = torch.full((rows.shape[0], experts.shape[2]), float("nan"))
    start = 0
    for expert, count in _groups(name, group_list, int(group_list_type or 0), experts.shape[0]):
        part = slice(start, start + count)
        product = (
            _product(rows[part], experts[expert]).float() if is_int8 else rows[part].float() @ experts[expert].float()
        )
        if scale:
            product = product * scale[0][expert].float()
        if per_token_scale:
            product = product * per_token_scale[0][part, None]
        out[part] = product + bias[0][expert].float() if bias else product
        start += count
    if start != rows.shape[0]:
        raise RuntimeError(f"{name}: groups of {start} rows, x has {rows.shape[0]}")
    return [out.to(target)]


def _only_fractals(x: Tensor, weight: Sequence[Tensor], *others: Any, **more: Any) -> None:
    """Of the device's tensors, as the wheel does: on A2 and A3 int8 is taken in FRACTAL_NZ alone."""
    if any(int(torch_npu.get_npu_format(each)) != FRACTAL_NZ for each in weight):
        raise RuntimeError("npu_grouped_matmul_swiglu_quant_v2: a weight of int8 that does not lie in FRACTAL_NZ")


@emulates("npu::npu_grouped_matmul_swiglu_quant_v2", inspect=_only_fractals)
def grouped_matmul_swiglu_quant(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    smooth_scale: Tensor | None = None,
    weight_assist_matrix: Sequence[Tensor] | None = None,
    bias: Tensor | None = None,
    dequant_mode: int | None = 0,
    dequant_dtype: int | None = 6,
    quant_mode: int | None = 0,
    quant_dtype: int | None = 1,
    group_list_type: int | None = 0,
    tuning_config: Sequence[int] | None = None,
    x_dtype: int | None = None,
    weight_dtype: int | None = None,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """W8A8 on A2 and A3. Of each group C = x @ weight * x_scale * weight_scale in float, S = swish(the first half of C)
    * the second one, and S as int8 with a scale for each row, its largest / 127.

    Rows of no group are not written. The codes of a row whose scale is zero or not a number are not documented: they
    are the least one here.
    """
    name = "npu_grouped_matmul_swiglu_quant_v2"
    unknown = {
        "smooth_scale": smooth_scale, "weight_assist_matrix": weight_assist_matrix, "bias": bias, "x_dtype": x_dtype,
        "tuning_config": tuning_config, "weight_dtype": weight_dtype, "weight_scale_dtype": weight_scale_dtype,
        "x_scale_dtype": x_scale_dtype,
    }  # fmt: skip
    refuse(name, unknown, (None, []))
    refuse(name, {"dequant_mode": dequant_mode, "quant_mode": quant_mode}, (None, 0))
    refuse(name, {"dequant_dtype": dequant_dtype}, (None, 0, 6))  # of two versions, both float
    refuse(name, {"quant_dtype": quant_dtype}, (None, 1))
    if len(weight) != 1 or len(weight_scale) != 1:
        raise RuntimeError(f"{name}: {len(weight)} weights and {len(weight_scale)} scales, not one of each")
    experts, scale = weight[0], weight_scale[0]
    if x.dtype is not torch.int8 or experts.dtype is not torch.int8 or x.dim() != 2 or experts.dim() != 3:
        raise RuntimeError(f"{name}: {x.dtype} {tuple(x.shape)} by {experts.dtype} {tuple(experts.shape)}")
    (num_rows, k), (num_experts, inner, n) = x.shape, experts.shape
    if not x.numel() or inner != k or k % 16 or n % 32 or k >= 65536 or n > 10240:
        raise RuntimeError(f"{name}: {tuple(x.shape)} by {tuple(experts.shape)}")
    if scale.shape != (num_experts, n) or scale.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"{name}: weight_scale {scale.dtype} {tuple(scale.shape)}")
    if x_scale.shape != (num_rows,) or x_scale.dtype is not torch.float32:
        raise RuntimeError(f"{name}: x_scale {x_scale.dtype} {tuple(x_scale.shape)}")
    if group_list.dtype is not torch.int64 or group_list.dim() != 1 or not 1 <= len(group_list) <= min(
        num_experts, 1024
    ):
        raise RuntimeError(f"{name}: group_list {group_list.dtype} {tuple(group_list.shape)}, {num_experts} experts")
    given = group_list.tolist()
    counts = given if group_list_type == 1 else [b - a for a, b in zip([0, *given], given, strict=False)]
    if group_list_type not in (0, 1) or min(counts) < 0 or sum(counts) > num_rows:
        raise RuntimeError(f"{name}: group_list {given} of type {group_list_type} for {num_rows} rows")
    codes = torch.full((num_rows, n // 2), -128, dtype=torch.int8)
    row_scale = torch.full((num_rows,), float("nan"))
    start = 0
    for expert, count in enumerate(counts):
        part = slice(start, start + count)
        start += count
        product = _product(x[part], experts[expert]).float() * scale[expert].float() * x_scale[part, None]
        act, gate = product.chunk(2, -1)
        rows = act / (1 + (-act).exp()) * gate
        row_scale[part] = rows.abs().amax(-1) / 127
        known = row_scale[part] > 0
        codes[part][known] = (rows[known] / row_scale[part][known, None]).round().to(torch.int8)
    return codes, row_scale


def _without_codes(name: str, rows: Tensor, codes: Tensor, scale: Sequence[Tensor] | None,
                   offset: Sequence[Tensor] | None) -> Tensor:
    """Weights of int8 (E, K, N) with a scale and an offset (E, N) as numbers of the rows' type, in float."""
    parts = [part for given in (scale, offset) for part in (given or ())]
    shape = (codes.shape[0], codes.shape[2])
    if len(parts) != 2 or codes.dtype is not torch.int8 or any(
        part.shape != shape or part.dtype is not rows.dtype or part.element_size() != 2 for part in parts
    ):
        raise RuntimeError(f"{name}: {codes.dtype} with antiquant parts {[(p.dtype, tuple(p.shape)) for p in parts]}")
    return (codes.float() + parts[1].float()[:, None]) * parts[0].float()[:, None]


def _groups(name: str, group_list: Tensor, kind: int, num_experts: int) -> list[tuple[int, int]]:
    """(expert, rows), in order. Kinds: 0 cumulated, 1 counted, 2 pairs that end with a count of 0."""
    if kind == 2:
        pairs = [(int(expert), int(count)) for expert, count in group_list.tolist()]
        return pairs[: next((i for i, (_, count) in enumerate(pairs) if not count), len(pairs))]
    if group_list.shape != (num_experts,) or kind not in (0, 1) or (kind == 1 and num_experts == 1):
        raise RuntimeError(f"{name}: group_list {tuple(group_list.shape)} of kind {kind} for {num_experts} experts")
    values = group_list.tolist()
    counts = values if kind == 1 else [b - a for a, b in zip([0, *values], values, strict=False)]
    if min(counts) < 0:
        raise RuntimeError(f"{name}: group_list {values}")
    return list(enumerate(counts))
