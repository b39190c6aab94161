"""A network between a publisher of KV events and its subscribers that loses, repeats, delays and tears messages; and
a cache that changes at random."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import zmq

from xllm.kv.block import ROOT, TIERS
from xllm.kv.event_log import CacheEvents
from xllm.routing.global_index import GlobalIndex, digest_keys


class LossyNetwork(threading.Thread):
    """From `pub` in a folder to `lossy`, where subscribers connect: it drops, repeats and delays 5 % of the batches
    each, and tears 1 %. loses_next: it drops the next one. With harms_replays also from `replay` to `lossy-replay`,
    where it does the same to answers."""

    def __init__(self, folder: Path, seed: int, *, harms_replays: bool = False):
        super().__init__(daemon=True)
        self._rng, self._is_over, self.num_harmed = random.Random(seed), False, 0
        self.loses_next = False
        self._context = zmq.Context()
        self._near, self._far = self._context.socket(zmq.SUB), self._context.socket(zmq.PUB)
        self._near.subscribe("")
        self._near.connect(f"ipc://{folder}/pub")
        self._far.bind(f"ipc://{folder}/lossy")
        self._folder, self._asking = folder, self._context.socket(zmq.ROUTER)
        self._asked: dict[bytes, zmq.Socket[bytes]] = {}  # by who asks: a connection of its own
        if harms_replays:
            self._asking.bind(f"ipc://{folder}/lossy-replay")
        self._late: list[tuple[zmq.Socket[bytes], list[bytes]]] = []
        self.start()

    def run(self) -> None:
        while not self._is_over:
            poller = zmq.Poller()
            for socket in (self._near, self._asking, *self._asked.values()):
                poller.register(socket, zmq.POLLIN)
            ready = dict(poller.poll(20))
            if self._near in ready:
                self._pass(self._far, [], self._near.recv_multipart())
            if self._asking in ready:
                name, *request = self._asking.recv_multipart()
                self._there(name).send_multipart(request)
            for name, socket in self._asked.items():
                if socket in ready:
                    self._pass(self._asking, [name], socket.recv_multipart())

    def _there(self, name: bytes) -> zmq.Socket[bytes]:
        if name not in self._asked:
            self._asked[name] = self._context.socket(zmq.DEALER)
            self._asked[name].connect(f"ipc://{self._folder}/replay")
        return self._asked[name]

    def _pass(self, to: zmq.Socket[bytes], head: list[bytes], frames: list[bytes]) -> None:
        chance = 0.0 if self.loses_next else self._rng.random()
        self.num_harmed += chance < 0.16
        self.loses_next = False
        if chance < 0.05:
            pass
        elif chance < 0.1:
            self._late.append((to, [*head, *frames]))
        elif chance < 0.11:
            to.send_multipart([*head, *frames[:-1], frames[-1][: len(frames[-1]) // 2]])
        else:
            for _ in range(2 if chance < 0.16 else 1):
                to.send_multipart([*head, *frames])
        if self._late and self._rng.random() < 0.3:
            late_to, late = self._late.pop(0)
            late_to.send_multipart(late)

    def close(self) -> None:
        self._is_over = True
        self.join()
        self._context.destroy(linger=0)


class Cache:
    """Random changes of three tiers, and what they leave: the truth."""

    def __init__(self, seed: int):
        self._rng = random.Random(seed)
        self.tiers: list[dict[bytes, None]] = [{} for _ in TIERS]

    def change(self) -> list[CacheEvents]:
        changes = []
        for tier, blocks in enumerate(self.tiers):
            removed = self._rng.sample(list(blocks), len(blocks) // 20)
            for digest in removed:
                del blocks[digest]
            stored = {self._rng.randbytes(16): ROOT for _ in range(self._rng.randrange(8))}
            blocks.update(dict.fromkeys(stored))
            changes.append(CacheEvents(tier, stored, removed))
        return changes

    def is_in(self, index: GlobalIndex, name: str) -> bool:
        return all(name in index.names and _same(index.keys_of(name, tier), digest_keys(b"".join(blocks)))
                   for tier, blocks in enumerate(self.tiers))


def _same(found: np.ndarray, wanted: np.ndarray) -> bool:
    return len(found) == len(wanted) and set(found.tolist()) == set(wanted.tolist())
