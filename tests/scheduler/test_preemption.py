"""Whose blocks are taken away, and what a plan may hold afterwards."""

import random

import numpy as np
import pytest

from tests.scheduler.harness import VOCAB, Simulation
from xllm.sequence import Status
from xllm.step import ScheduleOutput


class Watched(Simulation):
    """Counts the rows of plans whose owner does not run any longer."""

    def __init__(self, num_blocks: int, **settings):
        super().__init__(num_blocks, **settings)
        self.num_wasted, self._schedule = 0, self.scheduler.schedule
        self.scheduler.schedule = self.schedule

    def schedule(self) -> ScheduleOutput:
        plan = self._schedule()
        owners = [self.scheduler.rows.seqs[row] for row in plan.rows_S.tolist()]
        self.num_wasted += sum(owner is None or owner.status is not Status.RUNNING for owner in owners)
        return plan


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("policy", ["prefill-first", "decode-first"])  # more than one phase finds too few blocks
def test_no_step_computes_what_it_has_preempted(policy, seed):
    rng = random.Random(seed)
    simulation = Watched(30, scheduling_policy=policy, async_scheduling=seed % 2 == 0, max_num_seqs=5,
                         max_num_batched_tokens=24, enable_prefix_caching=False)
    for i in range(24):
        simulation.add(f"r{i}", [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 60))], max_tokens=30)
        for _ in range(rng.randrange(6)):
            simulation.step()
    simulation.run()
    simulation.check_outputs()
    simulation.check_idle()
    assert simulation.scheduler.counters.preemptions_total > 3
    assert simulation.num_wasted == 0


@pytest.mark.parametrize(("policy", "spared"), [("fcfs", "r0"), ("priority", "r2"), ("deadline", "r1")])
def test_the_first_in_the_order_of_the_policy_is_never_preempted(policy, spared):
    simulation = Simulation(num_blocks=24, scheduling_policy=policy, enable_prefix_caching=False)
    fields = [{}, {"deadline_s": 1.0, "priority": 1}, {"deadline_s": 2.0, "priority": -1}, {"priority": 1}]
    for i, extra in enumerate(fields):
        simulation.add(f"r{i}", np.arange(12).tolist(), max_tokens=40, **extra)
    simulation.run()
    simulation.check_outputs()
    preempted = {name: delta.num_preemptions for name, delta in simulation.finished.items()}
    assert preempted[spared] == 0 and sum(preempted.values()) > 0
