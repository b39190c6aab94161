"""Members of the objects within a request: known ones, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from serving.api.errors import invalid
from xllm.suggestion import nearest


def check_members(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise ApiError for a member of the object at path `where` that is not known and not null."""
    if unknown := sorted(str(name) for name, value in given.items() if name not in known and value is not None):
        name = unknown[0][:64]
        raise invalid(f"{where}.{name}: unknown member{nearest(name, list(known))}", where.partition(".")[0])


def check_values(given: Mapping[str, Any], values: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Raise ApiError for a member that asks for what is not built. values: of each such member those that ask for
    nothing; null is always one."""
    for name, accepted in values.items():
        if (value := given.get(name)) is not None and value not in accepted:
            raise invalid(f"{where}.{name}: {str(value)[:64]!r} is not supported", where.partition(".")[0])
