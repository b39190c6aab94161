"""What a run of `burst_load.py` says, and which chunk size a split is compared with. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from benchmarks.burst_load import Arrivals, BurstLoad, BurstRun

KEPT_THROUGHPUT = 0.95  # of the best chunk size's: what the one that a split is compared with must have at least


def figures(run: BurstRun, load: BurstLoad) -> dict[str, Any]:
    """Of one run. TPOT: of each running decode, the mean time between its tokens in a window; gaps: between two tokens,
    of all decodes. The burst's window is from when it was sent until the first token of its last prompt."""
    filled_s = max(each.times_s[0] for each in run.burst)
    calm = [tpot_s(each, run.began_s, run.burst_s) for each in run.decodes]
    busy = [tpot_s(each, run.burst_s, filled_s) for each in run.decodes]
    gaps = [gap for each in run.decodes for gap in gaps_s(each, run.burst_s, filled_s)]
    first_s = [each.times_s[0] - run.burst_s for each in run.burst]
    own = [(each.times_s[-1] - each.times_s[0]) / (len(each.times_s) - 1) for each in run.burst]
    num_drawn = sum(run.began_s <= time_s < run.end_s for each in (*run.decodes, *run.burst) for time_s in each.times_s)
    num_tokens = num_drawn + load.num_prompts * load.prompt_tokens
    return {"tpot_p99_ms": _ms(quantile(busy, 0.99)), "tpot_p50_ms": _ms(quantile(busy, 0.5)),
            "gap_p99_ms": _ms(quantile(gaps, 0.99)), "gap_max_ms": _ms(max(gaps)),
            "calm_tpot_p99_ms": _ms(quantile(calm, 0.99)),
            "tokens_per_s": round(num_tokens / (run.end_s - run.began_s)),
            "burst_filled_s": round(filled_s - run.burst_s, 3), "run_s": round(run.end_s - run.began_s, 3),
            "ttft_p50_s": round(quantile(first_s, 0.5), 3), "burst_own_tpot_p99_ms": _ms(quantile(own, 0.99))}


def tpot_s(arrivals: Arrivals, begin_s: float, end_s: float) -> float:
    """The mean time between tokens of an answer that has some before the window and some behind: (end of the last gap
    less begin of the first) over their number, of the gaps that `gaps_s` has."""
    gaps = gaps_s(arrivals, begin_s, end_s)
    return sum(gaps) / len(gaps)


def gaps_s(arrivals: Arrivals, begin_s: float, end_s: float) -> list[float]:
    """The times between tokens of an answer of which some part lies in the window, at least one; tokens that come at
    once are 0 s apart."""
    times = arrivals.times_s
    return [later - earlier for earlier, later in itertools.pairwise(times)
            if later > begin_s and earlier < end_s]


def quantile(samples: Sequence[float], share: float) -> float:
    """The least sample that so much of all are not above (nearest rank): p99 of 32 is the largest."""
    return sorted(samples)[max(0, math.ceil(share * len(samples)) - 1)]


def chosen(rows: Sequence[dict[str, Any]], tokens_per_s: float | None = None) -> dict[str, Any] | None:
    """Of the rows of all chunk sizes, the one of the least TPOT p99 that keeps `KEPT_THROUGHPUT` of `tokens_per_s`, or
    of the best one's throughput. None: there is none."""
    wanted = max(row["tokens_per_s"] for row in rows) if tokens_per_s is None else tokens_per_s
    able = [row for row in rows if row["tokens_per_s"] >= KEPT_THROUGHPUT * wanted]
    return min(able, key=lambda row: float(row["tpot_p99_ms"])) if able else None


def compared(split: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A split against the rows of all chunk sizes. at_its_throughput: against the one that is chosen if only the
    split's throughput is to be kept, None if none keeps it. tpot_p99_over_least: against the least TPOT p99 of any."""
    against, equal = chosen(rows), chosen(rows, split["tokens_per_s"])
    assert against is not None, "one is the best"
    return {"chunk_tokens": against["chunk_tokens"],
            **{f"{name.rpartition('_')[0]}_over_mixed": _over(split, against, name)
               for name in ("tpot_p99_ms", "gap_p99_ms", "ttft_p50_s")},
            "throughput_over_mixed": _over(split, against, "tokens_per_s"),
            "at_its_throughput": None if equal is None else {
                "chunk_tokens": equal["chunk_tokens"], "tpot_p99_over_mixed": _over(split, equal, "tpot_p99_ms")},
            "tpot_p99_over_least": max(_over(split, row, "tpot_p99_ms") for row in rows)}


def _over(split: dict[str, Any], row: dict[str, Any], name: str) -> float:
    return round(float(split[name]) / float(row[name]), 3)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)
