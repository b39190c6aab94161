"""The contracts of quantised matrix products and of the cast between memory formats."""

from __future__ import annotations

import torch

from npu_ops.contract import HALVES, Contract, Rule, contiguous, dtypes, on_one_device, one_of, ranks, same_dtype

DOC = "torch_npu operator docs"
ND, FRACTAL_NZ = 2, 29  # numbers of memory formats (aclFormat)
LARGEST_AXIS = 65535  # of a quantised product, as its documentation has it

WEIGHT_QUANT = (
    on_one_device("x", "weight", "antiquant_scale"),
    dtypes(DOC, HALVES, "x", "antiquant_scale"),
    dtypes(DOC, (torch.int8,), "weight"),
    same_dtype(DOC, "x", "antiquant_scale"),
    ranks(DOC, 2, 2, "x", "weight"),
    Rule("x must be [M, K] and weight [K, N]", DOC, lambda a: a.x.shape[1] == a.weight.shape[0]),
    Rule("K and N must lie in [1, 65535]", DOC, lambda a: all(1 <= n <= LARGEST_AXIS for n in a.weight.shape)),
    Rule("x may not be empty", DOC, lambda a: a.x.numel() > 0),
    Rule("antiquant_scale must be [N] or [1, N]", f"{DOC}: one scale a column",
         lambda a: a.antiquant_scale.shape in ((a.weight.shape[1],), (1, a.weight.shape[1]))),
    Rule("bias must be [N] of float32 with bfloat16, else of x's dtype", DOC,
         lambda a: a.bias is None or (a.bias.shape == a.weight.shape[1:] and a.bias.dtype is
                                      (torch.float32 if a.x.dtype is torch.bfloat16 else a.x.dtype))),
    Rule("weight must be contiguous, or the transposed view of one that is", DOC,
         lambda a: a.weight.is_contiguous() or a.weight.t().is_contiguous()),
)  # fmt: skip

QUANT_MATMUL = (
    on_one_device("x1", "x2", "scale", "pertoken_scale"),
    dtypes(DOC, (torch.int8,), "x1", "x2"),
    ranks(DOC, 2, 6, "x1", "x2"),
    Rule("x1 must be [M, K] and x2 [K, N]", DOC, lambda a: a.x1.shape[-1] == a.x2.shape[-2]),
    Rule("the last axes of x1 and x2 must be at most 65535", DOC,
         lambda a: a.x1.shape[-1] <= LARGEST_AXIS and a.x2.shape[-1] <= LARGEST_AXIS),
    Rule("nothing may be empty", DOC, lambda a: a.x1.numel() > 0 and a.x2.numel() > 0),
    one_of(f"{DOC}: None would mean int8", "output_dtype", HALVES),
    dtypes(DOC, (torch.float32,), "pertoken_scale"),
    Rule("scale must be float32, or bfloat16 with that output", f"{DOC}: table 1",
         lambda a: a.scale.dtype is torch.float32 or a.scale.dtype is a.output_dtype is torch.bfloat16),
    Rule("scale must be [1] or [N]", DOC, lambda a: a.scale.shape in ((1,), a.x2.shape[-1:])),
    Rule("pertoken_scale must be [M]", DOC,
         lambda a: a.pertoken_scale is not None and a.pertoken_scale.shape == a.x1.shape[:1]),
    Rule("bias must be [N], of int32, float32 or the output's dtype", f"{DOC}: table 1",
         lambda a: a.bias is None or (a.bias.shape == a.x2.shape[-1:]
                                      and a.bias.dtype in (torch.int32, torch.float32, a.output_dtype))),
)  # fmt: skip

DYNAMIC_QUANT = (
    dtypes(DOC, HALVES, "input", "smooth_scales"),
    same_dtype(DOC, "input", "smooth_scales"),
    ranks(f"{DOC}: more than one axis", 2, 8, "input"),
    Rule("smooth_scales must be [last axis]", DOC,
         lambda a: a.smooth_scales is None or a.smooth_scales.shape == a.input.shape[-1:]),
)


def fills_fractals(shape: tuple[int, ...], itemsize: int) -> bool:
    """Whether the last two axes are whole tiles of 16 rows of 32 bytes."""
    return len(shape) >= 2 and shape[-2] % 16 == 0 and shape[-1] * itemsize % 32 == 0


FORMAT_CAST = (
    one_of("house rule: what the engine uses", "acl_format", (ND, FRACTAL_NZ)),
    contiguous(DOC, "input"),
    ranks("FRACTAL_NZ tiles the last two axes", 2, 8, "input"),
    dtypes(DOC, (torch.int8, *HALVES, torch.float32), "input"),
    Rule("FRACTAL_NZ needs whole tiles of 16 rows of 32 bytes", "house rule: others are padded, and have no plain view",
         lambda a: a.acl_format != FRACTAL_NZ or fills_fractals(a.input.shape, a.input.itemsize)),
)

QUANT_CONTRACTS = (
    Contract("npu_weight_quant_batchmatmul", WEIGHT_QUANT),
    Contract("npu_quant_matmul", QUANT_MATMUL),
    Contract("npu_dynamic_quant", DYNAMIC_QUANT),
    Contract("npu_format_cast", FORMAT_CAST),
)
