"""`KVEventLog`: collects what has changed in the KV cache between two reports, for those who route by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm.kv.block import TIERS
from xllm.kv.manager import KVManager


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """What has changed in one tier (a place in `block.py:TIERS`): the blocks that are not there any more, and then
    those that are now, each with its parent's digest and behind its parent. tokens: of those of them whose tokens are
    known (`NoteTokens`), as bytes."""

    tier: int
    stored: dict[bytes, bytes]
    removed: Sequence[bytes]
    tokens: dict[bytes, bytes] = field(default_factory=dict)


class TierEvents:
    """The `EventSink` of one tier. It keeps what has become of each block since the last `take`: a block that came and
    went is told as gone."""

    def __init__(self, tier: int) -> None:
        self._tier = tier
        self._stored: dict[bytes, bytes] = {}
        self._removed: dict[bytes, None] = {}

    def stored(self, digest: bytes, parent: bytes) -> None:
        """See `EventSink.stored`."""
        self._stored[digest] = parent

    def removed(self, digests: Sequence[bytes]) -> None:
        """See `EventSink.removed`."""
        if self._stored:
            for digest in digests:
                self._stored.pop(digest, None)
        self._removed.update(dict.fromkeys(digests))

    def take(self, tokens: dict[bytes, bytes]) -> CacheEvents | None:
        """The changes since the last call, None: there are none. tokens: of blocks stored since then."""
        if not self._stored and not self._removed:
            return None
        stored, self._stored = self._stored, {}
        removed, self._removed = self._removed, {}
        known = {digest: tokens[digest] for digest in stored if digest in tokens} if tokens else {}
        return CacheEvents(self._tier, stored, tuple(removed), known)


class KVEventLog:
    """Listens to a KV manager and to the tiers below it. Belongs to the thread that owns the manager."""

    def __init__(self, kv: KVManager, *, with_tokens: bool = False) -> None:
        self._tiers = [TierEvents(tier) for tier in range(len(TIERS))]
        self._tokens: dict[bytes, bytes] = {}
        kv.listen(*self._tiers)
        if with_tokens:
            kv.note_tokens = self._note_tokens

    def _note_tokens(self, digest: bytes, data: memoryview) -> None:
        self._tokens[digest] = bytes(data)

    def take(self) -> list[CacheEvents]:
        """What has changed since the last call, at most once a tier."""
        taken = [events for tier in self._tiers if (events := tier.take(self._tokens)) is not None]
        if self._tokens:
            self._tokens = {}
        return taken
