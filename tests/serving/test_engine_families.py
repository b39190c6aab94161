"""What `xllm/stats.py` declares is what `/metrics` and `/v1/stats` show: names, types, labels, and when."""

from __future__ import annotations

from dataclasses import fields

import pytest

from serving.api.routes.stats import engine_json
from serving.observe.caller_log import CallerFigures
from serving.observe.engine_history import HISTORY_COLUMNS, history_row
from serving.observe.metrics.engine_families import stats_families
from serving.observe.metrics.families import LABELS, Families
from xllm.shown import shown_in
from xllm.stats import Counters, EngineStats, GraphStats, LaneStats, SourceStats, ThreadStats, TierStats

ALWAYS = """
counter engine_steps
counter generation_tokens
counter kv_tier_hit_tokens tier
counter num_preemptions
counter prefix_cache_hits
counter prefix_cache_queries
counter prompt_tokens
counter prompt_tokens_cached
counter spec_decode_num_accepted_tokens
counter spec_decode_num_draft_tokens
counter spec_decode_num_drafts
gauge gpu_cache_usage_perc
gauge kv_cache_usage_perc
gauge num_free_kv_blocks
gauge num_kv_blocks
gauge num_requests_running
gauge num_requests_waiting
gauge num_requests_waiting_by_reason reason
gauge oldest_waiting_seconds
gauge step_cost_error_ratio quantile
gauge step_time_predicted_seconds
gauge step_time_seconds
"""
DRAFTS = "counter spec_decode_num_accepted_tokens_per_pos position"
GRAPHS = """
counter graph_changes change
counter graph_fallbacks reason
counter graph_fed_steps
counter graph_replays kind
gauge graph_memory_bytes
gauge graphs
"""
THREADS = """
counter cpu_threads_lowered
gauge cpu_threads
gauge cpu_threads_max
"""
TIERS = """
counter external_prefix_cache_hits
counter external_prefix_cache_queries
counter kv_prefetched_blocks outcome
counter kv_tier_evicted_blocks tier
counter kv_tier_unsaved_blocks tier
counter num_swaps
gauge cpu_cache_usage_perc
gauge kv_tier_blocks tier
gauge kv_tier_held_blocks tier
gauge kv_tier_used_blocks tier
"""
LANES = """
counter kv_lane_busy_seconds lane
counter kv_lane_bytes lane
counter kv_lane_jobs lane
counter kv_lane_wait_seconds lane
gauge kv_lane_queued_jobs lane
"""
DISK = """
counter kv_disk_broken_blocks kind
gauge kv_disk_up tier
"""
MEMBERS = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_kv_blocks", "num_free_kv_blocks",
    "engine_steps", "step_time_seconds", "step_time_predicted_seconds", "step_cost_error", "oldest_waiting_seconds",
    "prompt_tokens", "prompt_tokens_cached",
    "generation_tokens", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits", "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens", "kv_tiers", "kv_lanes", "cached_tokens_by_tier", "kv_disk_up", "kv_store_up",
    "graphs", "threads"}
HOST = {"device": TierStats(num_blocks=8, num_used=4), "host": TierStats(num_blocks=4, num_used=1)}
STORE = """
counter kv_store_broken_blocks kind
gauge kv_disk_up tier
"""
WITH_STORE = {**HOST, "store": TierStats(num_blocks=9, num_used=3, missed_total={"gone": 1})}
WITH_DISK = {**HOST, "disk": TierStats(num_blocks=9, missed_total={"torn": 2})}
LANE = {"save": LaneStats(queued=1, bytes_total=5)}


def shown(stats: EngineStats) -> dict[str, dict[tuple[str, ...], float]]:
    """"type name labels" -> label values -> value, besides the labels that all have."""
    found = {}
    for family in stats_families(Families("x", ("m", "0")), stats):
        labels = [label for label in (family.samples[0].labels if family.samples else ()) if label not in LABELS]
        line = " ".join([family.type, family.name.removeprefix("x:"), *labels])
        assert line not in found
        found[line] = {tuple(sample.labels[label] for label in labels): sample.value for sample in family.samples}
    return found


@pytest.mark.parametrize(("extra", "more"), [
    ({}, ""),
    ({"spec_accepted_tokens_by_position_total": [3, 1]}, DRAFTS),
    ({"graphs": GraphStats(replays_total={"decode": 1}, fallbacks_total={"no_bucket": 1})}, GRAPHS),
    ({"threads": ThreadStats(num_threads=1)}, THREADS),
    ({"kv_tiers": HOST, "kv_lanes": LANE, "prefetched_blocks_total": {"right": 1}}, TIERS + LANES),
    ({"kv_tiers": WITH_DISK, "kv_lanes": LANE, "prefetched_blocks_total": {"right": 1}, "kv_disk_up": True},
     TIERS + LANES + DISK),
    ({"kv_tiers": WITH_STORE, "kv_lanes": LANE, "prefetched_blocks_total": {"right": 1}, "kv_store_up": True},
     TIERS + LANES + STORE),
], ids=["least", "drafts", "graphs", "threads", "host", "disk", "store"])
def test_the_families_of_an_engine(extra: dict, more: str) -> None:
    stats = EngineStats(num_waiting_by_reason={"kv": 1}, cached_tokens_by_tier_total={"l1": 1}, step_predicted_s=0.1,
                        step_cost_error={"0.5": 0.02}, **extra)
    assert sorted(shown(stats)) == sorted(line for line in (ALWAYS + more).splitlines() if line)


def test_values_and_what_follows_from_others() -> None:
    found = shown(EngineStats(
        kv_usage=0.5, prefix_queries_total=100, cached_tokens_by_tier_total={"l1": 1, "l2": 2, "l3": 30, "l4": 4},
        spec_accepted_tokens_by_position_total=[3, 1], kv_tiers=WITH_DISK, kv_lanes=LANE, kv_disk_up=True,
        graphs=GraphStats(captures_total=5, evictions_total=2)))
    assert found["gauge kv_cache_usage_perc"] == found["gauge gpu_cache_usage_perc"] == {(): 0.5}
    assert found["counter spec_decode_num_accepted_tokens_per_pos position"] == {("0",): 3, ("1",): 1}
    assert found["gauge kv_tier_used_blocks tier"] == {("device",): 4, ("host",): 1, ("disk",): 0}
    assert found["counter kv_lane_bytes lane"] == {("save",): 5}
    assert found["counter kv_disk_broken_blocks kind"] == {("torn",): 2}
    assert found["gauge kv_disk_up tier"] == {("disk",): 1}
    assert found["gauge cpu_cache_usage_perc"] == {(): 0.25}
    assert found["counter external_prefix_cache_queries"] == {(): 97}
    assert found["counter external_prefix_cache_hits"] == {(): 34}
    assert found["counter graph_changes change"] == {("capture",): 5, ("eviction",): 2}


def test_the_members_of_v1_stats() -> None:
    stats = EngineStats(num_running=3, kv_tiers=HOST, cached_tokens_by_tier_total={"l2": 7}, kv_disk_up=False)
    engine = engine_json(stats)
    assert engine.keys() == MEMBERS
    assert (engine["num_requests_running"], engine["cached_tokens_by_tier"]) == (3, {"l2": 7})
    assert engine["kv_tiers"]["host"] == {"num_blocks": 4, "num_used": 1, "num_held": 0, "evicted_total": 0,
                                          "unsaved_total": 0, "missed_total": {}}
    assert (engine["kv_disk_up"], engine["graphs"]) == (False, None)
    rows = dict(zip(HISTORY_COLUMNS, history_row(stats, 1.5), strict=True))
    assert rows.pop("time_s") == 1.5 and rows == {name: engine[name] for name in rows}


def test_a_caller_sees_its_own_figures_and_zeros() -> None:
    figures = CallerFigures(prompt_tokens=9, prompt_tokens_cached=4, generation_tokens=5, num_preemptions=1,
                            num_running=2, num_waiting=3)
    own = engine_json(figures.stats())
    assert own.keys() == MEMBERS
    assert {name: value for name, value in own.items() if value} == {
        "num_requests_running": 2, "num_requests_waiting": 3, "prompt_tokens": 9, "prompt_tokens_cached": 4,
        "generation_tokens": 5, "num_preemptions": 1, "prefix_cache_queries": 9, "prefix_cache_hits": 4}
    assert own["kv_disk_up"] is own["kv_store_up"] is None, "not false: it is not told"


def test_declarations_hold_together() -> None:
    """One family a name; what it depends on is there; numbers in a dict of structs have no labels of their own."""
    structs = (EngineStats, GraphStats, ThreadStats, TierStats, LaneStats)
    every = [(struct, one) for struct in structs for one in shown_in(struct).values()]
    names = [name for _, one in every for name in (one.name, one.older) if name]
    assert len(names) == len(set(names)) > 40
    for struct, one in every:
        assert not one.only or one.only in {f.name for f in fields(struct)}
        assert one.part is None or one.part in structs
        assert not (one.part and one.label) or not any(of.label or of.only for of in shown_in(one.part).values())
    assert not {f.name for f in fields(Counters)} & {f.name for f in fields(SourceStats)}


def test_a_look_at_the_counters_is_not_changed_by_what_comes_after() -> None:
    counters = Counters(requests_finished_total={"stop": 1}, spec_accepted_tokens_by_position_total=[0])
    before = EngineStats(**counters.now())
    counters.preemptions_total += 1
    counters.requests_finished_total["stop"] += 1
    counters.spec_accepted_tokens_by_position_total[0] += 1
    assert (before.preemptions_total, before.requests_finished_total) == (0, {"stop": 1})
    assert before.spec_accepted_tokens_by_position_total == [0]
