"""Adapters in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from xllm.errors import ModelError
from xllm.layers.adapters import Adapter
from xllm.models.raw_config import read_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TENSOR = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
# Settings that change what is computed, with the values under which they do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "modules_to_save": (None, []), "bias": ("none", None), "fan_in_fan_out": (False, None),
    "lora_bias": (False, None), "layer_replication": (None, []), "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None), "alora_invocation_tokens": (None, []),
}


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]], max_rank: int) -> Adapter:
    """shapes: what the model can adapt, name -> (Y, X).

    Raises:
        ModelError: a file is missing or broken, or the adapter asks for what is not built; names file and tensor.
    """
    config = read_json(folder / CONFIG_FILE)
    if config.get("peft_type", "LORA") != "LORA":
        raise ModelError(f"{folder / CONFIG_FILE}: peft_type {config.get('peft_type')!r}; only LORA is built")
    for name, harmless in REFUSED.items():
        if config.get(name) not in harmless:
            raise ModelError(f"{folder / CONFIG_FILE}: {name} {config[name]!r} is not built")
    halves = _read_halves(folder / WEIGHTS_FILE)
    matrices = {}
    for name, pair in halves.items():
        if name not in shapes:
            raise ModelError(f"{folder / WEIGHTS_FILE}: {name!r} is nothing that an adapter of this model can change")
        if len(pair) != 2:
            raise ModelError(f"{folder / WEIGHTS_FILE}: {name!r} has lora_{min(pair)} only")
        a, b = pair["A"].float(), pair["B"].float()
        _check_shapes(folder / WEIGHTS_FILE, name, a, b, shapes[name], max_rank)
        matrices[name] = a, b * _scale(config, name, len(a))
    if not matrices:
        raise ModelError(f"{folder / WEIGHTS_FILE} holds no lora_A and lora_B")
    return Adapter(matrices=matrices)


def adapter_digest(folder: Path) -> str:
    """Changes whenever the adapter does: what was computed with one must not be taken for another's."""
    state = hashlib.blake2b(digest_size=16)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            state.update(hashlib.file_digest(file, "blake2b").digest() if hasattr(hashlib, "file_digest")
                         else hashlib.blake2b(file.read()).digest())
    return state.hexdigest()


def _read_halves(file: Path) -> dict[str, dict[str, Tensor]]:
    """Layer name -> {"A": ..., "B": ...}."""
    if not file.is_file():
        raise ModelError(f"{file} does not exist; adapters in other formats than safetensors are not read")
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(file), framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - no mapping
                match = TENSOR.fullmatch(key.removeprefix(PREFIX))
                if match is None:
                    raise ModelError(f"{file}: tensor {key!r} is neither lora_A nor lora_B of a layer")
                found.setdefault(match[1], {})[match[2]] = handle.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or corrupt: {error}") from None
    return found


def _check_shapes(file: Path, name: str, a: Tensor, b: Tensor, shape: tuple[int, int], max_rank: int) -> None:
    rows, inputs = shape
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != inputs or b.shape != (rows, len(a)):
        raise ModelError(f"{file}: {name!r} has shapes {list(a.shape)} and {list(b.shape)}; the layer has {inputs} "
                         f"inputs and {rows} outputs")
    if len(a) > max_rank:
        raise ModelError(f"{file}: {name!r} has rank {len(a)}, and max_lora_rank is {max_rank}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ModelError(f"{file}: {name!r} holds numbers that are not finite")


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA; Kalajdzievski 2023). Patterns name layers by the end of their name."""
    alpha = _by_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", rank))
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ModelError(f"{CONFIG_FILE}: lora_alpha {alpha!r} is no number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if name == pattern or name.endswith("." + pattern):
            return value
    return default
