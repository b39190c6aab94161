"""`RopeConfig`: how positions become angles, as read from a checkpoint's config. No torch here.

Two layouts are read: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters`
(transformers 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xllm.errors import ModelError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
COMMON_MEMBERS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
MEMBERS = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate", "finetuned"),  # the last says how the weights came to be, and no more
}
MAX_NUMBER = 1e12  # far beyond any real theta or factor, and safe to multiply in a float


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One rotary embedding. Fields below `factor` matter to the types named beside them.

    original_max_len: the longest sequence of pre-training, before any scaling.
    attention_factor: multiplies cos and sin (yarn). score_factor: multiplies the scores besides, in latent attention
    alone, whose heads are rotated in part. rotated_share: how much of each head is rotated, from its first number on.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_len: int
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn
    score_factor: float = 1.0  # yarn with mscale_all_dim
    rotated_share: float = 1.0

    def max_model_len(self, max_position_embeddings: int) -> int:
        """The longest sequence the checkpoint is meant for, as vLLM derives it.

        linear and dynamic stretch `max_position_embeddings`, yarn the original length; llama3
        checkpoints already state the stretched length.
        """
        if self.rope_type in ("linear", "dynamic"):
            return int(max_position_embeddings * self.factor)
        if self.rope_type == "yarn":
            return int(self.original_max_len * self.factor)
        return max_position_embeddings

    def rotated_dim(self, head_dim: int) -> int:
        return int(head_dim * self.rotated_share)

    def exact_len(self, max_model_len: int) -> int:
        """Up to where a token's rotation depends on its position alone. With `dynamic`, beyond the original length it
        depends on how many tokens follow: with transformers, on the length of the prompt."""
        return self.original_max_len if self.rope_type == "dynamic" else max_model_len


def read_rope(values: Mapping[str, Any], *, max_position_embeddings: int, default_theta: float,
              may_be_partial: bool = False) -> RopeConfig:
    """The rotary embedding that a config.json describes. may_be_partial: the model can rotate a part of each head.

    Raises:
        ModelError: the type is unknown or not supported, or a field is missing or out of range.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"rope_parameters must be an object, got {rope!r}")
    check_members(rope)
    rope = {"rope_theta": values.get("rope_theta"), "partial_rotary_factor": values.get("partial_rotary_factor"), **{
        key: value for key, value in rope.items() if value is not None}}
    _check_supported(rope)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    theta = _number(rope, "rope_theta", default=default_theta, low=1.001)
    original = values.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if rope_type not in ("llama3", "yarn") or original is None:
        original = max_position_embeddings
    if isinstance(original, bool) or not isinstance(original, int) or not 1 <= original <= MAX_NUMBER:
        raise ModelError(f"original_max_position_embeddings must be a positive integer up to {MAX_NUMBER:g}, got "
                         f"{original!r}")
    common = {"rope_type": rope_type, "theta": theta, "original_max_len": original,
              "rotated_share": _rotated_share(rope, may_be_partial)}
    if rope_type == "default":
        return RopeConfig(**common)
    if rope_type == "yarn":
        return _read_yarn(rope, common, default_factor=max_position_embeddings / original)
    factor = _number(rope, "factor")
    if rope_type == "llama3":
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        if high <= low:
            raise ModelError(f"rope high_freq_factor ({high}) must be larger than low_freq_factor ({low})")
        return RopeConfig(**common, factor=factor, low_freq_factor=low, high_freq_factor=high)
    return RopeConfig(**common, factor=factor)


def check_members(rope: Mapping[str, Any]) -> None:
    """Raise ModelError for a member that the rope type does not use, or that is unknown."""
    _check_supported(rope)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    used = (*COMMON_MEMBERS, *MEMBERS[rope_type])
    for key, value in rope.items():
        if key not in used and value is not None:
            raise ModelError(f"rope type {rope_type!r} has no {key!r} (got {value!r}); it has {', '.join(used)}")
    if not isinstance(rope.get("truncate", True), bool):
        raise ModelError(f"rope truncate must be true or false, got {rope['truncate']!r}")


def _check_supported(rope: Mapping[str, Any]) -> None:
    nested = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise ModelError(f"a rotary embedding per layer type ({', '.join(nested)}) is not supported")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ModelError(f"rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")


def _rotated_share(rope: Mapping[str, Any], may_be_partial: bool) -> float:
    share = _number(rope, "partial_rotary_factor", default=1.0)
    if share > 1 or (share != 1 and not may_be_partial):
        raise ModelError(f"partial_rotary_factor {share!r} is not supported; only whole heads are rotated"
                         if share <= 1 else f"partial_rotary_factor {share!r} is more than 1")
    return share


def _read_yarn(rope: Mapping[str, Any], common: Mapping[str, Any], *, default_factor: float) -> RopeConfig:
    """YaRN (Peng et al., 2023): the attention factor is 0.1 ln(factor) + 1 unless the config says otherwise."""
    factor = _number(rope, "factor", default=default_factor)
    mscale, mscale_all = (_number(rope, key, default=0.0, low=0.0) for key in ("mscale", "mscale_all_dim"))
    attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all) if mscale and mscale_all \
        else _mscale(factor, 1.0)
    return RopeConfig(
        **common,
        factor=factor,
        attention_factor=_number(rope, "attention_factor", default=attention_factor),
        beta_fast=_number(rope, "beta_fast", default=32.0),
        beta_slow=_number(rope, "beta_slow", default=1.0),
        truncate=bool(rope.get("truncate", True)),
        score_factor=_mscale(factor, mscale_all) ** 2,
    )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _number(rope: Mapping[str, Any], key: str, *, default: float | None = None, low: float = 1e-9) -> float:
    value = rope.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"rope type {rope.get('rope_type', rope.get('type'))!r} needs {key!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= MAX_NUMBER:
        raise ModelError(f"rope {key} must be a number in [{low}, {MAX_NUMBER:g}], got {value!r}")
    return float(value)
