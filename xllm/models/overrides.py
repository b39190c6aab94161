"""`Overrides`: members of config.json that the settings `hf_overrides` and `rope_scaling` replace.

No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from xllm.errors import ConfigError, ModelError
from xllm.layers.rope_config import check_members

KEPT_OF_ROPE = ("rope_theta", "partial_rotary_factor")  # they are not of the scaling


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """members: merged into config.json, objects member by member; null takes a member's value away. rope_scaling:
    stands instead of the file's own, whose `rope_theta` stays unless this has one."""

    members: Mapping[str, Any] = field(default_factory=dict)
    rope_scaling: Mapping[str, Any] | None = None

    def __bool__(self) -> bool:
        return bool(self.members) or self.rope_scaling is not None

    def apply(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Raises ConfigError for a rope_scaling whose members do not belong together."""
        merged, scaling = _merged(values, self.members), self.rope_scaling
        if scaling is None and values.get("rope_parameters") and isinstance(self.members.get("rope_scaling"), Mapping):
            scaling = self.members["rope_scaling"]  # the older name, over a file of the newer layout
        if scaling is None:
            return merged
        try:
            check_members(scaling)
        except ModelError as error:
            raise ConfigError(f"rope_scaling: {error}") from None
        own = merged.get("rope_parameters") or merged.get("rope_scaling")
        kept = {key: own[key] for key in KEPT_OF_ROPE if isinstance(own, Mapping) and key in own}
        return {**merged, "rope_scaling": None, "rope_parameters": {**kept, **scaling}}

    def check_used(self, read: ReadMembers, architecture: str) -> None:
        """Raise ConfigError for a member that was never read: it would change nothing."""
        unused = [key for key in self.members if key not in read.asked_for]
        if unused:
            raise ConfigError(f"hf_overrides: {unused[0]!r} is no member of config.json that {architecture} reads")

    @property
    def flags(self) -> str:
        """Which of the settings are given."""
        given = {"hf_overrides": bool(self.members), "rope_scaling": self.rope_scaling is not None}
        return " and ".join(name for name, is_given in given.items() if is_given)


class ReadMembers(Mapping[str, Any]):
    """A mapping that remembers which keys it was asked for."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values
        self.asked_for: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked_for.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Objects that both have are merged, all else is replaced."""
    return {**values, **{key: _merged(values[key], change) if isinstance(change, Mapping) and isinstance(
        values.get(key), Mapping) else change for key, change in changes.items()}}
