"""Adapters in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from xllm.errors import ModelError
from xllm.layers.adapters import Adapter
from xllm.models.adapter_config import CONFIG_FILE, AdapterConfig, read_adapter_config

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
TENSOR = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
log = logging.getLogger(__name__)


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]], max_rank: int) -> Adapter:
    """shapes: what the model can adapt, name -> (Y, X).

    Raises:
        ModelError: a file is missing or broken, or the adapter asks for what is not built; names file and tensor.
    """
    config, file = read_adapter_config(folder), folder / WEIGHTS_FILE
    halves = _read_halves(file)
    matrices = {}
    for layer, pair in halves.items():
        name = _own_name(layer, shapes)
        if name not in shapes:
            raise ModelError(f"{file}: {layer!r} is nothing that an adapter of this model can change")
        if not config.targets(layer):
            raise ModelError(f"{file}: {layer!r} has tensors, and {CONFIG_FILE} does not name it as a layer to change "
                             "(target_modules, exclude_modules, layers_to_transform)")
        if name in matrices:
            raise ModelError(f"{file}: {name!r} is there twice, with and without the first part of its name")
        if len(pair) != 2:
            raise ModelError(f"{file}: {layer!r} has lora_{min(pair)} only")
        a, b = pair["A"].float(), pair["B"].float()
        _check_shapes(file, layer, a, b, shapes[name], max_rank)
        if len(a) != config.rank(layer):
            raise config.error(f"r (or rank_pattern) says rank {config.rank(layer):g} for {layer!r}, whose matrices "
                               f"have {len(a)}")
        matrices[name] = a, b * config.scale(layer)
    if not matrices:
        raise ModelError(f"{folder / WEIGHTS_FILE} holds no lora_A and lora_B")
    _warn_of_missing(file, config, set(shapes) - set(matrices), is_bare=not any(layer in shapes for layer in halves))
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
                halves = found.setdefault(match[1], {})
                if match[2] in halves:
                    raise ModelError(f"{file}: lora_{match[2]} of {match[1]!r} is there twice")
                halves[match[2]] = handle.get_tensor(key)
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



def _own_name(layer: str, shapes: Mapping[str, tuple[int, int]]) -> str:
    """Adapters of a bare model, without a head, leave out the first part of the name."""
    return layer if layer in shapes else f"model.{layer}"


def _warn_of_missing(file: Path, config: AdapterConfig, absent: set[str], *, is_bare: bool) -> None:
    """A layer that the config names and the file lacks stays as it is, as in PEFT; that may be a torn file."""
    if not config.says_targets:
        return
    missing = [name for name in sorted(absent) if config.targets(name.removeprefix("model.") if is_bare else name)]
    if missing:
        log.warning("%s lacks %d of the layers that its config names, such as %s; they stay as they are", file,
                    len(missing), missing[0])
