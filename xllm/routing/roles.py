"""What instances are for: their roles, by upstream's names."""

from __future__ import annotations

from collections.abc import Mapping

ROLES = ("DEFAULT", "PREFILL", "DECODE", "MIX")  # DEFAULT and MIX: all of a request
PREFILLING, DECODING = ("PREFILL", "MIX", "DEFAULT"), ("DECODE", "MIX", "DEFAULT")


def unsuited(roles: Mapping[str, str], *, begins: bool) -> set[str]:
    """The instances, by name, that are there for the other half of a request. begins: nothing of it has been computed;
    else it has output already."""
    suited = PREFILLING if begins else DECODING
    return {name for name, role in roles.items() if role not in suited}
