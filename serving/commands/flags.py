"""Command-line flags made from the config dataclasses.

A field `max_num_seqs` becomes `--max-num-seqs`; its aliases work too, `_` and `-` mean the same, and a
boolean takes `--x`, `--no-x`, `--x=true` and `--x=false`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from xllm.errors import ConfigError
from xllm.foreign.flag import ForeignFlag
from xllm.foreign.table import FOREIGN
from xllm.setting_tree import all_options, build_tree
from xllm.suggestion import nearest

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
SPECULATIVE_KEYS = {"method": "speculative_method", "num_speculative_tokens": "num_speculative_tokens",
                    "prompt_lookup_max": "prompt_lookup_max", "prompt_lookup_min": "prompt_lookup_min"}


class FlagParser(argparse.ArgumentParser):
    """argparse that names the nearest flag when one is unknown, and reads flags in either spelling."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.booleans: set[str] = set()
        self.never_suggested: set[str] = set()
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        self._given = self._normalise(given)
        parsed, rest = super().parse_known_args(self._given, namespace)
        if any(word.startswith("--") for word in rest):
            self.error("unknown flag")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        """Report an unknown flag first, before what it led to, such as a required one that is missing."""
        name = self._unknown_flag()
        if name is not None:
            message = f"unknown flag {name}{self._hint(name)}"
        elif message.startswith("unrecognized arguments"):
            message += "; a flag with several values is given once for each"
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _hint(self, name: str) -> str:
        whole, dot, _ = name.partition(".")
        if dot and whole in self._option_string_actions:
            return f"; give {whole} one JSON object"
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        return nearest(name, known, never=self.never_suggested)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = nearest(value, choices) if isinstance(value, str) else ""
            raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(choices)}{hint}")

    def _unknown_flag(self) -> str | None:
        for word in self._given:
            # After the command's name the flags are for its own parser.
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return None
            name = word.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                return name
        return None

    def _normalise(self, args: Sequence[str]) -> list[str]:
        out: list[str] = []
        for index, word in enumerate(args):
            if word == "--":
                return out + list(args[index:])
            if not word.startswith("--"):
                if out and out[-1] in self.booleans and word.lower() in ("true", "false"):
                    word = out.pop() + "=" + word
                else:
                    out.append(word)
                    continue
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            if equals and name in self.booleans:
                out.append(self._boolean(name, value))
            else:
                out.append(name + equals + value)
        return out

    def _boolean(self, name: str, value: str) -> str:
        if value.lower() not in _BOOLEANS:
            self.error(f"{name} takes true or false, got {value!r}")
        return name if _BOOLEANS[value.lower()] else "--no-" + name[2:]


def add_flags(parser: FlagParser, tree: type, *, skip: Sequence[str] = ()) -> None:
    """Add one flag per leaf of `tree`, grouped as the tree is. Absent flags stay absent from the namespace."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    types = leaf_types(tree)
    for name, (group_name, leaf) in all_options(tree).items():
        if name in skip:
            continue
        if group_name not in groups:
            groups[group_name] = parser.add_argument_group(f"{group_name} settings")
        _add_flag(parser, groups[group_name], name, leaf, types[name])


def leaf_types(tree: type) -> dict[str, Any]:
    """Name -> resolved type of every leaf setting."""
    found: dict[str, Any] = {}
    for group in dataclasses.fields(tree):
        factory: Any = group.default_factory
        hints = typing.get_type_hints(factory)
        found.update({leaf.name: hints[leaf.name] for leaf in dataclasses.fields(factory)})
    return found


def default_text(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _add_flag(parser: FlagParser, group: argparse._ArgumentGroup, name: str, leaf: dataclasses.Field,
              hint: Any) -> None:
    flags = ["--" + spelling.replace("_", "-") for spelling in (name, *leaf.metadata["aliases"])]
    if leaf.metadata["is_guard"]:
        parser.never_suggested.update(flags + ["--no-" + flag[2:] for flag in flags])
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    help_text = f"{leaf.metadata['help']} (default: {default_text(leaf.default)})".replace("%", "%%")
    scalars = [t for t in (typing.get_args(hint) or (hint,)) if t is not type(None)]
    if bool in scalars:
        parser.booleans.update(flags)
        group.add_argument(*flags, action="store_true", help=help_text, **options)
        group.add_argument(*("--no-" + flag[2:] for flag in flags), action="store_false", help=argparse.SUPPRESS,
                           **options)
    elif typing.get_origin(hint) is tuple:
        group.add_argument(*flags, action="append", help=help_text, metavar="TEXT", **options)
    else:
        kinds: dict[type, Callable[[str], Any]] = {int: parse_int, float: float}
        kind = kinds.get(scalars[0], str)
        choices = leaf.metadata["choices"] or None
        if (foreign := FOREIGN.get(name)) is not None:
            flags += foreign.short
            if words := foreign.values:
                kind = lambda text: words.get(text, text)  # noqa: E731
        group.add_argument(*flags, type=kind, choices=choices, help=help_text,
                           metavar=None if choices else scalars[0].__name__.upper(), **options)


def add_foreign_flags(parser: FlagParser, table: Mapping[str, ForeignFlag]) -> None:
    """The flags of other engines that are not names of ours: taken here as they come, judged by `build_tree`. After
    `add_flags`. They are not in the help, and only those that set something are suggested."""
    for name, entry in table.items():
        if entry.flag in parser._option_string_actions:
            continue
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if entry.takes == "switch":
            parser.booleans.add(entry.flag)
            parser.add_argument(entry.flag, *entry.short, action="store_const", const="true", **options)
            parser.add_argument("--no-" + entry.flag[2:], action="store_const", const="false", **options)
        else:
            parser.add_argument(entry.flag, *entry.short, nargs="*" if entry.takes == "list" else None, **options)
        if entry.ours is None or "--" + entry.ours.replace("_", "-") in parser.never_suggested:
            parser.never_suggested.update((entry.flag, "--no-" + entry.flag[2:]))


def parse_int(text: str) -> int:
    """An integer; `k`, `m` and `g` at the end mean powers of 1024, as in `8g`."""
    scale = {"k": 2**10, "m": 2**20, "g": 2**30}.get(text[-1:].lower(), 0)
    try:
        return int(text[:-1]) * scale if scale else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def tree_from(namespace: argparse.Namespace, tree: type, foreign: Collection[str] = ()) -> Any:
    """Build `tree` from the flags that were given, those in `foreign` too. Raises ConfigError."""
    own = all_options(tree)
    given = {name: value for name, value in vars(namespace).items() if name in own or name in foreign}
    return build_tree(tree, {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def flags_of(namespace: argparse.Namespace, tree: type) -> list[str]:
    """The words that give the settings of `tree` in the namespace once more."""
    words: list[str] = []
    for name in all_options(tree):
        if name in vars(namespace):
            value, flag = getattr(namespace, name), name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}={one}" for one in (value if isinstance(value, list | tuple) else [value])]
    return words


def apply_speculative_config(namespace: argparse.Namespace) -> None:
    """Spread vLLM's `--speculative-config` JSON over the flat settings. Raises ConfigError."""
    text = vars(namespace).pop("speculative_config", None)
    if text is None:
        return
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"speculative_config is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError("speculative_config must be a JSON object")
    for key, value in settings.items():
        if key not in SPECULATIVE_KEYS:
            raise ConfigError(f"speculative_config: unknown key {key!r}{nearest(key, list(SPECULATIVE_KEYS))}")
        if isinstance(value, bool) or not isinstance(value, str if key == "method" else int):
            raise ConfigError(f"speculative_config: {key} has the wrong type: {value!r}")
        setattr(namespace, SPECULATIVE_KEYS[key], value)
