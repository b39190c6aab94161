"""`BlockWriter`: adds blocks to a store from a thread of its own, so that no step waits for a disk."""

from __future__ import annotations

import logging
import queue
import threading

import numpy as np

from xllm.errors import DiskError
from xllm.integrations.block_plan import BlockRun
from xllm.kv.store_client import KVStoreClient

logger = logging.getLogger("xllm.integrations")
CLOSE_S = 30.0  # that closing waits for what is left to be written. Chosen: engines are given about that long to stop


class BlockWriter:
    """max_bytes: that may wait. What comes beyond that is dropped and counted: it is only a later miss."""

    def __init__(self, store: KVStoreClient, max_bytes: int):
        self._store, self._max_bytes = store, max_bytes
        self.num_dropped = self.num_failed = 0  # blocks
        self._waiting_bytes, self._counting = 0, threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[BlockRun, np.ndarray] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="kv-store-writer", daemon=True)
        self._thread.start()

    def room(self) -> int:
        """How many blocks may be put now."""
        return max(0, self._max_bytes - self._waiting_bytes) // self._store.block_bytes

    def put(self, run: BlockRun, blocks: np.ndarray) -> None:
        """Have the run's blocks written: a row of bytes for each, which nobody changes any more."""
        with self._counting:
            self._waiting_bytes += blocks.nbytes
        self._waiting.put((run, blocks))

    def close(self) -> bool:
        """Write what waits, for CLOSE_S at most; returns whether all of it is written. Idempotent."""
        self._waiting.put(None)
        self._thread.join(CLOSE_S)
        return not self._thread.is_alive()

    def _write_all(self) -> None:
        while (job := self._waiting.get()) is not None:
            run, blocks = job
            try:
                self._store.put(run.token_ids, list(blocks), first_block=run.first_block, cache_salt=run.cache_salt)
            except DiskError as error:
                if not self.num_failed:
                    logger.warning("the KV store cannot be written, further failures are only counted: %s", error)
                self.num_failed += len(blocks)
            with self._counting:
                self._waiting_bytes -= blocks.nbytes
