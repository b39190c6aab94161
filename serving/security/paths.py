"""Keeps paths that come from outside inside a folder, and paths of this machine out of what is sent."""

from __future__ import annotations

import os
import re
from pathlib import Path

from xllm.errors import RequestError

_TOKEN = r"[^\s'\"`<>|*?,;:()\[\]{}]+"
_WINDOWS = r"[A-Za-z]:\\" + _TOKEN
_RELATIVE = rf"(?:~|\.{{1,2}})/{_TOKEN}"
_FILE_URL = rf"file:/*{_TOKEN}"


def hide_paths(text: str) -> str:
    """The text with every path of this machine cut down to its last part. Paths of our own URLs stay: what begins with
    a folder that stands in the file system's root is no route."""
    return re.sub(rf"{_FILE_URL}|(?<![\w.~])(?:{_WINDOWS}|{_RELATIVE}|/{_TOKEN})", _shortened, text)


def _shortened(match: re.Match[str]) -> str:
    found = match[0]
    trimmed = found.rstrip("./!")
    if found.startswith("/"):
        first = trimmed.lstrip("/").partition("/")[0]
        if not first or not os.path.lexists("/" + first):
            return found
    return re.split(r"[/\\]", trimmed)[-1] + found[len(trimmed):]


def contained(root: Path, name: str) -> Path:
    """`name` below `root`, symbolic links resolved. Raises RequestError if it leads out, is absolute, or is not there.

    The two failures read the same, so that nobody learns what lies outside.
    """
    refusal = RequestError("there is no such file in the folder that this server allows")
    if not name or "\0" in name or "\\" in name or os.path.isabs(name):
        raise refusal
    try:
        base = root.resolve(strict=True)
        path = (base / name).resolve(strict=True)
    except (OSError, RuntimeError):  # not there, or links in a circle
        raise refusal from None
    if not path.is_relative_to(base):
        raise refusal
    return path
