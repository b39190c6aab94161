"""`choose`: which of several engines a new request goes to. Pure: what it decides follows from its arguments alone.

The engine that has the longest prefix of the prompt in its KV cache saves the most, unless its queue costs more than
the prefix saves. Both are counted in tokens to compute, so that one sum decides: what waits there before the request,
what the request itself has left to compute there, and what the running sequences take of each step. This is the cost
of Dynamo's KV router (weight * prefill blocks + decode blocks: docs.nvidia.com/dynamo, KV cache routing) and, without
the last term, the estimate by which Mooncake's Conductor picks a prefill instance (Qin et al., 2024, section 6.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What an open request of an engine counts for, in tokens to compute. Chosen: about as many as a short answer still has
# to go, so that a prefix of some hundred tokens draws a handful of requests to one engine before another computes it.
OPEN_REQUEST_TOKENS = 64
# A token that the request would compute itself counts for 1 + 1 / 4: computing again what another engine has keeps
# others waiting, too. Chosen: several calls that come at once with the same long prefix wait for one engine's work.
WORK_DIVISOR = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An engine as it stands before the request. In tokens: matched_tokens of the prompt that its KV cache has,
    waiting_tokens that it has to compute before anything new, free_tokens for which it has KV memory left. num_open:
    requests that it has not ended. is_full: it would refuse the request."""

    matched_tokens: int = 0
    waiting_tokens: int = 0
    num_open: int = 0
    free_tokens: int = 0
    is_full: bool = False


def choose(candidates: Sequence[Candidate], num_tokens: int, turn: int = 0) -> int:
    """The place of the engine that a request goes to whose prompt has so many tokens.

    One that is full is taken only if all are, and one without KV memory for the prompt only if all lack it. Among the
    others the least cost wins, then the fewest open requests, then whoever is next in turn: `turn` is the place from
    which equal ones are counted, modulo their number.
    """
    def rank(place: int) -> tuple[bool, bool, int, int, int]:
        candidate = candidates[place]
        to_compute = max(0, num_tokens - candidate.matched_tokens)
        cost = (candidate.waiting_tokens + to_compute + to_compute // WORK_DIVISOR
                + OPEN_REQUEST_TOKENS * candidate.num_open)
        return (candidate.is_full, to_compute > candidate.free_tokens, cost, candidate.num_open,
                (place - turn) % len(candidates))

    return min(range(len(candidates)), key=rank)
