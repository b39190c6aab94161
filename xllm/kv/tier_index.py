"""`TierIndex`: which block lies in which slot of one storage tier (host memory, or disk), and which is evicted first.

The slots of a tier and their life:

    FREE      holds nothing
    WRITING   reserved; its bytes are on their way
    RESIDENT  complete and findable; evictable while it is not held
    DOOMED    found to be broken while held: not findable any more, FREE as soon as it is let go

A tier is closed under prefixes: the parent of a resident block is resident. A block is held only together with its
ancestors in the tier, and released tail first, so that eviction meets children before parents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from xllm.errors import IntegrityError
from xllm.kv.block import ROOT
from xllm.kv.eviction import EvictionPolicy
from xllm.kv.kv_events import EventSink

FREE, WRITING, RESIDENT, DOOMED = range(4)
NO_SLOT = -1  # stands for the parent of a first block, and for a look-up that finds nothing


class TierIndex:
    """Slots 0 .. num_slots - 1. Not thread-safe: the KV manager's thread owns it.

    on_remove: called with each batch of slots that stop being resident, before they may be given away.
    """

    def __init__(self, num_slots: int, policy: EvictionPolicy, on_remove: Callable[[np.ndarray], None]):
        self.num_slots = num_slots
        self.num_evicted = 0
        self._policy = policy
        self._on_remove = on_remove
        self._slot_of: dict[bytes, int] = {}
        self._digest_of: list[bytes | None] = [None] * num_slots
        self.parent_of = np.full(num_slots, NO_SLOT, dtype=np.int32)
        self._state = np.full(num_slots, FREE, dtype=np.int8)
        self._holders = np.zeros(num_slots, dtype=np.int32)
        self._free = list(range(num_slots))[::-1]
        self._sink: EventSink | None = None

    def listen(self, sink: EventSink) -> None:
        """Report every block that is findable now to `sink`, and from now on every change. One sink at a time."""
        for digest, slot in self._slot_of.items():
            sink.stored(digest, self._parent_digest(slot))
        self._sink = sink

    def _parent_digest(self, slot: int) -> bytes:
        parent = int(self.parent_of[slot])
        return ROOT if parent == NO_SLOT else self.digest_of(parent)

    def __len__(self) -> int:
        return len(self._slot_of)

    # --- finding

    def find(self, digest: bytes) -> int:
        """The slot that holds this block, or NO_SLOT."""
        return self._slot_of.get(digest, NO_SLOT)

    def digest_of(self, slot: int) -> bytes:
        digest = self._digest_of[slot]
        assert digest is not None
        return digest

    def path(self, slot: int) -> np.ndarray:
        """The slots from the root to `slot`: int32."""
        found = []
        while slot != NO_SLOT:
            found.append(slot)
            slot = int(self.parent_of[slot])
        return np.array(found[::-1], dtype=np.int32)

    # --- filling

    @property
    def num_available(self) -> int:
        """Slots that `reserve` can give now."""
        return len(self._free) + len(self._policy)

    def reserve(self, num_slots: int) -> np.ndarray:
        """Take slots to write to, evicting as needed: int32, fewer than asked for if there are not as many."""
        lacking = num_slots - len(self._free)
        if lacking > 0:
            victims = self._policy.victims(min(lacking, len(self._policy)))
            self.num_evicted += len(victims)
            self._remove(victims)
        slots = np.array([self._free.pop() for _ in range(min(num_slots, len(self._free)))], dtype=np.int32)
        self._state[slots] = WRITING
        return slots

    def publish(self, slots: np.ndarray, digests: Sequence[bytes], parent: int) -> np.ndarray:
        """Make reserved slots findable: a chain of blocks behind the resident slot `parent` (NO_SLOT: from the root).

        Returns the slots that hold these contents now, int32, held by the caller. Where another slot already has a
        block, that slot is returned and the reserved one becomes FREE. Fewer slots, if a parent was dropped meanwhile.
        """
        places, own, parents = slots.copy(), [], []
        for i, (slot, digest) in enumerate(zip(slots.tolist(), digests)):
            if parent != NO_SLOT and self._state[parent] != RESIDENT:
                self.abandon(slots[i:])
                places = places[:i]
                break
            known = self._slot_of.get(digest, NO_SLOT)
            if known == NO_SLOT:
                assert self._state[slot] == WRITING
                self._slot_of[digest] = slot
                self._digest_of[slot] = digest
                self._state[slot] = RESIDENT
                own.append(i)
                parents.append(parent)
                parent = slot
            else:
                self.abandon(slots[i : i + 1])
                places[i] = parent = known
        new = slots[own]
        self.parent_of[new] = parents
        if self._sink is not None:
            for slot in new.tolist():
                self._sink.stored(self.digest_of(slot), self._parent_digest(slot))
        self._policy.admit(new, [digests[i] for i in own], np.array(parents, dtype=np.int32))
        self._holders[new] = 1
        others = np.setdiff1d(places, new, assume_unique=True)
        self.hold(others)
        return places

    def abandon(self, slots: np.ndarray) -> None:
        """Free reserved slots that were not filled."""
        assert np.all(self._state[slots] == WRITING)
        self._state[slots] = FREE
        self._free.extend(slots.tolist())

    def adopt(self, slots: Sequence[int], digests: Sequence[bytes], parents: Sequence[bytes]) -> int:
        """List the blocks that an earlier process left, oldest first; returns how many. The index must be empty.

        parents: digests, zeros for a root. Of several slots with the same contents the newest counts; a block without
        its parent, or on a cycle of parents, is not taken.
        """
        newest = dict(zip(digests, slots))
        parent_of = dict(zip(digests, parents))
        kept: dict[bytes, int] = {}
        lost: set[bytes] = set()
        for digest in newest:
            chain: dict[bytes, None] = {}
            while digest in newest and digest not in kept and digest not in lost and digest not in chain:
                chain[digest] = None
                digest = parent_of[digest]
            if digest in kept or not any(digest):
                kept.update((member, newest[member]) for member in reversed(chain))
            else:
                lost.update(chain)
        self._fill(kept, parent_of, {digest: age for age, digest in enumerate(newest)})
        return len(kept)

    def _fill(self, slot_of: dict[bytes, int], parent_of: dict[bytes, bytes], age_of: dict[bytes, int]) -> None:
        """slot_of: parents before their children."""
        slots = np.array(list(slot_of.values()), dtype=np.int32)
        parents = np.array([slot_of.get(parent_of[digest], NO_SLOT) for digest in slot_of], dtype=np.int32)
        self._slot_of.update(slot_of)
        for digest, slot in slot_of.items():
            self._digest_of[slot] = digest
        self.parent_of[slots] = parents
        self._state[slots] = RESIDENT
        self._free = np.flatnonzero(self._state == FREE)[::-1].tolist()
        self._policy.admit(slots, list(slot_of), parents)
        # A parent is as young as its youngest descendant, and stands behind it in the order of eviction.
        age = np.zeros(self.num_slots, dtype=np.int64)
        age[slots] = [age_of[digest] for digest in slot_of]
        for slot, parent in zip(slots[::-1].tolist(), parents[::-1].tolist()):
            if parent != NO_SLOT:
                age[parent] = max(age[parent], age[slot])
        tail_first = slots[::-1]
        self._policy.retire(tail_first[np.argsort(age[tail_first], kind="stable")])

    @property
    def num_held(self) -> int:
        """Slots that are being read or written or are held: not evictable now."""
        return self.num_slots - self.num_available

    # --- holding

    def hold(self, path: np.ndarray) -> None:
        """Protect resident slots until `let_go`: a path from the root on, or the next piece of one held already."""
        self._policy.revive(path)
        self._holders[path] += 1

    def let_go(self, path: np.ndarray) -> None:
        """End a `hold` (or the hold that `publish` gave). The same path, root first."""
        self._holders[path] -= 1
        assert not np.any(self._holders[path] < 0), "let go more often than held"
        idle = path[self._holders[path] == 0][::-1]
        doomed = self._state[idle] == DOOMED
        if doomed.any():
            self._give_back(idle[doomed])
            idle = idle[~doomed]
        self._policy.retire(idle)

    def use(self, path: np.ndarray) -> None:
        """Count one use of these slots by one request, root first, and make them the most recent."""
        broken = self._state[path] != RESIDENT
        if broken.any():
            path = path[: int(broken.argmax())]
        if len(path):
            self._policy.use(path)
            self.hold(path)
            self.let_go(path)

    # --- emptying

    def drop(self, slot: int) -> int:
        """Remove a slot whose bytes are bad, and all its descendants; returns how many. Held ones become DOOMED."""
        resident = self._state == RESIDENT
        nowhere = self.num_slots
        ancestor = np.append(np.where(resident & (self.parent_of != NO_SLOT), self.parent_of, nowhere), nowhere)
        broken = np.zeros(self.num_slots + 1, dtype=bool)
        broken[slot] = True
        while True:  # twice as far up each time, so that a long chain does not take long
            broken |= broken[ancestor]
            if np.all(ancestor == nowhere):
                break
            ancestor = ancestor[ancestor]
        slots = np.flatnonzero(broken[:-1] & resident).astype(np.int32)
        self._policy.revive(slots)
        self._policy.forget(slots)
        held = self._holders[slots] > 0
        self._forget(slots)
        self._state[slots[held]] = DOOMED
        self._give_back(slots[~held])
        return len(slots)

    def clear(self) -> None:
        """Evict every slot that is not held."""
        self._remove(self._policy.victims(len(self._policy)))

    def _remove(self, slots: np.ndarray) -> None:
        if len(slots):
            self._forget(slots)
            self._give_back(slots)

    def _forget(self, slots: np.ndarray) -> None:
        self._on_remove(slots)
        digests = [self.digest_of(slot) for slot in slots.tolist()]
        for digest in digests:
            del self._slot_of[digest]
        if self._sink is not None and digests:
            self._sink.removed(digests)

    def _give_back(self, slots: np.ndarray) -> None:
        self._state[slots] = FREE
        self.parent_of[slots] = NO_SLOT
        for slot in slots.tolist():
            self._digest_of[slot] = None
        self._free.extend(slots.tolist())

    # --- audit

    def check_integrity(self) -> None:
        """Raise IntegrityError if states, maps or counts disagree, or a block stands without its parent."""
        counts = np.bincount(self._state, minlength=4)
        _require(counts[FREE] == len(self._free) == len(set(self._free)), "the free list and the states disagree")
        _require(counts[RESIDENT] == len(self._slot_of), "resident slots and the map disagree")
        idle = int(np.count_nonzero((self._state == RESIDENT) & (self._holders == 0)))
        _require(idle == len(self._policy), "idle slots and the policy disagree")
        for digest, slot in self._slot_of.items():
            parent = int(self.parent_of[slot])
            _require(self._digest_of[slot] == digest and self._state[slot] == RESIDENT, f"slot {slot} is misfiled")
            _require(parent == NO_SLOT or self._state[parent] == RESIDENT, f"slot {slot} lacks its parent")
            _require(parent == NO_SLOT or self._holders[parent] >= self._holders[slot], f"slot {slot} is held alone")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)
