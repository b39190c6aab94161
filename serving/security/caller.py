"""The caller of the running task, and how requests are signed for it.

The gate sets `CALLER` for each HTTP call, and with tracing `TRACE_HEADERS` is set as well; what the call awaits or
hands to a thread sees them. Requests are made with the caller's signature (`serving/api/params.py`), and none goes to
the engine without it (`serving/engine/intake.py`), so that no endpoint can forget it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from serving.security.keys import NOBODY, Caller
from xllm.errors import IntegrityError, RequestError
from xllm.request import Request

CALLER: ContextVar[Caller] = ContextVar("caller", default=NOBODY)
TRACE_HEADERS: ContextVar[dict[str, str] | None] = ContextVar("trace_headers", default=None)  # of the call at hand


def signature(caller: Caller, priority: int, cache_salt: str) -> dict[str, Any]:
    """What makes a request the caller's, as fields of `Request`: its cached KV is its own, and the scheduler knows
    whose turn it is. cache_salt: the request's own; "": none.

    Raises RequestError for a priority that would put others behind, unless the caller may.
    """
    if not caller.is_urgent and priority < 0:
        raise RequestError("priority must be 0 or more: this key may not go before others", field="priority")
    if caller is NOBODY:
        return {"cache_salt": cache_salt}
    return {"tenant": caller.name, "tenant_weight": caller.weight,
            "cache_salt": caller.cache_salt(cache_salt or None)}


def check_signed(requests: Sequence[Request], caller: Caller) -> None:
    """Raise IntegrityError for a request that was made in another's name, or in nobody's."""
    if any(request.tenant != caller.name for request in requests):
        raise IntegrityError("a request goes to the engine without its caller's signature")


def num_prompt_tokens(requests: Sequence[Request]) -> int:
    """The prompt tokens of a call; the choices of one prompt share it."""
    return sum({id(request.prompt_token_ids): len(request.prompt_token_ids) for request in requests}.values())
