"""Blocks that a device keeps to itself: no row gets one, whatever happens, and nobody misses them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.scheduler.harness import Simulation


class Watched(Simulation):
    """Notes every block that was ever in a row's table."""

    def __init__(self, num_blocks: int, **settings):
        super().__init__(num_blocks, **settings)
        self.seen: set[int] = set()

    def step(self):
        kv = self.scheduler.kv
        deltas = super().step()
        for row, count in enumerate(kv.num_blocks_R.tolist()):
            self.seen.update(kv.block_table_RM[row, :count].tolist())
        return deltas


@pytest.mark.parametrize("num_reserved", [1, 3])
def test_a_crowd_uses_all_others(num_reserved: int) -> None:
    """Prefix hits, eviction and preemption in a pool that is too small for all."""
    simulation = Watched(24 + num_reserved, num_reserved_blocks=num_reserved, block_size=4)
    rng = np.random.default_rng(0)
    shared = rng.integers(8, 50, size=20).tolist()
    for i in range(30):
        own = rng.integers(8, 50, size=int(rng.integers(1, 40))).tolist()
        simulation.add(f"r{i}", shared[: int(rng.integers(0, 20))] + own, max_tokens=int(rng.integers(1, 30)))
    simulation.run()
    simulation.check_outputs()
    simulation.check_idle()
    assert simulation.scheduler.counters.preemptions_total and simulation.scheduler.kv.pool.num_evicted
    assert simulation.seen == set(range(num_reserved, 24 + num_reserved))
    assert simulation.scheduler.kv.usage == 0.0


def test_the_longest_sequence_must_fit_beside_them() -> None:
    Simulation(25, num_reserved_blocks=1)
    with pytest.raises(AssertionError, match="the longest sequence"):
        Simulation(24, num_reserved_blocks=1)
