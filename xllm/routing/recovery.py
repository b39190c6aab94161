"""`next_step`: how a call goes on whose instance is gone, or takes it not. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Instances that may be lost under one call. Chosen: a call that kills whoever computes it stops there, and three
# instances that fall for other reasons within one answer are rare.
MAX_LOST = 3
# That a call that was taken waits for an instance, in seconds. Chosen: an engine that died is up again by then with a
# small model, and so is an instance whose connection was cut.
MAX_WAIT_S = 30.0

# recompute: another instance computes the prompt and the tokens that were passed on again, but for what it has cached.
Step = Literal["recompute", "wait", "pass on", "give up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted:
    """A call without an instance, as it stands. num_lost: instances that were lost while they had it. was_taken: one
    has taken it. was_refused: the last one that was asked had no room. has_place: there is an instance that can be
    asked. waited_s: since it lost its instance."""

    num_lost: int
    was_taken: bool
    was_refused: bool
    has_place: bool
    waited_s: float


def next_step(call: Interrupted) -> Step:
    """What to do with it now. "pass on": give the caller the refusal; "give up": an error that says what was tried."""
    if call.num_lost >= MAX_LOST:
        return "give up"
    if call.has_place:
        return "recompute"
    if call.was_refused and not call.was_taken:
        return "pass on"
    return "wait" if call.waited_s < MAX_WAIT_S else "give up"
