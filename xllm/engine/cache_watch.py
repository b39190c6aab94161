"""`CacheWatch`: passes what changes in the KV cache on to those who listen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xllm.config import CacheSettings
from xllm.kv.event_log import CacheEvents, KVEventLog
from xllm.kv.manager import KVManager
from xllm.kv_events_settings import parse_kv_events, read_key

if TYPE_CHECKING:
    from xllm.engine.kv_publisher import KVPublisher

Hear = Callable[[list[CacheEvents]], None]


class CacheWatch:
    """with_tokens: whether the tokens of stored blocks are told as well. Nothing is collected before somebody listens.
    Belongs to the thread that owns the KV manager."""

    def __init__(self, kv: KVManager, *, with_tokens: bool = False):
        self._kv, self._with_tokens = kv, with_tokens
        self._log: KVEventLog | None = None
        self._listeners: list[Hear] = []

    def listen(self, hear: Hear) -> None:
        """Call `hear` with what is cached now and, after each step, with what has changed. All listeners come before
        the first `pass_on`."""
        if self._log is None:
            self._log = KVEventLog(self._kv, with_tokens=self._with_tokens)
        self._listeners.append(hear)

    def pass_on(self) -> None:
        """Tell the listeners what has changed since the last call."""
        if self._log is not None and (changes := self._log.take()):
            for hear in self._listeners:
                hear(changes)


def open_publisher(cache: CacheSettings) -> KVPublisher | None:
    """What sends the changes to subscribers, if the settings ask for it. Raises ConfigError."""
    if (settings := parse_kv_events(cache.kv_events_config)) is None:
        return None
    from xllm.engine.kv_publisher import KVPublisher  # imports zmq and msgspec: only where they are used

    assert cache.block_size is not None
    key = None if cache.kv_events_key_file is None else read_key(cache.kv_events_key_file)
    return KVPublisher(settings, key, cache.block_size)
