"""`AdapterConfig`: PEFT's `adapter_config.json`, each member honoured or refused by name.

Which layers are meant, their ranks and their scales follow `peft.tuners.lora` (0.21). No torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xllm.errors import ModelError

DEFAULT_RANK = DEFAULT_ALPHA = 8  # PEFT's defaults, for a config without them
ALL_LINEAR = "all-linear"
MAX_NUMBER = 1e12  # far beyond any real alpha or rank, and safe to divide
Patterns = list[tuple[re.Pattern[str], float]]
Names = re.Pattern[str] | frozenset[str]

# Members that change what is computed, with the values under which they do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "modules_to_save": (None, []), "bias": ("none", None), "fan_in_fan_out": (False, None),
    "lora_bias": (False, None), "layer_replication": (None, []), "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None), "alora_invocation_tokens": (None, []), "megatron_config": (None,),
    "target_parameters": (None, []), "use_bdlora": (None, False), "arrow_config": (None,), "kasa_config": (None,),
    "velora_config": (None,), "monteclora_config": (None,), "ensure_weight_tying": (False, None),
    "task_type": (None, "CAUSAL_LM", "FEATURE_EXTRACTION"),
}
HONOURED = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
            "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights")
# Of training, of where things came from, or of a member that is refused itself.
HARMLESS = ("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout",
            "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
            "runtime_config")
# Ways to begin a training that leave the base's weights as they are; all others move a part of them into the adapter.
SAFE_STARTS = ("gaussian", "orthogonal", "eva", "mica")


class AdapterConfig:
    """Layers are named as in the model that the adapter was trained on (`model.layers.0.self_attn.q_proj`)."""

    def __init__(self, values: Mapping[str, Any], file: Path):
        """Raises ModelError, naming file and member, for what is not built or cannot be."""
        self._file = file
        self._check_members(values)
        self._check_start(values.get("init_lora_weights", True))
        self._rank = self._whole("r", values.get("r", DEFAULT_RANK))
        self._alpha = self._number("lora_alpha", values.get("lora_alpha", DEFAULT_ALPHA))
        self._ranks = self._patterns("rank_pattern", values.get("rank_pattern"), self._whole)
        self._alphas = self._patterns("alpha_pattern", values.get("alpha_pattern"), self._number)
        self._is_rank_stabilised = values.get("use_rslora")
        if self._is_rank_stabilised not in (None, True, False):
            raise self.error(f"use_rslora must be true or false, got {self._is_rank_stabilised!r}")
        self._targets, self._excluded, self._layers_patterns = (
            self._names(name, values.get(name)) for name in ("target_modules", "exclude_modules", "layers_pattern"))
        self._layers = self._layer_numbers(values.get("layers_to_transform"))
        if isinstance(self._targets, re.Pattern) and (self._layers is not None or self._layers_patterns):
            raise self.error("layers_to_transform and layers_pattern need a list of target_modules, not an expression")

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self._file}: {message}")

    def rank(self, layer: str) -> float:
        """`rank_pattern`, else `r`."""
        return _first_match(self._ranks, layer, self._rank)

    def scale(self, layer: str) -> float:
        """alpha / r, or alpha / sqrt(r) (rsLoRA; Kalajdzievski 2023)."""
        rank = self.rank(layer)
        return _first_match(self._alphas, layer, self._alpha) / (math.sqrt(rank) if self._is_rank_stabilised else rank)

    @property
    def says_targets(self) -> bool:
        """Whether the file names the layers that are adapted; else its tensors alone do."""
        return self._targets is not None

    def targets(self, layer: str) -> bool:
        """Whether PEFT would adapt this linear layer."""
        if self._excluded and _names_layer(self._excluded, layer):
            return False
        if self._targets is None:
            return True
        if not _names_layer(self._targets, layer):
            return False
        if isinstance(self._targets, re.Pattern) or layer in self._targets or self._layers is None:
            return True
        found = self._number_of(layer)
        return found is not None and found in self._layers

    def _number_of(self, layer: str) -> int | None:
        """The number behind the first of `layers_pattern` that is in the name; without patterns, the first number."""
        patterns = self._layers_patterns
        if not patterns:
            expressions = [r".*?\.[^.]*\.(?P<number>\d+)\."]
        else:
            listed = (patterns.pattern,) if isinstance(patterns, re.Pattern) else patterns
            expressions = [rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\." for pattern in listed]
        for expression in expressions:
            if match := self._compiled("layers_pattern", expression).match(layer):
                return int(match["number"])
        return None

    def _check_members(self, values: Mapping[str, Any]) -> None:
        if values.get("peft_type", "LORA") != "LORA":
            raise self.error(f"peft_type {values['peft_type']!r}; only LORA is built")
        for name, value in values.items():
            if name in REFUSED:
                if value not in REFUSED[name]:
                    raise self.error(f"{name} {value!r} is not built")
            elif name not in HONOURED and name not in HARMLESS and value not in (None, False, [], {}):
                raise self.error(f"unknown member {name!r} ({value!r}); it may change what the adapter computes")

    def _check_start(self, start: Any) -> None:
        if start is None or isinstance(start, bool) or (isinstance(start, str) and start.lower() in SAFE_STARTS):
            return
        raise self.error(f"init_lora_weights {start!r} is not built: such a training changes the base's weights too; "
                         "save the adapter with path_initial_model_for_weight_conversion")

    def _patterns(self, name: str, value: Any, read: Callable[[str, Any], float]) -> Patterns:
        if value is not None and not isinstance(value, dict):
            raise self.error(f"{name} must be an object, got {value!r}")
        return [(self._compiled(name, rf"(.*\.)?({key})$"), read(f"{name}.{key}", number))
                for key, number in (value or {}).items()]

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
            raise self.error(f"{name} must be a number within {MAX_NUMBER:g} of zero, got {value!r}")
        return value

    def _whole(self, name: str, value: Any) -> float:
        if type(value) is not int or not 1 <= value <= MAX_NUMBER:
            raise self.error(f"{name} must be a whole number in [1, {MAX_NUMBER:g}], got {value!r}")
        return value

    def _names(self, name: str, value: Any) -> Names | None:
        """An expression for the whole name, or names that a layer's name may end with."""
        if value is None:
            return None
        if isinstance(value, str):
            return self._compiled(name, ".*" if name == "target_modules" and value.lower() == ALL_LINEAR else value)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{name} must be a text or a list of texts, got {value!r}")
        return frozenset(value)

    def _layer_numbers(self, value: Any) -> frozenset[int] | None:
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(number) is not int for number in numbers):
            raise self.error(f"layers_to_transform must be numbers of layers, got {value!r}")
        return frozenset(numbers) or None

    def _compiled(self, name: str, expression: str) -> re.Pattern[str]:
        try:
            return re.compile(expression)
        except re.error as error:
            raise self.error(f"{name}: {expression!r} is no regular expression: {error}") from None


def _first_match(patterns: Patterns, layer: str, default: float) -> float:
    """Each key is a regular expression for the whole name, or for its end from a dot on; the first that fits counts."""
    return next((value for pattern, value in patterns if pattern.match(layer)), default)


def _names_layer(names: Names, layer: str) -> bool:
    if isinstance(names, re.Pattern):
        return names.fullmatch(layer) is not None
    parts = layer.split(".")
    return any(".".join(parts[first:]) in names for first in range(len(parts)))
