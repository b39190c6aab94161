"""`option`: a field of the settings' dataclasses, with what the command line and the docs say of it."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, *, aliases: tuple[str, ...] = (), choices: tuple[str, ...] = (),
           is_json: bool = False, is_guard: bool = False) -> Any:
    """A dataclass field with what the command line needs. `aliases`: other engines' names for it. is_json: the text of
    a JSON object; in Python a dict will do. is_guard: it decides who may use the server, or what input of strangers
    may do; never suggested for a mistyped name."""
    return field(default=default, metadata={"help": help, "aliases": aliases, "choices": choices, "is_json": is_json,
                                            "is_guard": is_guard})
