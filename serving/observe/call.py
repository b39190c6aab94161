"""`Call`: one HTTP call from its head to its end, with the numbers of its log line."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from serving.observe.request_log import RequestRecord
from xllm import logs
from xllm.request import Request

REQUEST_ID = re.compile(r"[\w.:\-]{1,128}", re.ASCII)
BAD_ENDS = {"error": "failed", "abort": "aborted"}  # of sequences


class Call:
    """request_id: the answer's `X-Request-Id`. Everything that is logged while the call is worked on has it."""

    def __init__(self, request_id: str, *, is_given: bool):
        self.started_s = time.monotonic()
        self.is_given = is_given  # the id is the client's own, and may come again
        self.status: int | None = None
        self.is_answered = self.client_left = self.broke_off = False
        self._pools = False
        self._records: list[tuple[RequestRecord, bool]] = []  # and whether it is the first of its prompt
        self._context = {"request_id": request_id}
        logs.CONTEXT.set(self._context)

    @property
    def request_id(self) -> str:
        return self._context["request_id"]

    def rename(self, request_id: str) -> None:
        """Take the id that the request's body gives."""
        self._context["request_id"], self.is_given = request_id, True

    def note_sequences(self, requests: Sequence[Request], records: Sequence[RequestRecord]) -> None:
        """Add sequences that have begun; the choices of one prompt share its list of tokens."""
        self._pools = any(request.pooling is not None for request in requests)
        seen: set[int] = set()
        for request, record in zip(requests, records, strict=True):
            self._records.append((record, id(request.prompt_token_ids) not in seen))
            seen.add(id(request.prompt_token_ids))

    @property
    def outcome(self) -> str:
        """finished, refused, client_left, aborted (by an operator, a time limit or the engine's end) or failed."""
        if self.client_left or self.status == 499:
            return "client_left"
        ends = {record.finish_reason for record, _ in self._records}
        bad = next((BAD_ENDS[reason] for reason in BAD_ENDS if reason in ends), None)
        if self.broke_off or self.status is None or (self.status >= 500 and self.status != 503 and bad is None):
            return "failed"
        return bad or ("refused" if self.status >= 400 else "finished")

    @property
    def reached_engine(self) -> bool:
        return bool(self._records)

    def fields(self) -> dict[str, Any]:
        """Numbers of the call, in tokens and seconds; None: there is none, as without a sequence."""
        return call_figures(self._records, self.started_s, pools=self._pools)


def call_figures(records: Sequence[tuple[RequestRecord, bool]], started_s: float, *, pools: bool) -> dict[str, Any]:
    """Numbers of a call that ends now, in tokens and seconds; None: there is none. records: of its sequences, and
    whether each is the first of its prompt. pools: they are embeddings."""
    found: dict[str, Any] = dict.fromkeys(("finish_reason", "prompt_tokens", "generated_tokens", "cached_tokens",
                                           "ttft_s"))
    if records:
        firsts = [record for record, is_first in records if is_first]
        found["prompt_tokens"] = sum(record.num_prompt_tokens for record in firsts)
        found["cached_tokens"] = sum(record.num_cached_tokens for record in firsts)
    if records and not pools:  # an embedding is no token
        token_s = [record.first_token_s for record, _ in records if record.first_token_s is not None]
        found["finish_reason"] = "+".join(sorted({str(record.finish_reason) for record, _ in records}))
        found["generated_tokens"] = sum(record.num_output_tokens for record, _ in records)
        found["ttft_s"] = round(min(token_s) - started_s, 4) if token_s else None
    found["total_s"] = round(time.monotonic() - started_s, 4)
    return found


CALL: ContextVar[Call | None] = ContextVar("call", default=None)  # the one that the running task works on
