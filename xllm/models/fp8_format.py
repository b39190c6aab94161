"""`Fp8Format`: what a checkpoint's config.json says of matrices that it holds as fp8. No torch here.

The form is DeepSeek-V3's (2024): float8_e4m3fn, and one scale for each block of 128 x 128 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xllm.errors import ModelError, shortened
from xllm.models.raw_config import MAX_SIZE, RawConfig

KEYS = ("quantization_config", "compression_config")
# Of quantization_config: what each member may be.
CHOICES: dict[str, tuple[object, ...]] = {
    "activation_scheme": ("dynamic", None), "fmt": ("e4m3", "float8_e4m3fn", None),
    "scale_fmt": ("float", "ue8m0", None), "expert_dtype": ("fp8", None), "dequantize": (True, False, None)}
NAMES = ("modules_to_not_convert", "modules_to_convert", "ignored_layers")  # the tensors' own types say the same
SCALE_SUFFIX = "_scale_inv"  # behind the name of a tensor, that of its scales


@dataclass(frozen=True)
class Fp8Format:
    """rows, columns: of a block; the last ones of a matrix may be smaller. dequantise: whether the checkpoint asks not
    to be computed with as it is."""

    rows: int
    columns: int
    dequantise: bool = False

    def is_kept(self, quantization: str | None, takes_scaled_weights: bool) -> bool:
        """Whether matrices stay fp8 in memory, with their own scales.

        quantization: what was asked for. takes_scaled_weights: see `backends.backend.Backend`.
        """
        return takes_scaled_weights and not self.dequantise and quantization in (None, "fp8")


def read_fp8_format(raw: RawConfig) -> Fp8Format | None:
    """None: the checkpoint is not quantised. Raises ModelError, naming the form, for one that is not read."""
    for key in KEYS:
        found = raw.values.get(key)
        if not found:
            continue
        method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
        if key == KEYS[0] and isinstance(found, Mapping) and method == "fp8":
            return _read_blocks(raw, found)
        raise raw.error(f"the checkpoint is quantised ({key}: {shortened(str(method))}), which cannot be read; use the "
                        "unquantised checkpoint, with --quantization fp8 or int8 if memory is short, or one of fp8 in "
                        "blocks")
    return None


def _read_blocks(raw: RawConfig, found: Mapping[str, Any]) -> Fp8Format:
    def wrong(member: str, allowed: str) -> ModelError:
        value = shortened(repr(found.get(member)))
        return raw.error(f"quantization_config: fp8 with {shortened(member)} {value} cannot be read; {allowed}")

    for member, value in found.items():
        if member in CHOICES:
            allowed = CHOICES[member]
            if not any(type(value) is type(choice) and value == choice for choice in allowed):
                raise wrong(member, "only " + " or ".join(repr(choice) for choice in allowed if choice is not None))
        elif member in NAMES:
            if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
                raise wrong(member, "only a list of names")
        elif member not in ("quant_method", "weight_block_size"):
            raise wrong(member, "it is not known")
    block = found.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or any(
            type(size) is not int or not 1 <= size <= MAX_SIZE for size in block):
        raise wrong("weight_block_size", "only the two sizes of a block, such as [128, 128]")
    return Fp8Format(block[0], block[1], dequantise=bool(found.get("dequantize")))
