"""What a master believed of its instances, against what became of them: checked when it is over."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.cluster.linearizable import NEVER


@dataclass(slots=True)
class Life:
    """One incarnation of an instance. begun_s: before it let anybody in; open_s: it was registered; ended_s: it was
    told to end; gone_s: it let nobody in any more. disturbed: when its connections were broken; unlisted: when its
    record was deleted, which is no reason to leave, but keeps others from finding it."""

    name: str
    incarnation: str
    begun_s: float
    open_s: float
    ended_s: float = NEVER
    gone_s: float = NEVER
    disturbed: list[float] = field(default_factory=list)
    unlisted: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Membership:
    """That a master held an instance to be a member."""

    name: str
    incarnation: str | None
    joined_s: float
    left_s: float = NEVER
    reason: str = ""


@dataclass(slots=True)
class MembershipHistory:
    """Joins and leaves of one master."""

    memberships: list[Membership] = field(default_factory=list)

    def join(self, name: str, incarnation: str | None) -> None:
        self.memberships.append(Membership(name, incarnation, time.monotonic()))

    def leave(self, name: str, reason: str) -> None:
        found = next(one for one in reversed(self.memberships) if one.name == name)
        found.left_s, found.reason = time.monotonic(), reason


def complaints_of_members(lives: Sequence[Life], memberships: Sequence[Membership], end_s: float, *,
                          soon_s: float) -> list[str]:
    """soon_s: within which a master knows what has happened."""
    by_incarnation = {life.incarnation: life for life in lives}
    found = list(_of_names(memberships))
    for one in memberships:
        if one.incarnation is None or (life := by_incarnation.get(one.incarnation)) is None or life.name != one.name:
            found.append(f"{one.name} joined as {one.incarnation}, which it never was")
            continue
        if not life.begun_s <= one.joined_s <= life.gone_s:
            found.append(f"{one.name} joined at {one.joined_s:.3f}, and lived from {life.begun_s:.3f} to "
                         f"{life.gone_s:.3f}")
        if min(one.left_s, end_s) > life.gone_s + soon_s:
            late_s = min(one.left_s, end_s) - life.gone_s
            found.append(f"{one.name} was held to be a member {late_s:.3f} s after its end")
        causes = [life.ended_s, *life.disturbed]
        if one.left_s != NEVER and not any(cause <= one.left_s <= cause + soon_s for cause in causes):
            found.append(f"{one.name} left at {one.left_s:.3f} ({one.reason}) without a cause")
    for life in lives:
        found += _gaps(life, [one for one in memberships if one.incarnation == life.incarnation], end_s, soon_s)
    return found


def _of_names(memberships: Sequence[Membership]) -> Iterator[str]:
    last: dict[str, Membership] = {}
    for one in sorted(memberships, key=lambda one: one.joined_s):
        if (earlier := last.get(one.name)) is not None and earlier.left_s > one.joined_s:
            yield f"{one.name} joined as {one.incarnation} while it was a member as {earlier.incarnation}"
        last[one.name] = one


def _gaps(life: Life, memberships: Sequence[Membership], end_s: float, soon_s: float) -> Iterator[str]:
    """Times in which it lived, nobody broke its connections or deleted its record, and it was no member."""
    since_s, until_s = life.open_s, min(life.ended_s, end_s)
    for one in [*memberships, Membership(life.name, None, NEVER)]:
        end_of_gap_s = min(one.joined_s, until_s)
        causes = sorted(at_s for at_s in life.disturbed + life.unlisted if since_s < at_s < end_of_gap_s)
        times = [since_s, *causes, end_of_gap_s]
        for begin_s, next_s in itertools.pairwise(times):
            if next_s - begin_s > soon_s:
                yield f"{life.name} lived for {next_s - begin_s:.3f} s from {begin_s:.3f} on and was no member"
        since_s = one.left_s
