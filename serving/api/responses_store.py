"""`ResponseStore`: answers of the Responses API that a later call may refer to, in memory and bounded."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec


@dataclass(frozen=True)
class StoredResponse:
    """response: as it was sent. messages: the conversation up to and with it. owner: whose key asked for it."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]
    owner: str
    num_chars: int


class ResponseStore:
    """Keeps responses by owner; those of another owner are not found. When it is full, the owner who keeps most
    (entries or characters, whichever is exceeded) loses what it has not used for longest: nobody can push out
    another's."""

    def __init__(self, max_entries: int, max_chars: int):
        self.max_entries, self.max_chars = max_entries, max_chars
        self.num_chars = 0
        self._kept: dict[str, _Kept] = {}  # by owner

    def __len__(self) -> int:
        return sum(len(kept.entries) for kept in self._kept.values())

    def put(self, response: dict[str, Any], messages: list[dict[str, Any]], owner: str) -> None:
        """Keep a response and its conversation, dropping others as needed. One that is too large by itself is not
        kept."""
        entry = StoredResponse(response, messages, owner, _size(response) + _size(messages))
        if entry.num_chars > self.max_chars:
            return
        self.delete(response["id"], owner)
        self._kept.setdefault(owner, _Kept()).add(response["id"], entry)
        self.num_chars += entry.num_chars
        while len(self) > self.max_entries:
            self._drop_oldest(max(self._kept, key=lambda name: len(self._kept[name].entries)))
        while self.num_chars > self.max_chars:
            self._drop_oldest(max(self._kept, key=lambda name: self._kept[name].num_chars))

    def get(self, response_id: str, owner: str) -> StoredResponse | None:
        """The owner's response, or None if there is none. It becomes the owner's most recently used, which is dropped
        last."""
        kept = self._kept.get(owner)
        if kept is None or response_id not in kept.entries:
            return None
        kept.entries.move_to_end(response_id)
        return kept.entries[response_id]

    def delete(self, response_id: str, owner: str) -> bool:
        """Drop the owner's response; returns whether there was one."""
        kept = self._kept.get(owner)
        if kept is None or response_id not in kept.entries:
            return False
        self._drop(owner, response_id)
        return True

    def _drop_oldest(self, owner: str) -> None:
        self._drop(owner, next(iter(self._kept[owner].entries)))

    def _drop(self, owner: str, response_id: str) -> None:
        kept = self._kept[owner]
        entry = kept.entries.pop(response_id)
        kept.num_chars -= entry.num_chars
        self.num_chars -= entry.num_chars
        if not kept.entries:
            del self._kept[owner]


def _size(value: Any) -> int:
    return len(msgspec.json.encode(value))


@dataclass(slots=True)
class _Kept:
    """What one owner keeps, the least recently used first."""

    entries: OrderedDict[str, StoredResponse] = field(default_factory=OrderedDict)
    num_chars: int = 0

    def add(self, response_id: str, entry: StoredResponse) -> None:
        self.entries[response_id] = entry
        self.num_chars += entry.num_chars
