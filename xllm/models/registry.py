"""Which architectures are known, and the module that knows each. Closed, and imported lazily."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from xllm.config import nearest
from xllm.errors import ModelError

if TYPE_CHECKING:
    from xllm.models.config import RawConfig

FAMILIES = {
    "LlamaForCausalLM": "xllm.models.llama",
    "MistralForCausalLM": "xllm.models.mistral",
    "Qwen2ForCausalLM": "xllm.models.qwen2",
    "Qwen3ForCausalLM": "xllm.models.qwen3",
}


class Family(Protocol):
    """What a module named in `FAMILIES` has. Importing it must not import torch."""

    DEFAULTS: Mapping[str, Any]  # config.json keys that may be absent

    def read_traits(self, raw: RawConfig) -> dict[str, Any]:
        """The fields of ModelConfig that the family decides: biases, norms, sliding windows."""
        ...


def find_family(architectures: object, file: Path) -> tuple[str, Family]:
    """The first known architecture in a config.json's list, and its module.

    Raises:
        ModelError: none is known; lists those that are, with the nearest name.
    """
    named = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    for name in named:
        if name in FAMILIES:
            return name, cast(Family, importlib.import_module(FAMILIES[name]))
    known = ", ".join(FAMILIES)
    if not named:
        raise ModelError(f"{file}: 'architectures' is missing or empty; known architectures: {known}")
    raise ModelError(f"{file}: architecture {named[0]!r} is not supported; known: {known}"
                     f"{nearest(named[0], list(FAMILIES))}")
