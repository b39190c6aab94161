"""`RequestHistograms`: the latencies and lengths of requests, measured in the process that serves their clients."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from serving.observe.metrics.families import Families
from serving.observe.metrics.histogram import Histogram
from serving.observe.request_log import RequestRecord
from xllm.engine.step_log import STEP_TIME_S as SHORT_S

# Bounds of buckets in seconds. Chosen: from a fast device's first token to a long answer on a slow one.
LONG_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
          1280.0)
TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
COUNTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)  # bounds of buckets for small whole numbers
GOOD_ENDS = ("stop", "length")


class RequestHistograms:
    """A request is one choice: `n` of them for n choices. Not thread-safe; the event loop owns it."""

    def __init__(self) -> None:
        self.time_to_first_token_seconds = Histogram("Arrival to first token", LONG_S)
        self.inter_token_latency_seconds = Histogram("Between two tokens of a request", SHORT_S)
        self.request_time_per_output_token_seconds = Histogram("Mean time per output token of a request", SHORT_S)
        self.request_queue_time_seconds = Histogram("Arrival to the first step that it takes part in", LONG_S)
        self.request_prefill_time_seconds = Histogram("First step to first token", LONG_S)
        self.request_decode_time_seconds = Histogram("First token to last token", LONG_S)
        self.request_inference_time_seconds = Histogram("First step to last token", LONG_S)
        self.request_prefill_kv_computed_tokens = Histogram("Prompt tokens that no cache had", TOKENS)
        self.e2e_request_latency_seconds = Histogram("Arrival to last token", LONG_S)
        self.request_prompt_tokens = Histogram("Prompt length", TOKENS)
        self.request_generation_tokens = Histogram("Output length", TOKENS)
        self.request_max_num_generation_tokens = Histogram("Longest output of a call", TOKENS)
        self.request_params_max_tokens = Histogram("max_tokens as asked for", TOKENS)
        self.request_params_n = Histogram("n as asked for", COUNTS)
        self.request_num_preemptions = Histogram("Preemptions of a request", (0.0, *COUNTS))
        self.request_success: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.prompt_tokens_by_source: dict[str, int] = {"local_compute": 0, "local_cache_hit": 0,
                                                        "external_kv_transfer": 0}

    def note_tokens(self, record: RequestRecord, num_new: int, now_s: float) -> None:
        """Tokens of a request, at least one, have come."""
        previous_s, record.last_token_s = record.last_token_s, now_s
        if previous_s is None:
            self.time_to_first_token_seconds.observe(now_s - record.arrival_s)
            previous_s, num_new = now_s, num_new - 1
        for _ in range(num_new):
            self.inter_token_latency_seconds.observe((now_s - previous_s) / num_new)

    def note_end(self, record: RequestRecord) -> None:
        """Take in a request that has ended; of one that did not end well only that it did."""
        assert record.finish_reason is not None and record.end_s is not None
        self.request_success[record.finish_reason] += 1
        if record.finish_reason not in GOOD_ENDS:
            return
        decode_s, num_tokens = record.decode_s, record.num_output_tokens
        for histogram, value in ((self.e2e_request_latency_seconds, record.end_s - record.arrival_s),
                                 (self.request_queue_time_seconds, record.queue_s),
                                 (self.request_prefill_time_seconds, record.prefill_s),
                                 (self.request_inference_time_seconds, record.inference_s),
                                 (self.request_decode_time_seconds, decode_s),
                                 (self.request_prompt_tokens, record.num_prompt_tokens),
                                 (self.request_generation_tokens, num_tokens),
                                 (self.request_params_max_tokens, record.sampling.max_tokens or 0),
                                 (self.request_num_preemptions, record.num_preemptions)):
            if value is not None:
                histogram.observe(value)
        if decode_s is not None and num_tokens > 1:
            self.request_time_per_output_token_seconds.observe(decode_s / (num_tokens - 1))
        self._note_sources(record)

    def _note_sources(self, record: RequestRecord) -> None:
        computed, by_tier = max(0, record.num_prompt_tokens - record.num_cached_tokens), record.cached_by_tier or {}
        self.request_prefill_kv_computed_tokens.observe(computed)
        transferred = sum(by_tier.get(tier, 0) for tier in ("l3", "l4", "l5"))
        self.prompt_tokens_by_source["local_compute"] += computed
        self.prompt_tokens_by_source["external_kv_transfer"] += transferred
        self.prompt_tokens_by_source["local_cache_hit"] += max(0, record.num_cached_tokens - transferred)

    def families(self, make: Families) -> Iterator[Metric]:
        for name, value in vars(self).items():
            if isinstance(value, Histogram):
                yield value.family(make, name)
        # Its older name, which dashboards still ask for.
        yield self.inter_token_latency_seconds.family(make, "time_per_output_token_seconds")
        yield make.counter_by("finished_reason", "request_success", "Finished requests", self.request_success)
        yield make.counter_by("source", "prompt_tokens_by_source",
                              "Prompt tokens of requests that ended well, by where their KV came from",
                              self.prompt_tokens_by_source)
