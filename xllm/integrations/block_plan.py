"""`BlockPlan`: which KV blocks another engine loads from the store and adds to it, step by step. The half of a
connector that lives where requests are scheduled; it knows block numbers and tokens, and no tensor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from xllm.errors import DiskError

logger = logging.getLogger("xllm.integrations")
MATCH_S = 1.0  # for which a match is taken as it is: requests that wait are asked about in every step. As REFRESH_S


class StoredPrefixes(Protocol):
    """A store that is looked into: `KVStoreClient`."""

    def match(self, token_ids: Sequence[int] | np.ndarray, *, cache_salt: str = "") -> int:
        """How many of the tokens' full blocks are there, from the first on. Raises DiskError."""

    def get(self, token_ids: Sequence[int] | np.ndarray, *, first_block: int = 0,
            cache_salt: str = "") -> list[bytes | None]:
        """Read blocks; those that are not good are not there from then on. Raises DiskError."""


@dataclass(frozen=True)
class BlockRun:
    """Blocks of one request, one behind the other. block_ids: where the engine has the blocks of `token_ids`, all from
    the first on; those from number `first_block` on are meant."""

    request_id: str
    token_ids: np.ndarray
    first_block: int
    block_ids: tuple[int, ...]
    cache_salt: str = ""

    @property
    def targets(self) -> tuple[int, ...]:
        return self.block_ids[self.first_block:]


@dataclass
class StepRuns:
    """Of one step: to be loaded before it, and to be saved behind it."""

    loads: list[BlockRun] = field(default_factory=list)
    saves: list[BlockRun] = field(default_factory=list)


@dataclass
class _Followed:
    """A request that runs. num_known: its first blocks that need not be saved any more."""

    token_ids: np.ndarray
    cache_salt: str
    num_known: int
    block_ids: list[int] = field(default_factory=list)
    num_to_load: int = 0  # tokens, in the next step


@dataclass(frozen=True)
class _Match:
    num_tokens: int
    num_blocks: int
    made_s: float  # on the `time.monotonic()` clock


class BlockPlan:
    """stores: one for each rank of the engine; a block is there if all of them have it. loads, saves: whether it does.

    Only the blocks of prompts are saved: those of an answer are of the next turn's prompt, if there is one.
    """

    def __init__(self, stores: Sequence[StoredPrefixes], block_size: int, *, loads: bool = True, saves: bool = True):
        self._stores, self._block_size, self._loads, self._saves = stores, block_size, loads, saves
        self._followed: dict[str, _Followed] = {}
        self._matches: dict[str, _Match] = {}

    def num_loadable(self, request_id: str, token_ids: Sequence[int], num_computed: int, cache_salt: str = "") -> int:
        """How many tokens behind the first `num_computed`, which the engine has itself, can be loaded: whole blocks,
        and at least one token of the prompt is left to be computed. token_ids: of the prompt."""
        if not self._loads:
            return 0
        num_usable = (len(token_ids) - 1) // self._block_size
        num_blocks = min(num_usable, self._num_stored(request_id, token_ids, cache_salt))
        return max(0, num_blocks * self._block_size - num_computed)

    def begin(self, request_id: str, token_ids: Sequence[int], num_to_load: int, cache_salt: str = "") -> None:
        """The request has got blocks and begins, or begins again. token_ids: of its prompt. num_to_load: tokens."""
        num_known = self._num_stored(request_id, token_ids, cache_salt) if self._saves else 0
        self._matches.pop(request_id, None)
        self._followed[request_id] = _Followed(np.asarray(token_ids, np.int32), cache_salt, num_known,
                                               num_to_load=num_to_load)

    def step(self, request_id: str, new_block_ids: Sequence[int], num_computed: int, num_scheduled: int,
             runs: StepRuns, *, begins: bool) -> None:
        """Add to `runs` what a step does for a request: it computes `num_scheduled` tokens behind `num_computed`.

        new_block_ids: added to the request's in this step; if it `begins`, all of them.
        """
        request = self._followed.get(request_id)
        if request is None:
            return
        if begins:
            request.block_ids.clear()
        request.block_ids += new_block_ids
        if request.num_to_load:
            num_there = num_computed // self._block_size
            first = num_there - request.num_to_load // self._block_size
            runs.loads.append(self._run(request_id, request, first, num_there))
            request.num_to_load = 0
        num_filled = min(num_computed + num_scheduled, len(request.token_ids)) // self._block_size
        if self._saves and num_filled > request.num_known:
            runs.saves.append(self._run(request_id, request, request.num_known, num_filled))
            request.num_known = num_filled

    def failed(self, block_ids: Collection[int]) -> None:
        """These blocks of the engine could not be loaded. Their requests are saved again from there on, and the stores
        look at what they have of them."""
        self._matches.clear()
        for request in self._followed.values():
            bad = [number for number, block_id in enumerate(request.block_ids) if block_id in block_ids]
            if not bad:
                continue
            request.num_known = min(request.num_known, bad[0])
            for store in self._stores:
                try:
                    store.get(request.token_ids, first_block=bad[0], cache_salt=request.cache_salt)
                except DiskError as error:
                    logger.warning("the KV store cannot be read: %s", error)

    def end(self, request_id: str) -> None:
        """The request has ended. Idempotent."""
        self._followed.pop(request_id, None)
        self._matches.pop(request_id, None)

    def _run(self, request_id: str, request: _Followed, first: int, end: int) -> BlockRun:
        return BlockRun(request_id, request.token_ids[:end * self._block_size], first, tuple(request.block_ids[:end]),
                        request.cache_salt)

    def _num_stored(self, request_id: str, token_ids: Sequence[int], cache_salt: str) -> int:
        known, now_s = self._matches.get(request_id), time.monotonic()
        if known is None or known.num_tokens != len(token_ids) or now_s - known.made_s > MATCH_S:
            tokens = np.asarray(token_ids, np.int32)
            try:
                num_blocks = min(store.match(tokens, cache_salt=cache_salt) for store in self._stores)
            except DiskError as error:  # the engine goes on without the store
                logger.warning("the KV store cannot be read: %s", error)
                num_blocks = 0
            known = self._matches[request_id] = _Match(len(token_ids), num_blocks, now_s)
        return known.num_blocks
