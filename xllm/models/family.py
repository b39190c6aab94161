"""`Family`: the interface of the modules named in `models/model_registry.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from xllm.models.model_config import ModelConfig
from xllm.models.raw_config import RawConfig

if TYPE_CHECKING:  # they bring torch
    from xllm.layers.layer_context import LayerContext, Weights
    from xllm.models.causal_lm import CausalLM


class Family(Protocol):
    """A kind of model. Importing it must not import torch."""

    DEFAULTS: Mapping[str, Any]  # config.json keys that may be absent

    def read_config(self, raw: RawConfig, architecture: str) -> ModelConfig:
        """The config, of a class that the family may have for itself. Raises ModelError."""
        ...

    def build(self, context: LayerContext, config: ModelConfig, weights: Weights) -> CausalLM:
        """The model that `read_config`'s result describes. Every tensor is taken from `weights`, or skipped.

        Raises:
            ModelError: a tensor is missing or wrong. ConfigError: it cannot be spread or quantised as asked.
        """
        ...
