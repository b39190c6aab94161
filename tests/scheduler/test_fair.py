"""The fair policy: tenants that wait are served equally many tokens, whatever they send."""

import random

import pytest

from tests.scheduler.harness import Simulation
from xllm.scheduler.fair import OUTPUT_COST, PROMPT_COST


def prompt_of(length: int, start: int = 0) -> list[int]:
    return [(start * 7 + i * 3) % 50 for i in range(length)]


def fair(**settings) -> Simulation:
    return Simulation(scheduling_policy="fair", enable_prefix_caching=False, **settings)


def served(simulation: Simulation, *tenants: str) -> list[float]:
    return [simulation.scheduler.waiting.served(tenant) for tenant in tenants]


def waits(simulation: Simulation, tenant: str) -> bool:
    return any(seq.request.tenant == tenant for seq in simulation.scheduler.waiting)


def test_a_flood_delays_only_itself():
    """Forty requests of one tenant stand before the two of another."""
    ended = {}
    for policy in ("fcfs", "fair"):
        simulation = Simulation(scheduling_policy=policy, max_num_seqs=2)
        for i in range(40):
            simulation.add(f"flood{i}", prompt_of(9, i), tenant="flood")
        for i in range(2):
            simulation.add(f"quiet{i}", prompt_of(9, 50 + i), tenant="quiet")
        simulation.run()
        simulation.check_outputs()
        simulation.check_idle()
        order = list(simulation.finished)
        ended[policy] = max(order.index(f"quiet{i}") for i in range(2))
    assert ended["fcfs"] == 41
    assert ended["fair"] <= 5


def test_tenants_that_always_wait_differ_by_the_papers_bound():
    """The paper proves: at most 2 max(w_p longest prompt, w_q tokens of a full batch) apart at any time."""
    simulation = fair(max_num_seqs=3)
    for i in range(60):
        simulation.add(f"long{i}", prompt_of(30, i), tenant="long", max_tokens=4)
        simulation.add(f"short{i}", prompt_of(3, i), tenant="short", max_tokens=12)
    bound = 2 * max(PROMPT_COST * 30, OUTPUT_COST * 3 * 42)
    num_steps, worst = 0, 0.0
    while waits(simulation, "long") and waits(simulation, "short"):
        simulation.step()
        a, b = served(simulation, "long", "short")
        worst, num_steps = max(worst, abs(a - b)), num_steps + 1
    assert num_steps > 50
    assert worst <= bound
    assert worst <= 100, "in fact about one request's cost for each of the three rows"
    assert min(served(simulation, "long", "short")) > 5 * worst, "else the bound says nothing"


def test_weights_share_accordingly():
    simulation = fair(max_num_seqs=2)
    for i in range(60):
        simulation.add(f"a{i}", prompt_of(6, i), tenant="a", tenant_weight=3.0)
        simulation.add(f"b{i}", prompt_of(6, i), tenant="b")
    while waits(simulation, "a"):
        simulation.step()
    done = [sum(name.startswith(tenant) for name in simulation.finished) for tenant in "ab"]
    assert done[0] / done[1] == pytest.approx(3.0, rel=0.2)


def test_time_away_earns_no_credit():
    """A tenant that comes late shares from then on; it does not first get what it never asked for."""
    simulation = fair(max_num_seqs=1)
    for i in range(30):
        simulation.add(f"old{i}", prompt_of(6, i), tenant="old")
    while len(simulation.finished) < 15:
        simulation.step()
    for i in range(10):
        simulation.add(f"new{i}", prompt_of(6, i), tenant="new")
    before = len(simulation.finished)
    while len(simulation.finished) < before + 10:
        simulation.step()
    last = list(simulation.finished)[before:]
    assert 4 <= sum(name.startswith("new") for name in last) <= 6


def test_priority_orders_a_tenants_own_requests_only():
    simulation = fair(max_num_seqs=1)
    simulation.add("a-first", prompt_of(6), tenant="a")
    simulation.add("a-late", prompt_of(6, 1), tenant="a", priority=5)
    simulation.add("a-soon", prompt_of(6, 2), tenant="a", priority=-5)
    simulation.add("b-only", prompt_of(6, 3), tenant="b", priority=9)
    simulation.run()
    order = list(simulation.finished)
    assert order.index("a-soon") < order.index("a-first") < order.index("a-late")
    assert order.index("b-only") <= 1, "its priority is a word between b and b"


def test_what_a_cache_holds_is_not_charged():
    simulation = Simulation(scheduling_policy="fair", max_num_seqs=1)
    simulation.add("first", prompt_of(25), tenant="a", max_tokens=1)
    simulation.run()
    cold = served(simulation, "a")[0]
    simulation.add("again", prompt_of(25), tenant="a", max_tokens=1)
    simulation.run()
    assert cold == 25 * PROMPT_COST + OUTPUT_COST
    assert served(simulation, "a")[0] - cold <= 5 * PROMPT_COST + OUTPUT_COST


def test_offline_requests_still_yield():
    simulation = fair(max_num_seqs=1)
    for i in range(3):
        simulation.add(f"batch{i}", prompt_of(6, i), tenant="a", offline=True)
    for i in range(6):
        simulation.add(f"online{i}", prompt_of(6, i), tenant="b")
    simulation.run()
    assert [name for name in simulation.finished if name.startswith("batch")] == list(simulation.finished)[-3:]


@pytest.mark.parametrize("seed", range(8))
def test_random_tenants_leave_nothing_behind(seed):
    """Few blocks, so that requests are preempted; some are aborted. Everything is audited after every step."""
    rng = random.Random(seed)
    simulation = Simulation(num_blocks=30, scheduling_policy="fair", max_num_seqs=rng.choice([1, 3, 5]),
                            async_scheduling=rng.random() < 0.5)
    for i in range(40):
        simulation.add(f"r{i}", prompt_of(rng.randint(1, 60), rng.randint(0, 3)), max_tokens=rng.randint(1, 20),
                       tenant=rng.choice("abc"), tenant_weight=rng.choice([1.0, 2.0]), priority=rng.randint(-1, 1),
                       offline=rng.random() < 0.2, cache_salt=rng.choice(["", "x"]))
        if rng.random() < 0.2:
            simulation.scheduler.abort(f"r{rng.randint(0, i)}")
        for _ in range(rng.randint(0, 3)):
            simulation.step()
    simulation.run()
    assert len(simulation.finished) == 40
    simulation.check_outputs()
    simulation.check_idle()


def test_a_newcomer_gets_a_row_that_another_has_too_many_of():
    """Four rows that one tenant holds for a long time: the other has its first token after a few steps, and half of the
    rows soon; what was preempted ends as it must."""
    simulation = fair(max_num_seqs=4, num_blocks=256)
    for i in range(12):
        simulation.add(f"long{i}", prompt_of(9, i), tenant="many", max_tokens=60)
    for _ in range(10):
        simulation.step()
    for i in range(3):
        simulation.add(f"quick{i}", prompt_of(5, 20 + i), tenant="few", max_tokens=20)
    num_steps = 0
    while not all(simulation.outputs[f"quick{i}"] for i in range(2)):
        simulation.step()
        num_steps += 1
    assert num_steps <= 16
    assert simulation.scheduler.counters.preemptions_total == 2, "two of four are its part, no more are taken"
    simulation.run()
    simulation.check_outputs()
    simulation.check_idle()


def test_a_newcomer_gets_blocks_that_another_has_too_many_of():
    """Rows are free, blocks are not: two long sequences hold nearly all."""
    simulation = fair(max_num_seqs=4, num_blocks=30)
    for i in range(2):
        simulation.add(f"long{i}", prompt_of(40, i), tenant="many", max_tokens=50)
    for _ in range(8):
        simulation.step()
    simulation.add("quick", prompt_of(24, 3), tenant="few", max_tokens=20)
    num_steps = 0
    while not simulation.outputs["quick"]:
        simulation.step()
        num_steps += 1
    assert num_steps <= 16 and simulation.scheduler.counters.preemptions_total == 1
    simulation.run()
    simulation.check_outputs()
    simulation.check_idle()


def test_whoever_holds_most_blocks_makes_room_for_the_others_growth():
    """Blocks are short because one tenant's sequences grow: the other's, which came later, are not preempted."""
    simulation = fair(max_num_seqs=8, num_blocks=60)
    for i in range(6):
        simulation.add(f"long{i}", prompt_of(20, i), tenant="many", max_tokens=60)
    for _ in range(8):
        simulation.step()
    for i in range(2):
        simulation.add(f"quick{i}", prompt_of(8, 10 + i), tenant="few", max_tokens=40)
    while not all(f"quick{i}" in simulation.finished for i in range(2)):
        simulation.step()
    assert all(simulation.finished[f"quick{i}"].num_preemptions == 0 for i in range(2))
    assert simulation.scheduler.counters.preemptions_total > 0, "else nobody was short of blocks"
    simulation.run()
    simulation.check_outputs()
    simulation.check_idle()


def test_more_tenants_than_rows_take_turns():
    simulation = fair(max_num_seqs=2, num_blocks=1024, max_model_len=2048, max_num_batched_tokens=64)
    for name in "abc":
        simulation.add(name, prompt_of(9), tenant=name, max_tokens=1500)
    for _ in range(1300):
        simulation.step()
    assert min(len(simulation.outputs[name]) for name in "abc") > 100, "nobody waits until another has ended"
