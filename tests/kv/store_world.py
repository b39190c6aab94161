"""What the store machine's world is made of: memory that shows whose contents it holds, and what they must be."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from xllm.kv.block import block_digests
from xllm.kv.demotion import Demoter, Path

NUM_LAYERS = 2
MASK = 2**64 - 1


def seed_of(salt: str) -> int:
    return 1469598103934665603 ^ (hash_of_text(salt) if salt else 0)


def hash_of_text(text: str) -> int:
    return int.from_bytes(text.encode(), "big") * 0x9E3779B97F4A7C15 & MASK


class History:
    """The tokens of a conversation, and the value that each one's KV must have: it depends on all tokens up to it."""

    def __init__(self, salt: str, tokens: list[int]):
        self.salt = salt
        self.tokens: list[int] = []
        self.values: list[int] = []
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        state = self.values[-1] if self.values else seed_of(self.salt)
        for token in tokens:
            state = ((state ^ (token + 1)) * 1099511628211) & MASK
            self.tokens.append(token)
            self.values.append(state)

    def prefix(self, length: int) -> History:
        return History(self.salt, self.tokens[:length])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def array(self) -> np.ndarray:
        return np.array(self.tokens, dtype=np.int32)


class Contents:
    """For every digest ever computed: its block's bytes and its parent's digest."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.bytes_of: dict[bytes, bytes] = {}
        self.parent_of: dict[bytes, bytes] = {}

    def learn(self, history: History) -> None:
        """From now on these blocks may turn up anywhere."""
        size, parent = self.block_size, bytes(16)
        for i, digest in enumerate(block_digests(history.array, size, history.salt)):
            if digest not in self.bytes_of:
                values = np.array(history.values[i * size : (i + 1) * size], dtype=np.uint64)
                self.bytes_of[digest] = values.tobytes()
                self.parent_of[digest] = parent
            parent = digest


class Memory:
    """The device's blocks and host memory: a `Mover`. Its layers are the first and the second half of a block."""

    num_layers = NUM_LAYERS

    def __init__(self, num_blocks: int, block_size: int, num_host_slots: int):
        self.block_size = block_size
        self.num_host_slots = num_host_slots
        self.payload_bytes = block_size * 8
        self.device = np.zeros((num_blocks, block_size), dtype=np.uint64)
        self.host = np.zeros((num_host_slots, block_size), dtype=np.uint64)

    def save(self, block_ids: np.ndarray, slots: np.ndarray) -> None:
        assert len(block_ids) == len(slots) == len(set(slots.tolist())) == len(set(block_ids.tolist()))
        self.host[slots] = self.device[block_ids]

    def load_layer(self, slots: np.ndarray, block_ids: np.ndarray, layer: int) -> None:
        assert len(block_ids) == len(slots) == len(set(block_ids.tolist()))
        half = self.block_size // NUM_LAYERS
        part = slice(0, half) if layer == 0 else slice(half, None)
        self.device[block_ids, part] = self.host[slots, part]

    def payload(self, slot: int) -> memoryview:
        return memoryview(self.host[slot]).cast("B")

    def flat(self, blocks: np.ndarray) -> np.ndarray:
        """The positions of a row's tokens in the flattened device memory."""
        return (blocks.astype(np.int64)[:, None] * self.block_size + np.arange(self.block_size)).ravel()


@dataclass
class Row:
    """A running sequence. `planned` tokens have their KV written by the steps planned so far, `settled` are done."""

    row: int
    history: History
    talk: int  # which conversation it goes on with
    uid: int
    planned: int
    settled: int
    last_step: int = -1
    sampling: bool = False  # a step in flight brings its next token


@dataclass
class Work:
    row: Row
    blocks: np.ndarray
    start: int
    stop: int


@dataclass
class Step:
    number: int
    works: list[Work] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    tickets: set[int] = field(default_factory=set)


@dataclass
class Waiter:
    """A request that waits for its blocks to come up; it holds their path under `key`."""

    key: int
    history: History
    talk: int


@dataclass(frozen=True)
class Shape:
    """One episode's sizes and habits."""

    block_size: int
    num_blocks: int
    num_rows: int
    max_tokens: int
    num_host_slots: int
    num_disk_slots: int
    policy: str
    l1_share: float
    eagerness: float
    chunk: int
    prefetch: bool
    num_talks: int
    swap_lease_s: float


def random_shape(rng: random.Random, policies: tuple[str, ...]) -> Shape:
    block_size = rng.choice([2, 3, 4])
    max_tokens = block_size * rng.choice([5, 9, 14])
    blocks_per_row = max_tokens // block_size
    return Shape(block_size=block_size, num_blocks=blocks_per_row + 1 + rng.choice([0, 2, 8, 20]),
                 num_rows=rng.choice([2, 3, 5]), max_tokens=max_tokens,
                 num_host_slots=rng.choice([1, 4, 12, 30, 80]), num_disk_slots=rng.choice([2, 9, 40, 200]),
                 policy=rng.choice(policies), l1_share=rng.choice([0.0, 0.0, 0.3]),
                 eagerness=rng.choice([0.0, 0.1, 0.4]), chunk=rng.choice([1, 2, 3, 32]),
                 prefetch=rng.random() < 0.6, num_talks=rng.choice([3, 6, 10]),
                 swap_lease_s=rng.choice([0.2, 4.0, 60.0]))


def paths(demoter: Demoter) -> Iterable[Path]:
    """Those that it has not ended."""
    yield from (entry[2] for entry in demoter._queue)
    if demoter._active is not None:
        yield demoter._active
