"""Roles under traffic: a load that shifts from prompts to answers and what comes of it, and traffic of any kind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.routing.role_simulation import Phase, RoleSimulation, kept
from xllm.routing.role_plan import DEFAULT_RULES
from xllm.routing.roles import HANDS_OVER, TAKES_OVER, Role

ROLES: list[Role] = ["PREFILL"] * 3 + ["DECODE"] * 5
SHIFT = (Phase(40.0, 6.0, 6000, 30), Phase(30.0, 27.0, 300, 500))  # of prompts, then of answers
QUIET = Phase(40.0, 0.0, 1, 1)


def simulated(phases: tuple[Phase, ...], *, is_dynamic: bool = True) -> RoleSimulation:
    simulation = RoleSimulation(ROLES, is_dynamic=is_dynamic)
    for phase in (*phases, QUIET):
        simulation.run(phase)
    return simulation


def test_a_load_that_shifts_is_followed() -> None:
    turned, still = simulated(SHIFT), simulated(SHIFT[:1], is_dynamic=False)
    first = [(flip.role, flip.reason) for at_s, flip in turned.flips if at_s < 40.0]
    then = [(flip.role, flip.reason) for at_s, flip in turned.flips if at_s >= 40.0]
    assert first and set(first) == {("PREFILL", "ttft")} and then and {role for role, _ in then} == {"DECODE"}
    assert len(turned.flips) <= 10 and not still.flips
    look = {round(look.now_s): look for look in turned.looks}
    assert look[39].num_prefill > 3 and look[69].num_decode > look[39].num_decode
    assert len(turned.times) > 900 and not turned.open_ids(), "nothing is lost on the way"
    assert kept(time for time in turned.times if time[0] < 40.0) > kept(still.times) + 0.1


@given(phases=st.lists(st.builds(Phase, seconds=st.sampled_from([3.0, 10.0]), rate=st.floats(0.0, 8.0),
                                 num_prompt=st.sampled_from([50, 1000, 6000]), num_output=st.sampled_from([5, 200])),
                       min_size=1, max_size=3),
       roles=st.lists(st.sampled_from(["PREFILL", "DECODE", "DECODE", "MIX", "DEFAULT"]), min_size=2, max_size=6),
       seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_any_traffic(phases: list[Phase], roles: list[Role], seed: int) -> None:
    """Each request finds instances, whatever roles there are; nobody flaps; and what must remain does."""
    simulation = RoleSimulation(roles, seed=seed)
    for phase in phases:
        simulation.run(phase)
        for able, least in ((HANDS_OVER, DEFAULT_RULES.min_prefill), (TAKES_OVER, DEFAULT_RULES.min_decode)):
            before, now = (sum(role in able for role in some) for some in (roles, simulation.roles.values()))
            assert now >= min(least, before)
    for _ in range(30):
        if simulation.open_ids():
            simulation.run(Phase(20.0, 0.0, 1, 1))
    assert simulation.open_ids() == []
    figures = simulation.fleet.roles(1e4, {}).instances
    assert all((view.queue_s, view.num_waiting) == (0.0, 0) for view in figures), "no counter has drifted"
    for name in simulation.roles:
        times = [at_s for at_s, flip in simulation.flips if flip.name == name]
        for start_s in times:
            assert sum(start_s <= at_s < start_s + DEFAULT_RULES.dwell_s for at_s in times) <= 2


def test_a_load_that_stays_is_left_alone() -> None:
    simulation = simulated((Phase(60.0, 4.0, 3000, 100),))
    assert not [at_s for at_s, _ in simulation.flips if 30.0 < at_s < 60.0]
    assert kept(simulation.times) == pytest.approx(1.0, abs=0.15)
