"""`Lander`: makes room in host memory for KV blocks that another instance sends, and makes them findable once they are
there.

What has landed is cached like any other block: a request that continues the path finds it there, and if the request
never comes it is evicted in its turn. What did not land, or was not whole, is computed anew.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Sequence

import numpy as np

from xllm.errors import DeviceError
from xllm.kv.moves import LAND, URGENT, MoveDone
from xllm.kv.prefix_index import NO_BLOCK
from xllm.kv.tier_index import NO_SLOT
from xllm.kv.tiers import TieredStore
from xllm.kv_offer import NOTHING_MISSING, KVOffer, RankWindow

KEY_BYTES = 16  # of a grant: nobody guesses 128 bits
# Landings that wait at a time. Chosen: far more than the requests that an instance runs at once.
MAX_LANDINGS = 4096
# Behind a lease's end, for the worker to say that it is over. Chosen: a request that waits for a worker that says
# nothing is computed then.
GRACE_S = 5.0


class Landing:
    """Blocks that are on their way into `slots`, as blocks `first`, first + 1, ... of a path with these digests.

    held: the slots of the path that are kept from eviction until the landing is given up. Written by the `Lander` only.
    """

    __slots__ = ("deadline_s", "digests", "first", "held", "is_done", "is_wanted", "num_landed", "slots")

    def __init__(self, digests: Sequence[bytes], first: int, slots: np.ndarray, held: np.ndarray, deadline_s: float):
        self.digests, self.first, self.slots, self.held, self.deadline_s = digests, first, slots, held, deadline_s
        self.num_landed = 0
        self.is_done = False
        self.is_wanted = True


class Lander:
    """Belongs to the thread that owns the KV manager. windows: where other instances write, by rank."""

    def __init__(self, store: TieredStore, windows: tuple[RankWindow, ...]):
        self._store, self._windows = store, windows
        self._open: dict[int, Landing] = {}
        self.num_landed = 0  # blocks, since the start
        self.num_missed = 0  # blocks that were expected and did not come, or found no place

    def __len__(self) -> int:
        return len(self._open)

    def expect(self, digests: Sequence[bytes], lease_s: float, now_s: float) -> KVOffer | str:
        """Make room for the blocks of this path that neither the device nor host memory has; returns where they are to
        be written, or why there is no room or no need.

        Device blocks that host memory lacks in front of them are copied there, since a block is found there only with
        all before it.
        """
        host, find = self._store.host, self._store.find_on_device
        num_host = _leading(digests, lambda digest: host.find(digest) != NO_SLOT)
        num_device = _leading(digests, lambda digest: find(digest) != NO_BLOCK)
        first = max(num_host, num_device)
        num_blocks = len(digests) - first
        if not num_blocks:
            return NOTHING_MISSING
        if len(self._open) >= MAX_LANDINGS:
            return f"{MAX_LANDINGS} landings are under way"
        if num_blocks > host.num_available or len(digests) >= self._store.num_device_blocks:
            return f"there is no room for {num_blocks} KV blocks"
        held = np.array([host.find(digest) for digest in digests[:num_host]], dtype=np.int32)
        host.hold(held)
        if num_device > num_host:
            path = np.array([find(digest) for digest in digests[:num_device]], dtype=np.int32)
            self._store.released(path, swap=True)
        slots = host.reserve(num_blocks)
        if len(slots) < num_blocks:  # the holds and the copies took some
            host.abandon(slots)
            host.let_go(held)
            return f"there is no room for {num_blocks} KV blocks"
        landing, key = Landing(digests, first, slots, held, now_s + lease_s), secrets.token_bytes(KEY_BYTES)
        places = np.arange(first, first + num_blocks, dtype=np.int32)
        number = self._store.moves.submit(LAND, URGENT, places, slots, functools.partial(self._finish, landing),
                                          key=key, lease_s=lease_s)
        self._open[number] = landing
        return KVOffer(number=number, key=key, first_block=first, slots=tuple(slots.tolist()), lease_s=lease_s,
                       windows=self._windows)

    def _finish(self, landing: Landing, done: MoveDone) -> None:
        """Take in the end of a landing: publish the blocks that came whole, without a gap."""
        if done.error is not None and done.error.kind != "peer":
            raise DeviceError(f"KV of another instance could not be taken: {done.error.message}")
        host, first = self._store.host, landing.first
        before = np.array([host.find(digest) for digest in landing.digests[len(landing.held) : first]], dtype=np.int32)
        good = landing.slots[: done.num_done]
        if np.any(before == NO_SLOT):  # evicted, or never saved: what follows would stand without its parent
            host.abandon(good)
            good = good[:0]
        host.abandon(landing.slots[done.num_done :])
        host.hold(before)
        path = np.concatenate((landing.held, before)).astype(np.int32)
        landed = host.publish(good, landing.digests[first : first + len(good)],
                              int(path[-1]) if len(path) else NO_SLOT)
        landing.held = np.concatenate((path, landed)).astype(np.int32)
        landing.num_landed, landing.is_done = len(landed), True
        self.num_landed += len(landed)
        self.num_missed += len(landing.slots) - len(landed)
        if not landing.is_wanted:
            host.let_go(landing.held)

    def is_landing(self, number: int, now_s: float) -> bool:
        """Whether blocks may still come under this number."""
        landing = self._open.get(number)
        return landing is not None and not landing.is_done and now_s < landing.deadline_s + GRACE_S

    def give_up(self, number: int) -> None:
        """Keep what landed under this number no longer: the request has its blocks, or does not want them. Unknown
        numbers are ignored."""
        if (landing := self._open.pop(number, None)) is None:
            return
        landing.is_wanted = False
        if landing.is_done:
            self._store.host.let_go(landing.held)

    def revoke(self, number: int) -> None:
        """Give a landing up and let nothing more come for it: the request that would have used it has ended, or goes on
        elsewhere. Its room is free as soon as no sender is in the middle of a put; blocks that came whole until then
        stay cached. Unknown numbers are ignored."""
        landing = self._open.get(number)
        self.give_up(number)
        if landing is not None and not landing.is_done:
            self._store.moves.end_landing(number)

    def expire(self, now_s: float) -> None:
        """Give up what was not asked for in its time. What is still on its way is waited for: the worker ends it."""
        for number in [number for number, landing in self._open.items()
                       if landing.is_done and landing.deadline_s <= now_s]:
            self.give_up(number)


def _leading(digests: Sequence[bytes], has: Callable[[bytes], bool]) -> int:
    """How many of these, from the first on, are there."""
    return next((i for i, digest in enumerate(digests) if not has(digest)), len(digests))
