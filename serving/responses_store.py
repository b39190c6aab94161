"""`ResponseStore`: answers of the Responses API that a later call may refer to, in memory and bounded."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoredResponse:
    """response: as it was sent. messages: the conversation up to and with it. owner: whose key asked for it."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]
    owner: str
    num_chars: int


class ResponseStore:
    """The least recently used go first. What belongs to another owner is not there."""

    def __init__(self, max_entries: int, max_chars: int):
        self.max_entries, self.max_chars = max_entries, max_chars
        self.num_chars = 0
        self._entries: OrderedDict[str, StoredResponse] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, response: dict[str, Any], messages: list[dict[str, Any]], owner: str) -> None:
        """Keep one; nothing is kept of one that alone is too large."""
        entry = StoredResponse(response, messages, owner, len(json.dumps(response)) + len(json.dumps(messages)))
        if entry.num_chars > self.max_chars:
            return
        self.delete(response["id"], owner)
        self._entries[response["id"]] = entry
        self.num_chars += entry.num_chars
        while len(self._entries) > self.max_entries or self.num_chars > self.max_chars:
            _, oldest = self._entries.popitem(last=False)
            self.num_chars -= oldest.num_chars

    def get(self, response_id: str, owner: str) -> StoredResponse | None:
        entry = self._entries.get(response_id)
        if entry is None or entry.owner != owner:
            return None
        self._entries.move_to_end(response_id)
        return entry

    def delete(self, response_id: str, owner: str) -> bool:
        """Whether it was there."""
        entry = self._entries.get(response_id)
        if entry is None or entry.owner != owner:
            return False
        del self._entries[response_id]
        self.num_chars -= entry.num_chars
        return True
