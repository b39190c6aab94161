"""What each setting of the scheduler promises, one at a time."""

import numpy as np
import pytest

from tests.scheduler.harness import Simulation
from xllm.errors import RequestError
from xllm.request import FinishReason


def prompt_of(length: int, start: int = 0) -> list[int]:
    return [(start + i) % 50 for i in range(length)]


def order_of_finish(simulation: Simulation) -> list[str]:
    simulation.run()
    simulation.check_outputs()
    return list(simulation.finished)


@pytest.mark.parametrize(
    ("policy", "fields", "order"),
    [
        ("fcfs", [{}, {}, {}], ["r0", "r1", "r2"]),
        ("priority", [{"priority": 2}, {"priority": 0}, {"priority": 1}], ["r1", "r2", "r0"]),
        ("deadline", [{}, {"deadline_s": 9.0}, {"deadline_s": 3.0}], ["r2", "r1", "r0"]),
        ("online-first", [{"offline": True}, {}, {}], ["r1", "r2", "r0"]),
    ],
)
def test_policy_orders_requests(policy, fields, order):
    simulation = Simulation(scheduling_policy=policy, max_num_seqs=1)
    for i, extra in enumerate(fields):
        simulation.add(f"r{i}", prompt_of(5, i), **extra)
    assert order_of_finish(simulation) == order


def test_sjf_admits_the_shortest_prompt_first():
    simulation = Simulation(scheduling_policy="sjf", max_num_seqs=1)
    for name, length in (("long", 30), ("short", 3), ("middle", 12)):
        simulation.add(name, prompt_of(length))
    assert order_of_finish(simulation) == ["short", "middle", "long"]


@pytest.mark.parametrize(("policy", "decodes"), [("decode-first", True), ("prefill-first", False)])
def test_budget_goes_to_the_phase_that_the_policy_names(policy, decodes):
    simulation = Simulation(scheduling_policy=policy, max_num_batched_tokens=4, async_scheduling=False)
    simulation.add("first", prompt_of(3), max_tokens=40)
    while not simulation.outputs["first"]:
        simulation.step()
    simulation.add("second", prompt_of(20, 7))
    before = len(simulation.outputs["first"])
    for _ in range(4):
        simulation.step()
    assert (len(simulation.outputs["first"]) > before) == decodes


def test_long_prompts_are_chunked_and_do_not_stop_others():
    simulation = Simulation(max_num_batched_tokens=8, async_scheduling=False)
    simulation.add("talker", prompt_of(4), max_tokens=30)
    while not simulation.outputs["talker"]:
        simulation.step()
    simulation.add("long", prompt_of(60, 9))
    steps = 0
    before = len(simulation.outputs["talker"])
    while not simulation.outputs["long"]:
        simulation.step()
        steps += 1
    assert steps == 9  # 60 tokens, 7 a step beside the talker's one
    assert len(simulation.outputs["talker"]) - before == steps


def test_online_request_preempts_an_offline_one_that_holds_the_only_row():
    simulation = Simulation(max_num_seqs=1)
    simulation.add("offline", prompt_of(8), offline=True, max_tokens=60)
    for _ in range(6):
        simulation.step()
    simulation.add("online", prompt_of(8, 3))
    assert order_of_finish(simulation) == ["online", "offline"]
    assert simulation.finished["offline"].num_preemptions == 1


def test_online_request_waits_when_preempting_offline_is_off():
    simulation = Simulation(max_num_seqs=1, online_preempts_offline=False)
    simulation.add("offline", prompt_of(8), offline=True, max_tokens=20)
    simulation.step()
    simulation.add("online", prompt_of(8, 3))
    assert order_of_finish(simulation) == ["offline", "online"]


@pytest.mark.parametrize("overlap", [False, True])
def test_too_few_blocks_preempt_the_last_and_lose_nothing(overlap):
    simulation = Simulation(num_blocks=24, async_scheduling=overlap, enable_prefix_caching=False)
    for i in range(4):
        simulation.add(f"r{i}", prompt_of(12, i * 7), max_tokens=40)
    simulation.run()
    simulation.check_outputs()
    simulation.check_idle()
    assert simulation.scheduler.counters.preemptions_total > 0
    assert simulation.finished["r0"].num_preemptions == 0


def test_watermark_keeps_blocks_free_at_admission():
    counts = {}
    for watermark in (0.0, 0.4):
        simulation = Simulation(num_blocks=40, watermark=watermark, enable_prefix_caching=False)
        for i in range(4):
            simulation.add(f"r{i}", prompt_of(36, i * 7), max_tokens=40)
        simulation.run()
        simulation.check_outputs()
        counts[watermark] = simulation.scheduler.counters.preemptions_total
    assert counts[0.4] < counts[0.0]


def test_prefix_hit_is_reported_and_recomputes_one_token_only():
    simulation = Simulation(block_size=4)
    simulation.add("a", prompt_of(16), seed=1)
    simulation.run()
    simulation.add("same", prompt_of(16), seed=2)
    simulation.add("longer", prompt_of(20), seed=3)
    simulation.run()
    simulation.check_outputs()
    assert simulation.finished["same"].num_cached_tokens == 15
    assert simulation.finished["longer"].num_cached_tokens == 16


def test_cache_salt_separates_tenants():
    simulation = Simulation(block_size=4)
    simulation.add("a", prompt_of(16), cache_salt="one")
    simulation.run()
    simulation.add("b", prompt_of(16), cache_salt="two")
    simulation.add("c", prompt_of(16), cache_salt="one")
    # The memory model knows one salt only; what is checked here is what the scheduler believes.
    simulation.run()
    assert simulation.finished["b"].num_cached_tokens == 0
    assert simulation.finished["c"].num_cached_tokens == 15


def test_equal_prompts_at_once_end_up_in_the_same_blocks():
    simulation = Simulation(block_size=4, num_blocks=64)
    for i in range(3):
        simulation.add(f"r{i}", prompt_of(32), max_tokens=30)
    for _ in range(12):
        simulation.step()
    tables = [simulation.scheduler.kv.block_table_RM[row, :8] for row in simulation.scheduler.running.rows()]
    assert len(tables) == 3
    assert all(np.array_equal(tables[0], other) for other in tables[1:])
    simulation.run()
    simulation.check_outputs()
    simulation.check_idle()


@pytest.mark.parametrize("overlap", [False, True])
def test_abort_in_every_state_frees_everything_and_ends_once(overlap):
    for steps in range(12):
        simulation = Simulation(async_scheduling=overlap, max_num_seqs=2, max_num_batched_tokens=8)
        for i in range(3):
            simulation.add(f"r{i}", prompt_of(20, i))
        for _ in range(steps):
            simulation.step()
        for i in range(3):
            simulation.scheduler.abort(f"r{i}")
            simulation.scheduler.abort(f"r{i}")
        simulation.run()
        assert len(simulation.finished) == 3
        assert {d.finish_reason for d in simulation.finished.values()} <= {FinishReason.ABORT, FinishReason.LENGTH}
        simulation.check_idle()


def test_add_refuses_what_can_never_run():
    simulation = Simulation(max_waiting_requests=2)
    with pytest.raises(RequestError, match="empty"):
        simulation.add("empty", [])
    with pytest.raises(RequestError, match="95"):
        simulation.add("long", prompt_of(96))
    simulation.add("a", [1])
    with pytest.raises(RequestError, match="'a' is in use"):
        simulation.add("a", [2])
    simulation.add("b", [1])
    with pytest.raises(RequestError, match="queue is full"):
        simulation.add("c", [1])


def test_a_limit_on_all_requests_counts_running_and_waiting_ones():
    simulation = Simulation(max_concurrent_requests=3, max_num_seqs=2)
    for name in "abc":
        simulation.add(name, prompt_of(5))
    simulation.step()
    assert simulation.scheduler.num_running == 2
    assert len(simulation.scheduler.waiting) == 1
    with pytest.raises(RequestError, match=r"the engine is full \(3 requests\)") as refused:
        simulation.add("d", prompt_of(5))
    assert refused.value.field is None  # nothing is wrong with the request
    simulation.scheduler.abort("c")
    simulation.add("d", prompt_of(5))
    simulation.run()
    simulation.add("e", prompt_of(5))
    simulation.run()
    assert set(simulation.finished) == set("abcde")


def test_no_limit_on_all_requests_unless_it_is_set():
    simulation = Simulation()
    for i in range(300):
        simulation.add(f"r{i}", [1])
    assert len(simulation.scheduler.waiting) == 300


def test_length_ends_at_max_model_len():
    simulation = Simulation(max_model_len=24)
    simulation.add("r", prompt_of(20), max_tokens=None)
    simulation.run()
    assert len(simulation.outputs["r"]) == 4
    assert simulation.finished["r"].finish_reason is FinishReason.LENGTH
