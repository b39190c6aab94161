"""`BlockCopies`: copies KV blocks between another engine's tensors and the store. The half of a connector that lives in
the process of a rank.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from xllm.errors import DiskError
from xllm.integrations.block_plan import BlockRun
from xllm.integrations.block_writer import BlockWriter
from xllm.kv.store_client import KVStoreClient

logger = logging.getLogger("xllm.integrations")
# For so many steps the blocks of a load that failed are not taken for good: an engine that schedules one step ahead
# learns of the failure when the next step has been planned already.
DISTRUSTED_STEPS = 2


class BlockCopies:
    """Belongs to one thread; what is saved is written by another one (`BlockWriter`).

    A block of the store holds a block of every layer, in the order of `layers`, each as a contiguous tensor's bytes.
    layers: by name, tensors whose first dimension is the block number. writes: None where nothing is saved.

    Raises ValueError if the layers' blocks are not of the store's size.
    """

    def __init__(self, store: KVStoreClient, writer: BlockWriter | None, layers: Mapping[str, torch.Tensor]):
        self._store, self._writer, self._layers = store, writer, list(layers.values())
        sizes = [layer[0].numel() * layer.element_size() for layer in self._layers]
        if sum(sizes) != store.block_bytes:
            raise ValueError(f"the {len(sizes)} layers have {sum(sizes)} bytes a block, the store {store.block_bytes}")
        ends = np.cumsum(sizes).tolist()
        self._places = [slice(end - size, end) for end, size in zip(ends, sizes)]
        self._distrusted: deque[frozenset[int]] = deque([frozenset()] * DISTRUSTED_STEPS, DISTRUSTED_STEPS)
        self._tainted = set[str]()
        self.num_loaded = self.num_saved = 0  # blocks

    def load(self, runs: Sequence[BlockRun]) -> frozenset[int]:
        """Copy blocks of the store into the tensors, at the beginning of a step. Returns those that could not be, and
        all behind them: what the step computes with them is wrong."""
        failed = frozenset(block for run in runs for block in self._load(run))
        self._distrusted.append(failed)
        return failed

    def save(self, runs: Sequence[BlockRun]) -> None:
        """Take blocks that the step has filled. Nothing is taken of a request that may have computed with a block whose
        load failed, now or later: the engine computes it again."""
        bad = frozenset[int]().union(*self._distrusted)
        self._tainted |= {run.request_id for run in runs if not bad.isdisjoint(run.block_ids)}
        if self._writer is None:
            return
        for run in runs:
            if run.request_id in self._tainted:
                continue
            if self._writer.room() < len(run.targets):
                self._writer.num_dropped += len(run.targets)
                continue
            self._writer.put(run, self._taken(run.targets))
            self.num_saved += len(run.targets)

    def forget(self, request_ids: set[str]) -> None:
        """These requests have ended."""
        self._tainted -= request_ids

    def _load(self, run: BlockRun) -> tuple[int, ...]:
        targets = run.targets
        rows = np.empty((len(targets), self._store.block_bytes), np.uint8)
        try:
            num_good = self._store.get_into(run.token_ids, list(rows), first_block=run.first_block,
                                            cache_salt=run.cache_salt)
            if num_good < len(targets):  # look at the rest, too: what is not good can be written anew from then on
                self._store.get(run.token_ids, first_block=run.first_block + num_good, cache_salt=run.cache_salt)
        except DiskError as error:
            logger.warning("the KV store cannot be read: %s", error)
            num_good = 0
        if num_good:
            self._fill(targets[:num_good], torch.from_numpy(rows[:num_good]))
        self.num_loaded += num_good
        if num_good < len(targets):
            logger.warning("%d of %d blocks for request %s are damaged or gone; the engine computes them",
                           len(targets) - num_good, len(targets), run.request_id)
        return targets[num_good:]

    def _fill(self, targets: Sequence[int], rows_NX: torch.Tensor) -> None:
        for layer, place in zip(self._layers, self._places):
            index = torch.tensor(targets, device=layer.device)
            blocks = rows_NX[:, place].contiguous().view(layer.dtype).view(len(targets), *layer.shape[1:])
            layer[index] = blocks.to(layer.device)

    def _taken(self, targets: Sequence[int]) -> np.ndarray:
        """[blocks, bytes], in host memory."""
        rows = torch.empty((len(targets), self._store.block_bytes), dtype=torch.uint8)
        for layer, place in zip(self._layers, self._places):
            index = torch.tensor(targets, device=layer.device)
            blocks = layer[index].contiguous().view(len(targets), -1)
            rows[:, place] = blocks.view(torch.uint8).to(rows.device)
        return rows.numpy()
