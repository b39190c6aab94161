"""How long it takes to look a key up says nothing about the key: measured; `test_auth.py` looks at the code."""

from __future__ import annotations

import gc
import hashlib
import random
import time

import numpy as np

from serving.security.keys import KeyRing, build_key_ring

NUM_TRIES = 100_000
TRIMMED = 0.25  # of the slowest tries: interrupts, other processes


def keys_to_try() -> dict[str, bytes]:
    """Of one length, as it is the caller's own: right and nearly right ones, and some that begin with nothing right."""
    first, last = b"sk-" + b"a" * 40, b"sk-" + b"z" * 40
    return {"first": first, "last": last, "first-but-its-end": first[:-1] + b"b", "last-but-its-end": last[:-1] + b"y",
            "first-but-its-beginning": b"t" + first[1:], "nothing-right": b"Q" * 43}


def tries(ring: KeyRing, keys: list[bytes], order: list[int]) -> np.ndarray:
    """Nanoseconds of each lookup."""
    find, clock, times = ring.find, time.perf_counter_ns, []
    for index in order:
        key = keys[index]
        started = clock()
        find(key)
        times.append(clock() - started)
    return np.array(times)


def test_right_keys_near_misses_and_far_misses_take_as_long() -> None:
    """In random order, so that what else the machine does falls on all alike.

    Medians and trimmed means lie within what a second, equal key of the same kind differs by, or 2 %, whichever is
    more: a comparison that ends at the first wrong key of twenty, or at the first right one, is off by 40 % and more.
    """
    kinds = keys_to_try()
    between = [f"sk-{n:040d}" for n in range(18)]
    ring = build_key_ring(api_keys=[kinds["first"].decode(), *between, kinds["last"].decode()])
    names, keys = [*kinds, "control"], [*kinds.values(), b"R" * 43]
    order = random.Random(0).choices(range(len(keys)), k=NUM_TRIES)
    tries(ring, keys, order[:2000])
    gc.disable()
    try:
        found = tries(ring, keys, order)
    finally:
        gc.enable()
    assert [ring.find(key) is not None for key in keys] == [True, True, False, False, False, False, False]
    chosen = np.array(order)
    by_name = {name: np.sort(found[chosen == index]) for index, name in enumerate(names)}
    medians = {name: float(np.median(times)) for name, times in by_name.items()}
    means = {name: float(times[:int(len(times) * (1 - TRIMMED))].mean()) for name, times in by_name.items()}
    for figures in (medians, means):
        usual = figures["nothing-right"]
        noise = max(0.02 * usual, 3 * abs(figures["control"] - usual))
        assert {name: figure for name, figure in figures.items() if abs(figure - usual) > noise} == {}, figures


def test_the_measure_finds_a_lookup_that_ends_early() -> None:
    """Or the test above could not fail."""
    class Early(KeyRing):
        def find(self, key: bytes):  # type: ignore[no-untyped-def]
            given = hashlib.sha256(key).digest()
            return next((caller for known, caller in self._entries if known == given), None)

    kinds = keys_to_try()
    ring = build_key_ring(api_keys=[kinds["first"].decode(), *(f"sk-{n:040d}" for n in range(19))])
    ring.__class__ = Early
    keys = [kinds["first"], kinds["nothing-right"]]
    order = random.Random(0).choices((0, 1), k=10_000)
    found, chosen = tries(ring, keys, order), np.array(order)
    assert np.median(found[chosen == 0]) < 0.9 * np.median(found[chosen == 1])
