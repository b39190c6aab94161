"""Adapters in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from xllm.errors import ModelError
from xllm.layers.adapter_slots import Adapter
from xllm.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from xllm.models.adapter_layers import AdapterLayer, AdapterLayers, read_layers

PREFIX, BASE = "base_model.model.", "model."
DTYPES = ("F32", "F16", "BF16", "F64")
# Of a header: for each tensor, and for all else. Chosen: several times what PEFT writes.
MAX_KEY_BYTES, MAX_METADATA_BYTES = 512, 2**16
# Of a file that is hashed at a time. Chosen: bounds memory, and is large enough to hash at full speed.
DIGEST_PIECE_BYTES = 2**20
TENSOR = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
log = logging.getLogger(__name__)


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]], max_rank: int) -> tuple[Adapter, str]:
    """The adapter, and a digest that changes whenever its files do: what was computed with one must not be taken for
    another's. Nothing is read that the model has no place for.

    shapes: what the model can adapt, name -> (Y, X).

    Raises:
        ModelError: a file is missing or broken, or the adapter asks for what is not built; names file and tensor.
    """
    names = [*shapes, *(name.removeprefix(BASE) for name in shapes if name.startswith(BASE))]
    said, file = read_layers(folder, list(dict.fromkeys(names))), folder / ADAPTER_WEIGHTS
    _check_header(file, MAX_KEY_BYTES * (2 * len(shapes)) + MAX_METADATA_BYTES)
    try:
        with safe_open(str(file), framework="pt") as handle:
            halves = _find_halves(file, handle)
            matrices: dict[str, tuple[Tensor, Tensor]] = {}
            for layer, keys in halves.items():
                name = _own_name(layer, shapes)
                _check_layer(file, layer, name, keys, said, shapes)
                if name in matrices:
                    raise ModelError(f"{file}: {name!r} is there twice, with and without the first part of its name")
                matrices[name] = _read_pair(file, handle, layer, keys, shapes[name], said.layers[layer], max_rank)
            state = hashlib.blake2b(said.digest.encode(), digest_size=16)
            with file.open("rb") as content:
                while piece := content.read(DIGEST_PIECE_BYTES):
                    state.update(piece)
    except (SafetensorError, OSError, MemoryError) as error:
        raise ModelError(f"{file} is truncated or corrupt: {error}") from None
    if not matrices:
        raise ModelError(f"{file} holds no lora_A and lora_B")
    _warn_of_missing(file, said, set(shapes) - set(matrices), is_bare=not any(layer in shapes for layer in halves))
    return Adapter(matrices=matrices), state.hexdigest()


def _check_header(file: Path, max_bytes: int) -> None:
    """Raise ModelError for a header larger than `max_bytes`: parsing one takes time and memory in the engine's own
    process, where every other thread waits for it."""
    if not file.is_file():
        raise ModelError(f"{file} does not exist; adapters in other formats than safetensors are not read")
    try:
        with file.open("rb") as content:
            num_bytes = int.from_bytes(content.read(8), "little")
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    if num_bytes > max_bytes:
        raise ModelError(f"{file} is truncated or corrupt: its header claims {num_bytes} bytes, and one of all layers "
                         f"of this model has {max_bytes} at most")


def _find_halves(file: Path, handle: Any) -> dict[str, dict[str, str]]:
    """Layer name -> {"A": key, "B": key}."""
    found: dict[str, dict[str, str]] = {}
    for key in handle.keys():  # noqa: SIM118 - no mapping
        match = TENSOR.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            raise ModelError(f"{file}: tensor {key!r} is neither lora_A nor lora_B of a layer")
        halves = found.setdefault(match[1], {})
        if match[2] in halves:
            raise ModelError(f"{file}: lora_{match[2]} of {match[1]!r} is there twice")
        halves[match[2]] = key
    return found


def _check_layer(file: Path, layer: str, name: str, keys: Mapping[str, str], said: AdapterLayers,
                 shapes: Mapping[str, tuple[int, int]]) -> None:
    if name not in shapes and ".experts." in layer:
        raise ModelError(f"{file}: {layer!r} is of an expert, and adapters of experts are not built")
    if name not in shapes:
        raise ModelError(f"{file}: {layer!r} is nothing that an adapter of this model can change")
    if not said.layers[layer].is_target:
        raise ModelError(f"{file}: {layer!r} has tensors, and {ADAPTER_CONFIG} does not name it as a layer to change "
                         "(target_modules, exclude_modules, layers_to_transform)")
    if len(keys) != 2:
        raise ModelError(f"{file}: {layer!r} has lora_{min(keys)} only")


def _read_pair(file: Path, handle: Any, layer: str, keys: Mapping[str, str], shape: tuple[int, int],
               said: AdapterLayer, max_rank: int) -> tuple[Tensor, Tensor]:
    """A and B * scale, float32; read once their shapes are known to be right."""
    slices = [handle.get_slice(keys[half]) for half in "AB"]
    shape_a, shape_b = (tuple(found.get_shape()) for found in slices)
    num_outputs, num_inputs = shape
    if len(shape_a) != 2 or shape_a[1] != num_inputs or shape_b != (num_outputs, shape_a[0]):
        raise ModelError(f"{file}: {layer!r} has shapes {list(shape_a)} and {list(shape_b)}; the layer has "
                         f"{num_inputs} inputs and {num_outputs} outputs")
    if shape_a[0] > max_rank:
        raise ModelError(f"{file}: {layer!r} has rank {shape_a[0]}, and max_lora_rank is {max_rank}")
    for found in slices:
        if found.get_dtype() not in DTYPES:
            raise ModelError(f"{file}: {layer!r} is of type {found.get_dtype()}; only {', '.join(DTYPES)} can be read")
    if shape_a[0] != said.rank:
        raise ModelError(f"{file.parent / ADAPTER_CONFIG}: r (or rank_pattern) says rank {said.rank} for {layer!r}, "
                         f"whose matrices have {shape_a[0]}")
    a, b = (handle.get_tensor(keys[half]).float() for half in "AB")
    b = b * said.scale
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ModelError(f"{file}: {layer!r} holds numbers that are not finite, or are not once they are scaled")
    return a, b


def _own_name(layer: str, shapes: Mapping[str, tuple[int, int]]) -> str:
    """The layer's name in this model: adapters of a bare model, without a head, leave out the first part."""
    return layer if layer in shapes else BASE + layer


def _warn_of_missing(file: Path, said: AdapterLayers, absent: set[str], *, is_bare: bool) -> None:
    """Log the layers that the config names and the file lacks. They stay as they are, as in PEFT, but the file may be
    torn."""
    if not said.says_targets:
        return
    missing = [name for name in sorted(absent)
               if said.layers[name.removeprefix(BASE) if is_bare else name].is_target]
    if missing:
        log.warning("%s lacks %d of the layers that its config names, such as %s; they stay as they are", file,
                    len(missing), missing[0])
