"""Reads the files of a checkpoint's folder within bounds: a checkpoint may come from a stranger. No torch here."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from xllm.errors import ModelError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_JSON_BYTES = 2**25  # chosen: the largest in use, indices of hundreds of shards, have 10 MB
MAX_TEXT_BYTES = 2**22  # of a chat template. Chosen: the largest in use have some tens of KB
MAX_TOKENIZER_BYTES = 2**28  # chosen: the largest in use have 35 MB


def read_bounded(file: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """What is in a regular file. Raises ModelError, naming the file: it is not there, cannot be read, is larger than
    `max_bytes` or is a pipe, a device or the like, which may never end."""
    check_size(file, max_bytes)
    try:
        with file.open("rb") as opened:
            content = opened.read(max_bytes + 1)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    if len(content) > max_bytes:
        raise _too_large(file, max_bytes)
    return content


def check_size(file: Path, max_bytes: int) -> None:
    """Raise ModelError as `read_bounded` does, for a file that a library reads."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{file} cannot be read: it is no regular file")
    if found.st_size > max_bytes:
        raise _too_large(file, max_bytes)


def is_there(file: Path) -> bool:
    """Whether the name exists, even as a link to nothing: what exists is read or refused, never ignored."""
    return os.path.lexists(file)


def read_text(file: Path) -> str:
    """Raises ModelError as `read_bounded` does, and for what is not UTF-8."""
    try:
        return read_bounded(file, MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not valid UTF-8: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError as `read_bounded` does, and if there is none."""
    return as_object(file, read_bounded(file))


def as_object(file: Path, content: bytes) -> dict[str, Any]:
    """The JSON object `content`, which was read from `file`. Raises ModelError."""
    values = as_json(file, content)
    if not isinstance(values, dict):
        raise ModelError(f"{file} must hold a JSON object")
    return values


def as_json(file: Path, content: bytes) -> Any:
    """The JSON value `content`, which was read from `file`. Raises ModelError for what is no JSON, for text that is no
    Unicode, and for two values of one member."""
    def pairs(members: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in members:
            if name in found and found[name] != value:
                raise ModelError(f"{file}: {name!r} is there twice, with two values")
            found[name] = value
        return found

    try:
        return json.loads(content, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file} is not valid JSON: {error}") from None


def _too_large(file: Path, max_bytes: int) -> ModelError:
    return ModelError(f"{file} is larger than {max_bytes} bytes; no such file is")
