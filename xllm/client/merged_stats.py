"""`merged_stats`, `merged_steps`: what several engines say of themselves, as if one did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from xllm.engine.step_log import MAX_STEPS_A_BEAT, StepReport
from xllm.stats import EngineStats

# Where a sum would say nothing. The others add up: totals, and numbers of what there is.
LARGEST = ("last_step_s", "step_time_s", "oldest_waiting_s")


def merged_stats(stats: Sequence[EngineStats]) -> EngineStats:
    """Sums over the engines; of ages and durations the longest, of errors the largest, of the KV cache's usage the
    share of all blocks. stats: at least one."""
    if len(stats) == 1:
        return stats[0]
    merged: EngineStats = _merged(stats)
    for name in LARGEST:
        setattr(merged, name, max(getattr(one, name) for one in stats))
    longest = max(stats, key=lambda one: one.step_time_s)
    merged.step_predicted_s = longest.step_predicted_s  # of the step whose time it is shown beside
    merged.step_cost_error = {quantile: max(one.step_cost_error.get(quantile, 0.0) for one in stats)
                              for quantile in merged.step_cost_error}
    used = sum(one.kv_usage * one.num_blocks for one in stats)
    merged.kv_usage = used / merged.num_blocks if merged.num_blocks else 0.0
    return merged


def merged_steps(reports: Sequence[StepReport]) -> StepReport:
    """Histograms of the steps of all of them, and the newest of each, in their order."""
    if len(reports) == 1:
        return reports[0]
    merged = StepReport(recent=sorted(step for report in reports for step in report.recent)[-MAX_STEPS_A_BEAT:])
    for report in reports:
        for total, one in ((merged.time_s, report.time_s), (merged.tokens, report.tokens)):
            total.counts[:] = map(sum, zip(total.counts, one.counts, strict=True))
            total.sum += one.sum
    return merged


def _merged(values: Sequence[Any]) -> Any:
    """Of values of one type: the sum of numbers, of lists and dicts place by place, of structs field by field. Those
    that are None are left out."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    first = known[0]
    if isinstance(first, bool):
        return all(known)
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in known for key in value)
        return {key: _merged([value[key] for value in known if key in value]) for key in keys}
    if isinstance(first, list):
        longest = max(map(len, known))
        return [_merged([value[place] for value in known if place < len(value)]) for place in range(longest)]
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(**{f.name: _merged([getattr(value, f.name) for value in known]) for f in fields(first)})
    return sum(known)
