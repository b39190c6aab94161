"""`ModelConfig`: what a checkpoint's config.json says, read with plain json.

Nothing of a checkpoint folder is ever executed: `auto_map` and any .py file are ignored. Neither
transformers nor torch is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm.errors import ModelError
from xllm.layers.rope_config import RopeConfig, read_rope

CHECKPOINT_DTYPES = ("float32", "bfloat16", "float16")
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. `sliding_windows`: one entry a layer, None for full attention.

    max_model_len: the longest sequence, rope scaling included. checkpoint_dtype: "bfloat16" etc.
    eos_token_ids: of generation_config.json and config.json together.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...]
    max_model_len: int
    checkpoint_dtype: str
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


class RawConfig:
    """The object in config.json, with typed getters that name file and key in their errors.

    `defaults` are the family's: what a key means when it is absent, as transformers has it.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], path: Path):
        self.values = {**defaults, **values}
        self._path = path

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self._path}: {message}")

    def integer(self, key: str, *, high: int = MAX_SIZE) -> int:
        """A whole number in [1, high]."""
        value = self.values.get(key)
        if value is None:
            raise self.error(f"{key!r} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise self.error(f"{key} must be an integer in [1, {high}], got {value!r}")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.integer(key)

    def fraction(self, key: str) -> float:
        """A number in (0, 1]."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise self.error(f"{key} must be a number in (0, 1], got {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, got {value!r}")
        return bool(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or null."""
        value = self.values.get(key)
        token_ids = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise self.error(f"{key} must be token ids, got {token_id!r}")
        return tuple(token_ids)


def read_model_config(path: Path) -> ModelConfig:
    """Read `config.json` (and `generation_config.json` if it is there) of a checkpoint folder.

    Raises:
        ModelError: a file is missing or broken, or the checkpoint is of a kind that is not supported.
    """
    from xllm.models.registry import find_family  # the families import this module

    file = path / "config.json"
    values = read_json(file)
    architecture, family = find_family(values.get("architectures"), file)
    raw = RawConfig(values, family.DEFAULTS, file)
    _check_supported(raw)
    generation = path / "generation_config.json"
    extra_eos: tuple[int, ...] = ()
    if generation.is_file():
        extra_eos = RawConfig(read_json(generation), {}, generation).token_ids("eos_token_id")
    return _read_common(raw, architecture, extra_eos, family.read_traits(raw))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError if there is none."""
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{file} must hold a JSON object")
    return values


def _check_supported(raw: RawConfig) -> None:
    for key in ("quantization_config", "compression_config"):
        if raw.values.get(key):
            kind = raw.values[key]
            method = kind.get("quant_method", "unknown") if isinstance(kind, dict) else kind
            raise raw.error(f"the checkpoint is quantised ({key}: {method}), which cannot be read; use the "
                            "unquantised checkpoint, with --quantization fp8 or int8 if memory is short")
    activation = raw.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise raw.error(f"hidden_act {activation!r} is not supported; only 'silu' is")


def _read_common(raw: RawConfig, architecture: str, extra_eos: tuple[int, ...],
                 traits: Mapping[str, Any]) -> ModelConfig:
    """The fields that all families share, and `traits`, the ones that the family decides."""
    num_heads = raw.integer("num_attention_heads")
    num_kv_heads = raw.optional_integer("num_key_value_heads") or num_heads
    hidden_size = raw.integer("hidden_size")
    head_dim = raw.optional_integer("head_dim") or hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise raw.error(f"num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads ({num_kv_heads})")
    if head_dim % 2 or head_dim < 4:
        raise raw.error(f"head_dim must be even and at least 4, got {head_dim}")
    rope, max_model_len = _read_lengths(raw)
    return ModelConfig(
        architecture=architecture,
        vocab_size=raw.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=raw.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=raw.integer("intermediate_size"),
        rms_norm_eps=raw.fraction("rms_norm_eps"),
        rope=rope,
        tie_word_embeddings=raw.flag("tie_word_embeddings"),
        max_model_len=max_model_len,
        checkpoint_dtype=_read_dtype(raw),
        eos_token_ids=tuple(dict.fromkeys(extra_eos + raw.token_ids("eos_token_id"))),
        bos_token_id=next(iter(raw.token_ids("bos_token_id")), None),
        **traits,
    )


def _read_lengths(raw: RawConfig) -> tuple[RopeConfig, int]:
    max_positions = raw.integer("max_position_embeddings")
    try:
        rope = read_rope(raw.values, max_position_embeddings=max_positions, default_theta=10000.0)
    except ModelError as error:
        raise raw.error(str(error)) from None
    max_model_len = rope.max_model_len(max_positions)
    if not 1 <= max_model_len <= MAX_SIZE:
        raise raw.error(f"rope factor {rope.factor:g} makes the longest sequence {max_model_len} tokens")
    return rope, max_model_len


def _read_dtype(raw: RawConfig) -> str:
    """`dtype` (transformers 5) or `torch_dtype`; float32 where neither is given, as torch itself has it."""
    dtype = raw.values.get("dtype") or raw.values.get("torch_dtype") or "float32"
    name = str(dtype).removeprefix("torch.")
    if name not in CHECKPOINT_DTYPES:
        raise raw.error(f"dtype {dtype!r} is not supported; supported: {', '.join(CHECKPOINT_DTYPES)}")
    return name


def window_per_layer(raw: RawConfig) -> tuple[int | None, ...]:
    """`sliding_windows` by the Qwen rule: `layer_types` where given, else the layers from `max_window_layers` on,
    and in both cases only if `use_sliding_window`."""
    num_layers = raw.integer("num_hidden_layers", high=MAX_LAYERS)
    window = raw.optional_integer("sliding_window") if raw.flag("use_sliding_window") else None
    types = raw.values.get("layer_types")
    if types is None:
        first = raw.values.get("max_window_layers")
        if isinstance(first, bool) or not isinstance(first, int):
            raise raw.error(f"max_window_layers must be an integer, got {first!r}")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise raw.error(f"layer_types must be a list with one entry for each of the {num_layers} layers")
    unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise raw.error(f"layer type {unknown[0]!r} is not supported; supported: full_attention, sliding_attention")
    if window is None and "sliding_attention" in types:
        raise raw.error("layer_types names sliding_attention, but use_sliding_window is off or sliding_window missing")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
