"""All foreign flags by name, and how those that are given are treated."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from xllm.errors import ConfigError
from xllm.foreign.flag import ForeignFlag, text_of
from xllm.foreign.upstream import UPSTREAM_ENGINE, UPSTREAM_SERVER, ranks_of_devices
from xllm.foreign.vllm_engine import VLLM_ENGINE
from xllm.foreign.vllm_server import VLLM_SERVER

logger = logging.getLogger("xllm.settings")


def by_name(*tables: Iterable[ForeignFlag]) -> dict[str, ForeignFlag]:
    found: dict[str, ForeignFlag] = {}
    for table in tables:
        for entry in table:
            assert entry.name not in found, f"{entry.name} has two verdicts"
            found[entry.name] = entry
    return found


ENGINE = by_name(VLLM_ENGINE, UPSTREAM_ENGINE)
SERVER = by_name(VLLM_SERVER, UPSTREAM_SERVER)
FOREIGN = by_name(ENGINE.values(), SERVER.values())


def translate(settings: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """`settings` with only our own names and values. What is ignored is logged, once each.

    own: names and aliases of our settings; these keep their names.
    Raises ConfigError for a refused flag, with its reason, and for two names of one setting.
    """
    known, translated = set(own), {}
    for name, value in settings.items():
        entry = FOREIGN.get(name)
        if name in known:
            translated[name] = entry.values.get(text_of(value), value) if entry else value
        elif entry is None or (entry.verdict == "accepted" and entry.ours is None):
            translated[name] = value  # none of these settings: the caller complains about it
        elif (note := entry.judge(value)) is not None:
            logger.warning("%s", note)
    for name, value in settings.items():
        entry = FOREIGN.get(name)
        if entry is not None and entry.ours is not None and name not in known:
            if entry.ours in translated:
                raise ConfigError(f"{name} and {entry.ours} say the same thing: set one of them")
            try:
                translated[entry.ours] = entry.convert(value)
            except (TypeError, ValueError):
                raise ConfigError(f"{name}: {value!r} is not a value of {entry.ours}") from None
    if (num_ranks := ranks_of_devices(settings)) is not None:
        given = next((name for name in ("tensor_parallel_size", "tp_size") if name in translated), None)
        if given is not None and text_of(translated[given]) != str(num_ranks):
            raise ConfigError(f"devices {settings['devices']} is {num_ranks} ranks, and {given} {translated[given]}")
        translated[given or "tensor_parallel_size"] = num_ranks
    return translated
