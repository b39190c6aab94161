"""How the numbers of a stats struct are shown: a field says so once, where it stands, and `/metrics`, `/v1/stats` and
the live views follow.

    num_running: int = gauge(0, "num_requests_running", "Sequences that run")
    prefetched_total: dict[str, int] = counter(dict, "kv_prefetched_blocks", "Blocks brought back", by="outcome")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
MetricKind = Literal["gauge", "counter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One attribute.

    name: of its family in `/metrics`, without prefix and `_total`; empty: none. key: its member of `/v1/stats`; empty:
    none. label: what the keys of a dict are, or the places of a list; of a dict of structs, each number in them is a
    family with that label. only: an attribute of the same struct; while it is empty there is no family. older: a second
    name of the family. part: the struct that the attribute is, or that its values are.
    """

    kind: MetricKind = "gauge"
    name: str = ""
    text: str = ""
    key: str = ""
    label: str = ""
    only: str = ""
    older: str = ""
    part: type | None = None


def gauge(default: Any, name: str, text: str, *, by: str = "", key: str | None = None, only: str = "",
          older: str = "") -> Any:
    """A dataclass field that goes up and down. default: a value, or the type of an empty one (`dict`, `list`). by: see
    `Shown.label`. key: None is `name`, or nothing where there is a label. An attribute that is None has no family."""
    return _field(default, _shown("gauge", name, text, by, key, only, older))


def counter(default: Any, name: str, text: str, *, by: str = "", key: str | None = None, only: str = "") -> Any:
    """As `gauge`, of a total."""
    return _field(default, _shown("counter", name, text, by, key, only))


def stat(default: Any, key: str) -> Any:
    """A field that `/v1/stats` shows and `/metrics` does not."""
    return _field(default, Shown(key=key))


def part(default: Any, struct: type, key: str, *, by: str = "") -> Any:
    """A field that is a struct of its own, or with `by` a dict of them; `/v1/stats` shows it as it is."""
    return _field(default, Shown(key=key, label=by, part=struct))


def derived(kind: MetricKind, name: str, text: str, *, by: str = "") -> Callable[[F], F]:
    """Below `@property`: what follows from other fields has a family too, and none while it is None."""
    def mark(function: F) -> F:
        function.shown = _shown(kind, name, text, by, "")  # type: ignore[attr-defined]
        return function
    return mark


@cache
def shown_in(struct: type) -> dict[str, Shown]:
    """The attributes of a struct that are shown: fields, then properties."""
    found = {f.name: f.metadata["shown"] for f in fields(struct) if "shown" in f.metadata}
    for name, value in vars(struct).items():
        if isinstance(value, property) and (shown := getattr(value.fget, "shown", None)) is not None:
            found[name] = shown
    return found


def _shown(kind: MetricKind, name: str, text: str, by: str, key: str | None, only: str = "", older: str = "") -> Shown:
    return Shown(kind=kind, name=name, text=text, key=("" if by else name) if key is None else key, label=by, only=only,
                 older=older)


def _field(default: Any, shown: Shown) -> Any:
    if isinstance(default, type):
        return field(default_factory=default, metadata={"shown": shown})
    return field(default=default, metadata={"shown": shown})
