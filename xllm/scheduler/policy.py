"""Scheduling policies as sort keys. A new policy is a line in a table, never a branch.

`request_key` orders requests for admission and, reversed, for preemption: the smallest is admitted
first and preempted last. `PHASES` says in which order a step's token budget is handed out.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

from xllm.sequence import SequenceState

Key = tuple[float, ...]


class Phase(enum.Enum):
    """RUNNING is DECODES and PREFILLS together, in request order."""

    RUNNING = "running"
    DECODES = "decodes"
    PREFILLS = "prefills"
    ADMISSION = "admission"


def _fcfs(seq: SequenceState) -> Key:
    return ()


def _priority(seq: SequenceState) -> Key:
    return (seq.request.priority,)


def _deadline(seq: SequenceState) -> Key:
    deadline = seq.request.deadline_s
    return (math.inf if deadline is None else deadline,)


def _shortest_job(seq: SequenceState) -> Key:
    return (seq.num_prompt_tokens,)


_KEYS: dict[str, Callable[[SequenceState], Key]] = {
    "fcfs": _fcfs,
    "priority": _priority,
    "deadline": _deadline,
    "sjf": _shortest_job,
    "prefill-first": _fcfs,
    "decode-first": _fcfs,
    "online-first": _fcfs,
    "fair": _fcfs,  # of running requests; `fair.py` decides which waiting one is admitted
}

_PHASES: dict[str, tuple[Phase, ...]] = {
    "prefill-first": (Phase.PREFILLS, Phase.ADMISSION, Phase.DECODES),
    "decode-first": (Phase.DECODES, Phase.PREFILLS, Phase.ADMISSION),
}


def request_key(policy: str, *, offline_last: bool) -> Callable[[SequenceState], Key]:
    """The sort key of a policy. Ties go by arrival. `offline_last`: online requests before offline ones."""
    key, offline_last = _KEYS[policy], offline_last or policy == "online-first"

    def full_key(seq: SequenceState) -> Key:
        offline = float(seq.request.offline) if offline_last else 0.0
        return (offline, *key(seq), seq.arrival_index)

    return full_key


def tenant_key(seq: SequenceState) -> Key:
    """The sort key of one tenant's requests under the policy "fair": offline last, then by priority and arrival. There
    priority orders a tenant's own requests only, not those of others."""
    return (float(seq.request.offline), seq.request.priority, seq.arrival_index)


def phases(policy: str) -> tuple[Phase, ...]:
    """The order in which a step's budget is handed out."""
    return _PHASES.get(policy, (Phase.RUNNING, Phase.ADMISSION))
