"""Adapters of random numbers, for the bundled model if no other is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 4
BUNDLED = Path(__file__).parents[1] / "xllm" / "bundled"


def write_adapter(folder: Path, seed: int, *, model: Path = BUNDLED,
                  projections: tuple[str, ...] = ("q_proj", "down_proj")) -> None:
    """In PEFT's format, of these projections in every layer."""
    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in weights.items():
        if name.removesuffix(".weight").endswith(projections):
            stem = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=generator) * 0.1
            tensors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], RANK, generator=generator) * 0.1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
