"""The disk store against a dictionary: any order of writes, reads, crashes, damage and new capacities."""

import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.kv.disk_helper import (
    GEOMETRY,
    SEGMENT_SLOTS,
    Crash,
    armed,
    crash,
    digest_of,
    holds,
    listed,
    open_store,
    segments,
    write,
)
from xllm.kv import failpoints
from xllm.kv.disk_format import HEADER_BYTES

SLOTS, BLOCKS = st.integers(0, 6), st.integers(0, 5)
POINTS = st.sampled_from(sorted(name for name in failpoints.NAMES if name.startswith("disk.")))


class DiskMachine(RuleBasedStateMachine):
    """`blocks`: {slot: block} of what must be served; `spoilt`: those with a damaged payload, which no scan sees."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.blocks, self.spoilt, self.store = {}, {}, None

    @initialize(num_slots=st.integers(1, 7))
    def first_open(self, num_slots):
        self.store = open_store(self.path, num_slots)

    def teardown(self):
        if self.store is not None:
            self.store.close()
        self.folder.cleanup()

    def forget(self, slot):
        self.blocks.pop(slot, None)
        self.spoilt.pop(slot, None)

    def reopen(self, num_slots):
        self.store.abandon()
        for slot in range(num_slots, 7):
            self.forget(slot)
        self.store = open_store(self.path, num_slots)

    @rule(slot=SLOTS, block=BLOCKS)
    def write(self, slot, block):
        slot %= self.store.num_slots
        write(self.store, slot, block)
        self.forget(slot)
        self.blocks[slot] = block

    @rule(slot=SLOTS)
    def erase(self, slot):
        self.store.erase(slot % self.store.num_slots)
        self.forget(slot % self.store.num_slots)

    @rule(num_slots=st.integers(1, 7))
    def open(self, num_slots):
        self.reopen(num_slots)

    @rule(slot=SLOTS, block=BLOCKS, point=POINTS, turn=st.integers(1, 4))
    def crash_while_writing(self, slot, block, point, turn):
        slot %= self.store.num_slots
        try:
            with armed(point, crash, turn):
                write(self.store, slot, block)
        except Crash:
            self.reopen(self.store.num_slots)
            found = listed_somewhere(self.store, slot)
            assert found in {None, *map(digest_of, {block, *self.of(slot)})}
            if found is None:
                self.forget(slot)
            elif found == digest_of(block) and slot not in self.spoilt:
                self.blocks[slot] = block
            elif found == digest_of(block) and holds(self.store, slot, block):
                self.forget(slot)
                self.blocks[slot] = block
        else:
            self.forget(slot)
            self.blocks[slot] = block

    def of(self, slot):
        return {book[slot] for book in (self.blocks, self.spoilt) if slot in book}

    @rule(num_slots=st.integers(1, 7), point=POINTS, turn=st.integers(1, 3))
    def crash_while_opening(self, num_slots, point, turn):
        self.store.abandon()
        try:
            with armed(point, crash, turn):
                self.store = open_store(self.path, num_slots)
        except Crash:
            self.store = open_store(self.path, num_slots)
        for slot in range(num_slots, 7):
            self.forget(slot)

    @rule(slot=SLOTS, byte=st.integers(0, 5999))
    def flip_payload(self, slot, byte):
        slot %= self.store.num_slots
        if slot in self.blocks:
            self.spoil(slot, GEOMETRY.payload_offset(slot % SEGMENT_SLOTS) + byte)
            self.spoilt[slot] = self.blocks.pop(slot)

    @rule(slot=SLOTS, byte=st.integers(0, HEADER_BYTES - 1))
    def flip_header(self, slot, byte):
        slot %= self.store.num_slots
        if self.of(slot):
            self.spoil(slot, GEOMETRY.header_offset(slot % SEGMENT_SLOTS) + byte)
            self.forget(slot)

    def spoil(self, slot, offset):
        number = slot // SEGMENT_SLOTS
        (path,) = (path for path in segments(self.path) if path.read_bytes()[12] == number)
        with open(path, "r+b") as file:
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)

    @rule(choice=st.integers(0, 3), num_pages=st.integers(1, 6))
    def truncate(self, choice, num_pages):
        paths = segments(self.path)
        if not paths:
            return
        path = paths[choice % len(paths)]
        self.store.abandon()
        first = path.read_bytes()[12] * SEGMENT_SLOTS
        os.truncate(path, min(path.stat().st_size, num_pages * 4096))
        for index in range(SEGMENT_SLOTS):
            if path.stat().st_size < GEOMETRY.payload_offset(index + 1):
                self.forget(first + index)
        self.store = open_store(self.path, self.store.num_slots)

    @invariant()
    def serves_what_the_dictionary_holds(self):
        if self.store is None:
            return
        newest = listed(self.store)
        expected = {slot: digest_of(block) for slot, block in (self.blocks | self.spoilt).items()}
        assert set(newest.items()) <= set(expected.items())
        assert set(newest.values()) == set(expected.values())
        for slot, block in self.blocks.items():
            assert holds(self.store, slot, block)
        for slot in range(self.store.num_slots):
            assert self.blocks.get(slot) == 0 or not holds(self.store, slot, 0)
            assert slot not in self.spoilt or not holds(self.store, slot, self.spoilt[slot])


def listed_somewhere(store, slot):
    """The digest in this slot's header if it is good, also where a newer copy hides it from the scan."""
    return next((digest_of(block) for block in range(6) if header_names(store, slot, block)), None)


def header_names(store, slot, block) -> bool:
    before = dict(store.counters.misses)
    if holds(store, slot, block):
        return True
    return store.counters.misses["corrupt"] > before["corrupt"]


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, database=None,
                                    derandomize=True, suppress_health_check=list(HealthCheck))  # fmt: skip
