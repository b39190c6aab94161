"""`ForeignFlag`: what xLLM does with one flag of another engine's server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from xllm.errors import ConfigError

Verdict = Literal["accepted", "ignored", "refused"]
Takes = Literal["value", "switch", "list"]


@dataclass(frozen=True, kw_only=True)
class ForeignFlag:
    """name: with underscores, as a setting. note: what differs (accepted), why nothing is lost (ignored), why not and
    what to do instead (refused). ours: the setting that it sets under another name, by `convert`. values: other words
    for values of our setting. unless: values that are taken although the flag is refused, because they ask for what is
    done anyway. only: the values that an ignored flag may have; others are refused. takes: a switch is `--x` and
    `--no-x`, with the values "true" and "false"; a list takes several values after one flag."""

    name: str
    verdict: Verdict
    note: str = ""
    ours: str | None = None
    convert: Callable[[Any], Any] = lambda value: value
    unless: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    takes: Takes = "value"
    short: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def judge(self, value: Any) -> str | None:
        """What is to be told when it is given with this value; None: nothing. Raises ConfigError if it is refused."""
        text = text_of(value)
        if self.verdict == "refused" and text not in self.unless:
            taken = f" ({', '.join(word or 'an empty text' for word in self.unless)} is taken)" if self.unless else ""
            raise ConfigError(f"{self.name} is not supported: {self.note}{taken}")
        if self.only and text not in self.only:
            raise ConfigError(f"{self.name} {text} is not supported: {self.note}")
        return f"{self.name} is ignored: {self.note}" if self.verdict == "ignored" else None


def text_of(value: Any) -> str:
    """A value as the command line spells it, so that Python's `True` and `None` are judged as `true` and `none`."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def accepted(name: str, note: str = "", **more: Any) -> ForeignFlag:
    """Our setting of that name (or alias) means the same, but for what `note` says."""
    return ForeignFlag(name=name, verdict="accepted", note=note, **more)


def sets(name: str, ours: str, note: str = "", **more: Any) -> ForeignFlag:
    """It sets `ours`, whose values are spelled otherwise (`convert`)."""
    return ForeignFlag(name=name, verdict="accepted", note=note, ours=ours, **more)


def ignored(name: str, note: str, **more: Any) -> ForeignFlag:
    """A flag without effect, since answers are the same without it; its note is logged once."""
    return ForeignFlag(name=name, verdict="ignored", note=note, **more)


def refused(name: str, note: str, **more: Any) -> ForeignFlag:
    """A flag that ends the start, because the engine would do something other than it asks for."""
    return ForeignFlag(name=name, verdict="refused", note=note, **more)


def refused_switch(name: str, note: str) -> ForeignFlag:
    """A refused switch; `--no-x` asks for what is done anyway."""
    return refused(name, note, takes="switch", unless=("false",))


def always_on(name: str, note: str) -> ForeignFlag:
    """A switch for what is always so here: `--x` is told, `--no-x` refused."""
    return ignored(name, note, takes="switch", only=("true",))


def ignored_switch(name: str, note: str) -> ForeignFlag:
    return ignored(name, note, takes="switch")
