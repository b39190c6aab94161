"""`distinct_prompts`: the prompts of a call, of which several requests may share one."""

from __future__ import annotations

from collections.abc import Sequence

from xllm.request import Request


def distinct_prompts(requests: Sequence[Request]) -> list[Request]:
    """The first request of each prompt: what several share is one object, and is computed once."""
    return list({id(request.prompt_token_ids): request for request in reversed(requests)}.values())
