"""`parse_object`: a setting that is the text of a JSON object."""

from __future__ import annotations

import json
from typing import Any

from xllm.errors import ConfigError


def parse_object(name: str, text: str | None) -> dict[str, Any] | None:
    """What a setting that is a JSON object says. Raises ConfigError."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object, got {text[:80]}")
    return value
