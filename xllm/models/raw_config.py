"""`RawConfig`: the object in a checkpoint's JSON file, with typed getters. No torch here.

Nothing of a checkpoint folder is ever executed: `auto_map` and any .py file are ignored.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm.errors import ModelError

MAX_SIZE = 2**31 - 1  # the largest int32: sizes and positions are int32 on the device
MAX_NUMBER = 1e12  # far beyond any real factor, and safe to multiply in a float


class RawConfig:
    """The object in config.json, with typed getters that name file and key in their errors.

    `defaults` are the family's: what a key means when it is absent, as transformers has it.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], path: Path):
        self.values: Mapping[str, Any] = ChainMap(values, defaults)  # type: ignore[arg-type]  # nobody writes to it
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

    def whole(self, key: str, *, high: int = MAX_SIZE) -> int:
        """A whole number in [0, high]; 0 where it is missing or null."""
        value = self.values.get(key)
        return 0 if value is None or (value == 0 and not isinstance(value, bool)) else self.integer(key, high=high)

    def optional_integer(self, key: str, *, high: int = MAX_SIZE) -> int | None:
        return None if self.values.get(key) is None else self.integer(key, high=high)

    def fraction(self, key: str) -> float:
        """A number in (0, 1]."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise self.error(f"{key} must be a number in (0, 1], got {value!r}")
        return float(value)

    def number(self, key: str) -> float:
        """A finite number above zero."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_NUMBER:
            raise self.error(f"{key} must be a number in (0, {MAX_NUMBER:g}], got {value!r}")
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
