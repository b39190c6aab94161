"""The caller of the running task, and how requests are signed for it.

The gate sets `CALLER` for each HTTP call, and with tracing `TRACE_HEADERS` is set as well; what the call awaits or
hands to a thread sees them. The caller is applied where all requests pass on their way to the engine
(`serving/engine/intake.py`), so that no endpoint can forget it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextvars import ContextVar

from serving.security.keys import NOBODY, Caller
from xllm.errors import RequestError
from xllm.request import Request

CALLER: ContextVar[Caller] = ContextVar("caller", default=NOBODY)
TRACE_HEADERS: ContextVar[dict[str, str] | None] = ContextVar("trace_headers", default=None)  # of the call at hand


def sign(requests: Sequence[Request], caller: Caller) -> list[Request]:
    """Copies of the requests that belong to the caller: its cached KV is found by itself only, and the scheduler counts
    what it is served.

    Raises RequestError for a priority that would put others behind, unless the caller may.
    """
    if caller is NOBODY:
        return list(requests)
    if not caller.is_urgent and any(request.priority < 0 for request in requests):
        raise RequestError("priority must be 0 or more: this key may not go before others", field="priority")
    return [dataclasses.replace(request, tenant=caller.name, tenant_weight=caller.weight,
                                cache_salt=caller.cache_salt(request.cache_salt or None))
            for request in requests]


def num_prompt_tokens(requests: Sequence[Request]) -> int:
    """The prompt tokens of a call; the choices of one prompt share it."""
    return sum({id(request.prompt_token_ids): len(request.prompt_token_ids) for request in requests}.values())
