"""A tree of dataclasses of settings from flat names: `build_tree`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from xllm.errors import ConfigError
from xllm.foreign.table import translate
from xllm.suggestion import nearest


def all_options(tree: type) -> dict[str, tuple[str, dataclasses.Field]]:
    """Every leaf setting of a tree of dataclasses: name -> (name of its group, its field)."""
    found: dict[str, tuple[str, dataclasses.Field]] = {}
    for group in dataclasses.fields(tree):
        for leaf in dataclasses.fields(group.default_factory):  # type: ignore[arg-type]
            assert leaf.name not in found, leaf.name
            found[leaf.name] = (group.name, leaf)
    return found


def build_tree(tree: type, settings: dict[str, Any]) -> Any:
    """Distribute flat settings over the groups of `tree`; see `EngineConfig.from_flat`."""
    options = all_options(tree)
    by_alias = {alias: name for name, (_, f) in options.items() for alias in f.metadata["aliases"]}
    groups: dict[str, dict[str, Any]] = {}
    for given, value in translate(settings, (*options, *by_alias)).items():
        name = by_alias.get(given, given)
        if name not in options:
            guards = {known for known, (_, leaf) in options.items() if leaf.metadata["is_guard"]}
            raise ConfigError(f"unknown setting {given!r}{nearest(given, [*options, *by_alias], never=guards)}")
        group, leaf = options[name]
        choices = leaf.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise ConfigError(f"{given} must be one of {', '.join(choices)}; got {value!r}")
        if leaf.metadata["is_json"] and isinstance(value, dict):
            value = json.dumps(value)
        if name in groups.setdefault(group, {}):
            raise ConfigError(f"{given} and {name} say the same thing: set one of them")
        groups[group][name] = value
    factories: dict[str, Any] = {g.name: g.default_factory for g in dataclasses.fields(tree)}
    return tree(**{name: factories[name](**values) for name, values in groups.items()})
