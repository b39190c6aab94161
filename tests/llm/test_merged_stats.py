"""The stats of several engines as those of one."""

from xllm.client.merged_stats import merged_stats, merged_steps
from xllm.engine.step_log import StepLog, StepReport
from xllm.stats import EngineStats, LaneStats, ThreadStats, TierStats


def test_sums_shares_and_the_oldest():
    first = EngineStats(num_running=2, num_waiting=1, num_waiting_by_reason={"kv": 1}, num_blocks=10, num_free_blocks=5,
                        kv_usage=0.5, oldest_waiting_s=3.0, step_time_s=0.1, step_predicted_s=0.2,
                        step_cost_error={"0.5": 0.3, "0.9": 0.4}, prompt_tokens_total=7,
                        cached_tokens_by_tier_total={"l1": 1, "l2": 2}, spec_accepted_tokens_by_position_total=[3, 1],
                        threads=ThreadStats(num_threads=1, max_threads=2), kv_disk_up=True,
                        kv_tiers={"host": TierStats(num_blocks=4, num_used=4)},
                        kv_lanes={"save": LaneStats(jobs_total=2)})
    second = EngineStats(num_running=1, num_blocks=30, num_free_blocks=30, kv_usage=0.1, oldest_waiting_s=1.0,
                         step_time_s=0.4, step_predicted_s=0.3, step_cost_error={"0.5": 0.1, "0.9": 0.9},
                         prompt_tokens_total=5, cached_tokens_by_tier_total={"l2": 5},
                         spec_accepted_tokens_by_position_total=[1, 1, 4],
                         threads=ThreadStats(num_threads=2, max_threads=2), kv_disk_up=False,
                         kv_tiers={"host": TierStats(num_blocks=4, num_used=0)},
                         kv_lanes={"save": LaneStats(jobs_total=1)})
    both = merged_stats([first, second])
    assert (both.num_running, both.num_waiting, both.num_waiting_by_reason) == (3, 1, {"kv": 1})
    assert (both.num_blocks, both.num_free_blocks, both.kv_usage) == (40, 35, (5 + 3) / 40)
    assert (both.oldest_waiting_s, both.step_time_s, both.prompt_tokens_total) == (3.0, 0.4, 12)
    assert (both.step_predicted_s, both.step_cost_error) == (0.3, {"0.5": 0.3, "0.9": 0.9})
    assert both.cached_tokens_by_tier_total == {"l1": 1, "l2": 7}
    assert both.spec_accepted_tokens_by_position_total == [4, 2, 4]
    assert both.threads == ThreadStats(num_threads=3, max_threads=4) and both.graphs is None
    assert (both.kv_disk_up, both.host_usage, both.kv_lanes["save"].jobs_total) == (False, 0.5, 3)
    assert merged_stats([first]) is first
    assert merged_stats([EngineStats(), EngineStats()]) == EngineStats()


def test_steps_of_several():
    logs = [StepLog(), StepLog()]
    logs[0].note(2.0, 0.001, 5, 1)
    logs[1].note(1.0, 0.004, 20, 2)
    logs[1].note(3.0, 0.004, 20, 2)
    first, second = (log.take() for log in logs)
    both = merged_steps([first, second])
    assert sum(both.time_s.counts) == 3 and both.tokens.sum == 45 and sum(first.time_s.counts) == 1
    assert [end_s for end_s, *_ in both.recent] == [1.0, 2.0, 3.0]
    assert merged_steps([first]) is first and merged_steps([]) == StepReport()
