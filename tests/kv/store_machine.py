"""The whole KV store under random operations, crashes, disk errors and damage, against a model of its contents.

`python -m tests.kv.store_machine --operations 1000000 --seed 0` is the nightly run. An episode has one random shape
(sizes, policy) and one disk folder; within it lives follow each other, ended by a crash at a failpoint or by a
shutdown. A failure names the seed of its episode; `--seed N --episodes 1` plays it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tests.kv import store_audit
from tests.kv.held_view import open_shared_store
from tests.kv.store_life import FINGERPRINT, Life, open_store
from tests.kv.store_world import Contents, History, random_shape
from xllm.config import EVICTION_POLICIES
from xllm.errors import DiskError
from xllm.kv import failpoints, promotion, tiers
from xllm.kv.moves import FETCH

EPISODE_OPERATIONS = 1500
SHARED_BLOCKS = 40  # that one life may add to the shared store, which every other episode has
WEIGHTS = {"admit": 14, "admit_waiter": 8, "abort_waiter": 1, "plan": 18, "run": 14, "finish": 6, "abort": 1.5,
           "preempt": 2, "move": 14, "poll": 10, "fetch": 3, "squeeze": 1.2, "arm_crash": 0.3, "arm_error": 0.12,
           "disarm": 0.3, "shut_down": 0.15, "kill": 0.06, "rot": 0.3, "look_at_disk": 0.5, "rest": 0.1,
           "look": 3}  # fmt: skip
OF_LIFE = frozenset({"admit", "admit_waiter", "abort_waiter", "plan", "run", "finish", "abort", "preempt", "move",
                     "poll", "fetch", "squeeze", "look"})  # fmt: skip
ERRORS = [("disk.write", "ENOSPC"), ("disk.write", "EIO"), ("disk.read", "EIO"), ("disk.allocate", "ENOSPC"),
          ("disk.sync", "EIO"), ("tier.write_before", "EIO"), ("tier.written", "EIO"),
          ("store.payloads_written", "ENOSPC"), ("store.read", "EIO"), ("store.list", "EIO")]  # fmt: skip


class Crash(BaseException):
    """The process dies here."""


def crash() -> None:
    raise Crash


class StoreMachine:
    """One episode. `damaged`: somebody has changed bytes in the folder, so blocks may be missing, never wrong."""

    def __init__(self, seed: int, folder: Path, *, damage: bool | None = None, points: list[str] | None = None):
        """points: the failpoints to crash at; None: all."""
        self.rng = random.Random(seed)
        self.folder = folder
        self.shape = random_shape(self.rng, EVICTION_POLICIES)
        if points:  # room for every kind of move, and little of it on the device
            self.shape = replace(self.shape, num_disk_slots=40, num_host_slots=16, num_talks=4, eagerness=0.1,
                                 num_rows=5)
        self.contents = Contents(self.shape.block_size)
        self.counts: Counter = Counter()
        self.damaged = False
        self.shares = seed % 2 == 1 or any(point.startswith("store.") for point in points or ())
        self._points = points or sorted(name for name in failpoints.NAMES if not name.startswith("engine."))
        self._weights = {**WEIGHTS, **({"arm_crash": 4.0, "shut_down": 1.5} if points else {})}
        self._trouble = 0.5 if points else 0.1  # how likely a start-up meets a failpoint, or another capacity
        self._may_damage = self.rng.random() < 0.4 if damage is None else damage
        self._next_id = 0
        self.num_disk_slots = self.shape.num_disk_slots
        self.talks = [History(self.rng.choice(["", "", "tenant a", "tenant b"]),
                              [self.rng.randrange(3) for _ in range(self.rng.randint(1, self.shape.max_tokens - 2))])
                      for _ in range(self.shape.num_talks)]  # fmt: skip
        for talk in self.talks:
            self.contents.learn(talk)
        self.life = self._begin()

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    @property
    def num_done(self) -> int:
        return sum(self.counts[name] for name in WEIGHTS)

    # --- driving

    def play(self, num_operations: int, *, rest: bool = True) -> None:
        """May be called again: the episode goes on."""
        before = promotion.CHUNK_BLOCKS, tiers.SWAP_LEASE_S
        promotion.CHUNK_BLOCKS, tiers.SWAP_LEASE_S = self.shape.chunk, self.shape.swap_lease_s
        try:
            for name in self.rng.choices(list(self._weights), list(self._weights.values()), k=num_operations):
                self.operate(name)
            if rest:
                self.operate("rest")
        finally:
            promotion.CHUNK_BLOCKS, tiers.SWAP_LEASE_S = before
            failpoints.disarm()

    def close(self) -> None:
        self._count_life()
        self.life.store.abandon()
        self._close_shared()

    def _close_shared(self) -> None:
        if self.life.shared is not None:
            self.life.shared.close()

    def operate(self, name: str) -> None:
        """One operation and the audit; a crash on the way ends the life."""
        self.counts[name] += 1
        try:
            getattr(self.life if name in OF_LIFE else self, name)()
        except Crash:
            self.counts["crashes"] += 1
            self._restart(lost=True)
        store_audit.check(self.life)

    # --- failpoints

    def arm_crash(self) -> None:
        self.disarm()
        name = self.rng.choice(self._points)
        failpoints.arm(name, self._die_at(name), self.rng.choice([1, 1, 2, 5, 20]))

    def _die_at(self, name: str):
        def die() -> None:
            self.counts[f"crash at {name}"] += 1
            crash()

        return die

    def arm_error(self) -> None:
        self.disarm()
        name, error = self.rng.choice(ERRORS)
        failpoints.arm(name, error, self.rng.choice([1, 2, 7]))

    def disarm(self) -> None:
        failpoints.disarm()

    # --- lives end

    def kill(self) -> None:
        raise Crash

    def shut_down(self) -> None:
        """Steps in flight run, nobody takes in what they did; then the device is flushed to disk."""
        while self.life.steps:
            self.life.run(settle=False)
        tiers, index = self.life.tiers, self.life.kv._index
        cut_before = self._losses()
        blocks = [b for b in range(self.shape.num_blocks) if index.is_cached(b)]
        wanted = {index.digest_of(block) for block in blocks}
        tiers.close(30.0)
        nothing_lost = self._losses() == cut_before and not tiers.writer.disabled and not failpoints.armed
        found = set(tiers.disk._slot_of)
        if nothing_lost:
            assert wanted <= found, "a flush left blocks of the device behind"
            self.counts["flushed"] += len(wanted)
        self.counts["shut downs"] += 1
        self._restart(lost=False)

    def _count_life(self) -> None:
        tiers = self.life.tiers
        self.counts.update({
            "lives": 1, "saved": tiers.saver.num_written, "loaded": tiers.loader.num_loaded,
            "written": tiers.writer.num_written, "read": tiers.stager.num_staged,
            "passed through": tiers.passage.num_written, "lifted": tiers.lifter.num_lifted,
            "broken": tiers.stager.num_broken,
            "evicted from the device": self.life.kv.pool.num_evicted, "evicted from host": tiers.host.num_evicted,
            "evicted from disk": tiers.disk.num_evicted, "disks lost": tiers.writer.disabled,
            "misses": sum(self.life.store.counters.misses.values()),
            "put": 0 if tiers.store is None else tiers.store.num_written,
            "fetch moves": tiers.moves.stats[FETCH].num_moves,
        })  # fmt: skip
        if tiers.prefetcher is not None:
            self.counts.update({"prefetched right": tiers.prefetcher.num_right,
                                "prefetched wrong": tiers.prefetcher.num_wrong})
        assert len(self.life.disk_errors) == tiers.writer.disabled, "a lost disk is told once"

    def _losses(self) -> tuple[int, ...]:
        tiers = self.life.tiers
        return (tiers.saver.num_cut, tiers.writer.num_cut, tiers.passage.num_cut, tiers.host.num_evicted,
                tiers.disk.num_evicted, tiers.stager.num_broken)

    def _restart(self, *, lost: bool) -> None:
        """The next life finds on disk what was resident there, if nobody touched it and the disk is as large."""
        failpoints.disarm()
        self._count_life()
        tiers = self.life.tiers
        resident = dict(tiers.disk._slot_of)
        if lost:
            self.life.store.abandon()
        self._close_shared()
        slots_before = self.num_disk_slots
        if self.rng.random() < self._trouble:
            self.num_disk_slots = self.rng.choice([1, 5, self.shape.num_disk_slots])
        if self._may_damage and self.rng.random() < 0.5:
            self._damage()
        for talk in self.talks:
            self.contents.learn(talk)
        self.life = self._begin()
        found = self.life.tiers.disk._slot_of
        self.damaged |= self.life.store.counters.num_ignored_files > 0  # it could not be read at start-up
        if not self.damaged and self.num_disk_slots >= slots_before:
            assert set(resident) <= set(found), "complete blocks were not found again"
        self.counts["found again"] += len(found)
        store_audit.check_disk_contents(self.life)
        if self.shares:
            reader = open_shared_store(self.folder / "shared", self.shape.block_size, 0)
            self.counts["in the store"] += store_audit.check_shared_contents(self.contents, reader)

    def _begin(self) -> Life:
        if self.rng.random() < self._trouble:
            name = self.rng.choice(self._points)
            failpoints.arm(name, self.rng.choice([self._die_at(name), "EIO"]), self.rng.choice([1, 2]))
        try:
            store = open_store(self.folder, self.shape, self.num_disk_slots)
            return self._made(store)
        except (Crash, DiskError):
            failpoints.disarm()
            return self._made(open_store(self.folder, self.shape, self.num_disk_slots))
        finally:
            failpoints.disarm()

    def _made(self, store) -> Life:
        try:
            shared = None
            if self.shares:
                shared = open_shared_store(self.folder / "shared", self.shape.block_size, SHARED_BLOCKS)
            return Life(self, store, shared)
        except BaseException:
            store.abandon()
            raise

    # --- the disk decays

    def rot(self) -> None:
        if self._may_damage:
            self._damage(in_use=True)

    def _damage(self, *, in_use: bool = False) -> None:
        """Flip, blank, cut or copy something in one of the files."""
        paths = sorted([*(self.folder / FINGERPRINT.hex()[:16]).glob("*.kv"), *self.folder.glob("shared/*/*/*.kv")])
        if not paths:
            return
        self.damaged = True
        self.counts["damages"] += 1
        path = self.rng.choice(paths)
        kinds = ["flip", "flip", "blank", "copy"] + ([] if in_use else ["cut", "duplicate", "superblock"])
        kind, data = self.rng.choice(kinds), bytearray(path.read_bytes())
        size = len(data)
        if not size:
            return
        if kind == "flip":
            for _ in range(self.rng.choice([1, 3, 20])):
                at = self.rng.choice([self.rng.randrange(size), 4096 + self.rng.randrange(512)]) % size
                data[at] ^= 1 << self.rng.randrange(8)
        elif kind == "blank":
            at = self.rng.randrange(0, size, 4096)
            data[at : at + 4096] = self.rng.choice([bytes(4096), self.rng.randbytes(4096)])
        elif kind == "copy":
            source, target = (self.rng.randrange(0, size, 4096) for _ in range(2))
            data[target : target + 4096] = data[source : source + 4096]
        elif kind == "superblock":
            data[self.rng.randrange(80)] ^= 1
        elif kind == "duplicate":
            path = path.with_name(f"{900000 + self.new_id()}.kv")
        else:
            del data[self.rng.randrange(size) :]
        write_over(path, data)

    # --- now and then

    def look_at_disk(self) -> None:
        if failpoints.armed is None:
            store_audit.check_disk_contents(self.life)

    def rest(self) -> None:
        """Everybody goes, every move ends: all must be free."""
        failpoints.disarm()
        self.life.come_to_rest()
        store_audit.check_at_rest(self.life)


def write_over(path: Path, data: bytes) -> None:
    """In place, so that whoever has the file open sees it too."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))
    finally:
        os.close(fd)


def play(seed: int, num_operations: int, folder: Path, *, damage: bool | None = None) -> Counter:
    """One episode; whatever goes wrong says where."""
    machine = None
    try:
        machine = StoreMachine(seed, folder, damage=damage)
        machine.play(num_operations)
        machine.close()
    except Exception as error:
        done = machine.num_done if machine else 0
        raise AssertionError(f"episode of seed {seed}, operation {done} of {num_operations}: {error!r}") from error
    return machine.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--episodes", type=int, default=None, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable()  # of damaged files, which are many
    totals: Counter = Counter()
    began_s, done, seed = time.monotonic(), 0, options.seed
    while done < options.operations and seed != options.seed + (options.episodes or -1):
        num = min(EPISODE_OPERATIONS, options.operations - done)
        with tempfile.TemporaryDirectory() as folder:
            totals += play(seed, num, Path(folder))
        done, seed = done + num, seed + 1
        if (seed - options.seed) % 20 == 0:
            print(f"{done} operations, {time.monotonic() - began_s:.0f} s", flush=True)
    print(f"{done} operations in {seed - options.seed} episodes, {time.monotonic() - began_s:.0f} s")
    print(", ".join(f"{name} {count}" for name, count in sorted(totals.items())))


if __name__ == "__main__":
    main()
