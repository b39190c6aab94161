"""`StructuredOutput`: the form that an output must have, as the user says it. Plain data; nothing is compiled here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xllm.errors import RequestError

KINDS = ("json", "regex", "choice", "grammar", "structural_tag")
# Of a schema or grammar. Chosen: many times real ones; what takes too long to compile is refused besides.
MAX_SOURCE_BYTES = 256 * 2**10
MAX_DEPTH = 64  # of nested JSON. Chosen: far beyond real schemas, and within the stack of recursive readers
MAX_CHOICES = 4096  # texts of a choice. Chosen: more than a list of labels has
ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """Exactly one of the first five fields is set. Checked for shape and size when made; `checker.py` does the rest.

    json: a JSON schema, as a mapping or as text; "object" for any JSON object. Afterwards its text without blanks.
    regex: what the whole output must match, in the syntax of Rust's `regex` crate.
    choice: the output is one of these texts.
    grammar: context-free, in llguidance's variant of Lark, or in GBNF (`root ::= ...`).
    structural_tag: `{"structures": [{"begin", "schema", "end"}], "triggers": [text]}`: free text, but what follows a
    trigger must be one of the structures that begin with it. Afterwards its text.
    after: the form begins behind the first occurrence of this text (and two line breaks at most); what comes before
    it is free. For models whose prompt ends inside their reasoning.

    Raises:
        RequestError: `.field` is the field of these that is wrong; None where not exactly one is set.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(f"exactly one of {', '.join(KINDS)} must be set, got "
                               f"{' and '.join(given) if given else 'none'}")
        if self.after is not None:
            _check_text("after", self.after)
        name = given[0]
        value = getattr(self, name)
        if name in ("json", "structural_tag"):
            object.__setattr__(self, name, _json_text(name, value))
        elif name == "choice":
            object.__setattr__(self, name, _choices(value))
        else:
            _check_text(name, value)

    @property
    def kind(self) -> str:
        """Which field is set."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def source(self) -> str:
        """The set field as text."""
        value = getattr(self, self.kind)
        return json.dumps(value) if self.kind == "choice" else value


def _json_text(name: str, value: Any) -> str:
    """Compact JSON text of a schema or a structural tag, whichever form it came in."""
    if name == "json" and (value is True or value == "object"):
        return ANY_OBJECT
    if isinstance(value, str):
        _check_text(name, value)
        value = _parse(name, value)
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be a JSON object", field=name)
    _check_depth(name, value)
    try:
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name} cannot be written as JSON: {error}", field=name) from None
    return _check_text(name, text)


def _parse(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise RequestError(f"{name} is nested more than {MAX_DEPTH} deep", field=name) from None
    except ValueError as error:
        raise RequestError(f"{name} is not valid JSON: {error}", field=name) from None


def _check_depth(name: str, value: Any) -> None:
    """Refuse deep nesting without recursion of our own, and what shares its parts so often that its text explodes."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
        _check_size(name, len(level))
    raise RequestError(f"{name} is nested more than {MAX_DEPTH} deep", field=name)


def _children(node: Any) -> list[Any]:
    inside = node.values() if isinstance(node, Mapping) else node if isinstance(node, (list, tuple)) else ()
    return [child for child in inside if isinstance(child, (Mapping, list, tuple))]


def _choices(value: Any) -> tuple[str, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise RequestError("choice must be a list of texts", field="choice")
    if not 0 < len(value) <= MAX_CHOICES:
        raise RequestError(f"choice must have 1 to {MAX_CHOICES} entries, got {len(value)}", field="choice")
    for text in value:
        _check_text("choice", text)
    _check_size("choice", sum(len(text.encode()) for text in value))
    return tuple(dict.fromkeys(value))


def _check_text(name: str, text: Any) -> str:
    if not isinstance(text, str) or not text:
        raise RequestError(f"{name} must be a text that is not empty", field=name)
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{name} is not valid Unicode: it holds a lone surrogate", field=name) from None
    _check_size(name, size_bytes)
    return text


def _check_size(name: str, size_bytes: int) -> None:
    if size_bytes > MAX_SOURCE_BYTES:
        raise RequestError(f"{name} has {size_bytes} bytes, more than {MAX_SOURCE_BYTES}", field=name)
