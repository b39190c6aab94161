"""Drafts of speculative decoding."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from serving.observe.metrics.families import Families
from xllm.stats import EngineStats


def speculation_families(make: Families, s: EngineStats) -> Iterator[Metric]:
    yield make.counter("spec_decode_num_drafts", "Drafts, of any number of tokens", s.spec_drafts_total)
    yield make.counter("spec_decode_num_draft_tokens", "Draft tokens", s.spec_draft_tokens_total)
    yield make.counter("spec_decode_num_accepted_tokens", "Draft tokens accepted", s.spec_accepted_tokens_total)
    if s.spec_accepted_tokens_by_position_total:
        yield make.counter_by("position", "spec_decode_num_accepted_tokens_per_pos",
                              "Draft tokens accepted, by their place in the draft, from 0",
                              {str(place): count for place, count in
                               enumerate(s.spec_accepted_tokens_by_position_total)})
