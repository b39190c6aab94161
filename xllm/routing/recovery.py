"""`next_step`: how a call goes on whose instance is gone, or takes it not; `blamed`: what counts against which call.
Pure.

Nobody knows what an instance died of. A loss counts against every call that the instance had taken, so that one that
kills whoever computes it stops after three. After two a call is a suspect: it goes on where no other suspect is on
trial, which ends with its second output there. A loss during a trial counts against the suspect alone, so that those
beside it need not pay for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Losses that count against a call. Chosen: one that kills whoever computes it stops there, and three instances that die
# for other reasons within one answer are rare.
MAX_LOST = 3
# Instances that may be lost after they had taken a call, whether that counts or not. Chosen: one that makes each of
# them fall silent for a while ends, too.
MAX_TAKEN = 10
# That a call waits for an instance, or for one that takes it, in seconds. Chosen: an engine that died is up again by
# then with a small model, and so is an instance whose connection was cut.
MAX_WAIT_S = 30.0
# Of each request of a suspect. Chosen: its prompt has been computed by the first one, and a step of decoding behind it
# by the second; one that kills at a later token gets there at once, since it goes on behind the tokens that it has.
TRIAL_OUTPUTS = 2

# recompute: another instance computes the prompt and the tokens that were passed on again, but for what it has cached.
Step = Literal["recompute", "wait", "pass on", "give up"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted:
    """A call without an instance, as it stands. num_lost: instances that were lost while they had it; num_taken: after
    they had taken it; num_counted: of which it may be the cause. was_taken: one has taken it. was_refused: the last one
    that was asked had no room. has_place: there is an instance that can be asked. awaits_turn: there is one, where
    another suspect is on trial. waited_s: since it lost its instance, and none has taken it."""

    num_lost: int
    num_taken: int
    num_counted: int
    was_taken: bool
    was_refused: bool
    has_place: bool
    awaits_turn: bool
    waited_s: float


def next_step(call: Interrupted) -> Step:
    """What to do with it now. "pass on": give the caller the refusal; "give up": an error that says what was tried."""
    if call.num_counted >= MAX_LOST or call.num_taken >= MAX_TAKEN:
        return "give up"
    is_late = call.waited_s >= MAX_WAIT_S
    if call.has_place and not (is_late and call.num_lost >= MAX_LOST):
        return "recompute"
    if call.awaits_turn:
        return "wait"  # a trial ends, however
    if call.was_refused and not call.was_taken:
        return "pass on"
    return "give up" if is_late else "wait"


def is_suspect(num_counted: int) -> bool:
    """Whether a call may be what the instances died of that it lost."""
    return num_counted >= MAX_LOST - 1


@dataclass(frozen=True, slots=True)
class Present:
    """A call that was at an instance as that was lost. was_taken: the instance had taken it. on_trial: as a suspect."""

    was_taken: bool
    on_trial: bool


def blamed(present: Sequence[Present]) -> list[bool]:
    """Against which of all calls that an instance had its loss counts."""
    is_tried = any(call.was_taken and call.on_trial for call in present)
    return [call.was_taken and (call.on_trial or not is_tried) for call in present]
