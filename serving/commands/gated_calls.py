"""`GatedCalls`: takes down the calls of the cluster that an instance's engine has answered: a log line, and spans."""

from __future__ import annotations

import logging

from serving.cluster.gated_call import GatedCall, GatedRequest
from serving.observe.call import BAD_ENDS, call_figures
from serving.observe.request_log import RequestRecord
from serving.observe.tracing import Tracer

logger = logging.getLogger("xllm.request")


class GatedCalls:
    """tracer: None: no spans. log_requests: else no lines."""

    def __init__(self, tracer: Tracer | None, *, log_requests: bool):
        self._tracer, self._log_requests = tracer, log_requests
        self._num_noted = 0

    def note(self, call: GatedCall) -> None:
        """Take down a call that has ended."""
        records = [self._record(call, request) for request in call.requests.values()]
        if self._tracer is not None:
            for record in records:
                self._tracer.record(record)
        if self._log_requests:
            self._write(call, records)

    def _record(self, call: GatedCall, gated: GatedRequest) -> RequestRecord:
        self._num_noted += 1
        request = gated.request
        return RequestRecord(
            number=self._num_noted, request_id=request.request_id, arrival_s=call.arrival_s, sampling=request.sampling,
            scheduled_s=gated.scheduled_s, first_token_s=gated.first_token_s, end_s=gated.end_s,
            num_prompt_tokens=len(request.prompt_token_ids) + len(request.generated_token_ids),
            num_cached_tokens=gated.num_cached_tokens, num_output_tokens=gated.num_output_tokens,
            cached_by_tier=gated.cached_by_tier, num_preemptions=gated.num_preemptions,
            finish_reason=gated.finish_reason, adapter=request.lora,
            trace_headers=None if request.traceparent is None else {"traceparent": request.traceparent})

    @staticmethod
    def _write(call: GatedCall, records: list[RequestRecord]) -> None:
        seen, requests = set[int](), [gated.request for gated in call.requests.values()]
        marked = []
        for request, record in zip(requests, records, strict=True):  # choices of one prompt share its tokens
            marked.append((record, id(request.prompt_token_ids) not in seen))
            seen.add(id(request.prompt_token_ids))
        ends = {record.finish_reason for record in records}
        outcome = next((BAD_ENDS[reason] for reason in BAD_ENDS if reason in ends), "finished")
        pools = any(request.pooling is not None for request in requests)
        # Sequences of a call are its id, a slash, and their numbers.
        fields = {"request_id": requests[0].request_id.partition("/")[0], "client": call.client, "outcome": outcome,
                  **call_figures(marked, call.arrival_s, pools=pools)}
        logger.log(logging.WARNING if outcome == "failed" else logging.INFO, "cluster %s", outcome,
                   extra={"fields": fields, "said": ("outcome",)})
