"""Checkpoints brought to DeepSeek's fp8, with a scale for each block of a matrix, and plain ones that mean the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

PLAIN = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "shared_expert_gate.weight")  # as Qwen's have it
LARGEST = 448.0
SCALE_SUFFIX = "_scale_inv"


def per_number(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of each number, written out."""
    rows, columns = block
    return scales.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., :shape[-2], :shape[-1]]


def in_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn of its shape, fp32 scales [..., ceil(Y / rows), ceil(X / columns)]) of [..., Y, X]."""
    rows, columns = block
    filled = F.pad(weight.float(), (0, -weight.shape[-1] % columns, 0, -weight.shape[-2] % rows))
    blocks = filled.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # [..., y, rows, x, columns]
    scales = blocks.abs().amax((-3, -1)).clamp(min=1e-12) / LARGEST
    return (weight.float() / per_number(scales, block, weight.shape)).to(torch.float8_e4m3fn), scales


def to_fp8(folder: Path, block: tuple[int, int], plain: Path, *, scale_dtype: torch.dtype = torch.float32,
           is_plain: Callable[[str], bool] = lambda name: name.endswith(PLAIN)) -> Path:
    """Rewrite the checkpoint in `folder`, of one file, with all matrices but the `is_plain` ones as fp8; write the fp32
    one that it stands for to `plain`, with the same config otherwise. Returns `plain`."""
    weights, stood_for = load_file(folder / "model.safetensors"), {}
    for name, weight in list(weights.items()):
        stood_for[name] = weight.float()
        if weight.ndim > 1 and not is_plain(name):
            codes, scales = in_blocks(weight, block)
            scales = scales.to(scale_dtype)
            weights[name], weights[name + SCALE_SUFFIX] = codes, scales
            stood_for[name] = codes.float() * per_number(scales.float(), block, codes.shape)
    plain.mkdir(exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file(stood_for, plain / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {
        "quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic", "fmt": "e4m3"}}))
    save_file(weights, folder / "model.safetensors")
    return plain
