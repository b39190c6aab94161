"""Schemas of the emulated operators in two versions of torch_npu, kept in schemas.json.

Of the installed wheel they come from the dispatcher, of an older one from the strings in its libraries, which need not
be loaded. In an emulated process `python -m tests.emulated_npu.schemas 2.10.0.post4 FOLDER/lib/*.so` writes both.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

FILE = Path(__file__).with_name("schemas.json")
SCHEMA = re.compile(
    rb"(?:(?:npu|atb)::)?(_?[a-z][a-z0-9_]*(?:\.[A-Za-z_]+)?)\([^()\0]*(?:\([a-z]!?\)[^()\0]*)*\) -> [ -~]+"
)


def known() -> dict[str, dict[str, str | None]]:
    """By version and operator; None: that version does not have it."""
    found: dict[str, dict[str, str | None]] = json.loads(FILE.read_text())
    return found


def from_dispatcher() -> dict[str, str | None]:
    from tests.emulated_npu.operators.registry import names, overload

    return {name: str(overload(name)._schema) for name in names()}


def from_libraries(files: Iterable[Path], wanted: Iterable[str]) -> dict[str, str | None]:
    """The schemas in libraries' strings, in torch's own spelling."""
    strings: dict[str, str] = {}
    for file in files:
        for match in SCHEMA.finditer(file.read_bytes()):
            strings.setdefault(match[1].decode(), match[0].decode().split("::")[-1])
    found: dict[str, str | None] = {}
    for name in wanted:
        namespace, rest = name.split("::")
        text = strings.get(rest)
        found[name] = str(torch._C.parse_schema(f"{namespace}::{text}")) if text else None
    return found


def main(version: str, *libraries: str) -> None:
    import torch_npu

    now = from_dispatcher()
    then = from_libraries(map(Path, libraries), now)
    FILE.write_text(json.dumps({torch_npu.__version__: now, version: then}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
