"""What a history of a store must be, checked when it is over. The whole is one sequence of revisions: a watch that is
read from the beginning gives it. Then

- each commit that answered is at its revision in it, with exactly its writes, and its conditions held just before; one
  that was not done met a state in which they did not hold; each reading is the state at its revision;
- nobody is told of a revision older than one that somebody had been told of before he asked;
- nothing else happened: a change is a commit's, or that of a lease which ended, and takes all of its keys;
- a lease whose owner believed in it later than its keys were gone was lost too late;
- every watch tells this sequence under its prefix, without a hole and without parting what is of one revision.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from serving.cluster.key_value import Changes, Committed, Compare, KeyChange, KeyValue, Snapshot
from tests.cluster.linearizable import NEVER, Call, Impossible, stuck_at
from tests.cluster.recording_link import Commit, Operation, Reading, Revoke

Items = dict[bytes, KeyValue]


@dataclass(slots=True)
class Belief:
    """Of somebody that a lease, or a leadership, is his: when he believed so, as samples that were taken."""

    owner: str
    token: int
    since_s: float
    last_s: float = 0.0

    def note(self, is_held: bool, at_s: float) -> None:
        if is_held:
            self.last_s = at_s


@dataclass(slots=True)
class Watched:
    """What a watch told. start: the revision from which it was asked for; None: a Snapshot was to come first."""

    prefix: bytes
    start: int | None = None
    events: list[Snapshot | Changes] = field(default_factory=list)


class StoreModel:
    """start: all items under the prefix that is looked at, changes: what became of them since."""

    def __init__(self, start: Snapshot, changes: Sequence[KeyChange]):
        self.first, self._changes = start.revision, changes
        self._revisions, self._states = [start.revision], [{item.key: item for item in start.items}]
        for change in changes:
            if change.revision != self._revisions[-1]:
                self._revisions.append(change.revision)
                self._states.append(dict(self._states[-1]))
            if change.item is None:
                self._states[-1].pop(change.key, None)
            else:
                self._states[-1][change.key] = change.item
        self.of_revision: dict[int, list[KeyChange]] = {}
        for change in changes:
            self.of_revision.setdefault(change.revision, []).append(change)

    @property
    def last(self) -> int:
        return self._revisions[-1]

    def at(self, revision: int) -> Items:
        """The items as of that revision."""
        return self._states[max(0, bisect.bisect_right(self._revisions, revision) - 1)]

    def known_s(self, operations: Sequence[Operation]) -> dict[bytes, float]:
        """Of each value that was written: when somebody had been told of that revision, or of a later one."""
        told = sorted((operation.answer.revision, operation.ended_s) for operation in operations
                      if isinstance(operation.answer, Snapshot | Committed))
        soonest_s = list(itertools.accumulate((ended_s for _, ended_s in reversed(told)), min))[::-1]
        found = {}
        for change in self._changes:
            if change.item is not None:
                place = bisect.bisect_left(told, (change.revision, 0.0))
                found[change.item.value] = soonest_s[place] if place < len(told) else NEVER
        return found

    def complaints(self, operations: Sequence[Operation], leases: Sequence[Belief] = ()) -> list[str]:
        """What is wrong with a history; leases: who believed in which, token is its id."""
        if any(later < earlier for earlier, later in itertools.pairwise(self._revisions)):
            return ["revisions go back"]
        return [*self._of_answers(operations), *self._of_times(operations), *self._of_changes(operations),
                *self._of_leases(operations, leases)]

    def _of_answers(self, operations: Sequence[Operation]) -> Iterator[str]:
        done: dict[int, str] = {}
        for operation in operations:
            asked, answer = operation.asked, operation.answer
            if isinstance(asked, Reading) and isinstance(answer, Snapshot):
                found = {key: item for key, item in self.at(answer.revision).items()
                         if (key.startswith(asked.prefix) if asked.is_prefix else key == asked.prefix)}
                if {item.key: item for item in answer.items} != found:
                    yield f"{operation.client} read at {answer.revision} what was not so: {answer.items}"
            elif isinstance(asked, Commit) and isinstance(answer, Committed):
                if answer.succeeded:
                    yield from self._of_commit(operation.client, asked, answer.revision, done)
                elif all(_holds(self.at(answer.revision), condition) for condition in asked.conditions):
                    yield f"{operation.client}'s commit was refused at {answer.revision}, where its conditions held"

    def _of_commit(self, client: str, asked: Commit, revision: int, done: dict[int, str]) -> Iterator[str]:
        """done: whose commits have changed something, by revision."""
        before, behind = self.at(revision - 1), self.at(revision)
        if not _effect(asked, behind) and all(_holds(behind, condition) for condition in asked.conditions):
            return  # it had nothing to do
        if not _effect(asked, before) or _effect(asked, before) != _written(self.of_revision.get(revision, [])):
            yield f"{client}'s commit answered {revision}, where its writes are not, or others: {asked.writes}"
            return
        if not all(_holds(before, condition) for condition in asked.conditions):
            yield f"{client}'s commit was done at {revision} although its conditions did not hold: {asked.conditions}"
        if done.setdefault(revision, client) != client:
            yield f"{client}'s commit and {done[revision]}'s answered {revision}"

    @staticmethod
    def _of_times(operations: Sequence[Operation]) -> Iterator[str]:
        """Whoever asks after somebody was answered is told of that revision, or a later one."""
        answered = [operation for operation in operations if isinstance(operation.answer, Snapshot | Committed)]
        ends = sorted(answered, key=lambda operation: operation.ended_s)
        newest, at = 0, 0
        for operation in sorted(answered, key=lambda operation: operation.begun_s):
            while ends[at].ended_s < operation.begun_s:
                newest = max(newest, ends[at].answer.revision)  # type: ignore[union-attr]
                at += 1
            if operation.answer.revision < newest:  # type: ignore[union-attr]
                yield (f"{operation.client} was told of {operation.answer.revision}, "  # type: ignore[union-attr]
                       f"after somebody had been told of {newest}")

    def _of_changes(self, operations: Sequence[Operation]) -> Iterator[str]:
        """Nothing happens without a cause."""
        known = {operation.answer.revision for operation in operations
                 if isinstance(operation.asked, Commit) and isinstance(operation.answer, Committed)
                 and operation.answer.succeeded}
        unknown = [operation.asked for operation in operations
                   if isinstance(operation.asked, Commit) and operation.answer is None]
        for revision, changes in self.of_revision.items():
            if revision in known:
                continue
            before, found = self.at(revision - 1), _written(changes)
            causes = [asked for asked in unknown if _effect(asked, before) == found
                      and all(_holds(before, condition) for condition in asked.conditions)]
            if causes:
                unknown.remove(causes[0])
                continue
            leases = {before[change.key].lease for change in changes if change.item is None and change.key in before}
            if all(change.item is None for change in changes) and len(leases) == 1 and 0 not in leases and {
                    change.key for change in changes} == {item.key for item in before.values() if item.lease in leases}:
                continue
            yield f"nobody did what happened at {revision}: {found}"

    def _of_leases(self, operations: Sequence[Operation], leases: Sequence[Belief]) -> Iterator[str]:
        """A lease that somebody had seen gone is not believed in any more."""
        gone: dict[int, int] = {}
        for revision, changes in self.of_revision.items():
            before, now = self.at(revision - 1), self.at(revision)
            for change in changes:
                lease = before[change.key].lease if change.item is None and change.key in before else 0
                if lease and not any(item.lease == lease for item in now.values()) and len(changes) == sum(
                        item.lease == lease for item in before.values()):
                    gone.setdefault(lease, revision)
        revoked = {operation.asked.lease for operation in operations if isinstance(operation.asked, Revoke)}
        deleted = {operation.answer.revision for operation in operations if isinstance(operation.answer, Committed)}
        for belief in leases:
            revision = gone.get(belief.token)
            if revision is None or revision in deleted or belief.token in revoked:
                continue
            seen_s = min((operation.ended_s for operation in operations
                          if isinstance(operation.answer, Snapshot | Committed)
                          and operation.answer.revision >= revision), default=NEVER)
            if belief.last_s > seen_s:
                yield f"{belief.owner} believed in a lease {belief.last_s - seen_s:.3f} s after its keys were gone"

    # --- watches

    def complaints_of_watch(self, watched: Watched) -> list[str]:
        """See the head of the file."""
        return list(self._of_watch(watched))

    def _of_watch(self, watched: Watched) -> Iterator[str]:
        behind = None if watched.start is None else watched.start - 1
        for event in watched.events:
            if isinstance(event, Snapshot):
                if event.revision > self.last:
                    return  # of what came behind the end
                if {item.key: item for item in event.items} != self._under(watched.prefix, event.revision):
                    yield f"a watch of {watched.prefix!r} told a state at {event.revision} that was not so"
                if behind is not None and event.revision < behind:
                    yield f"a watch of {watched.prefix!r} went back from {behind} to {event.revision}"
                behind = event.revision
                continue
            if behind is None:
                yield f"a watch of {watched.prefix!r} began without a state"
                return
            told = [change for change in event.changes if change.revision <= self.last]  # leases end later, too
            wanted = [change for revision, changes in self.of_revision.items() if behind < revision <= event.revision
                      for change in changes if change.key.startswith(watched.prefix)]
            if sorted(told, key=_place) != sorted(wanted, key=_place) or [
                    change.revision for change in told] != sorted(change.revision for change in told):
                yield (f"a watch of {watched.prefix!r} told {len(told)} changes for the {len(wanted)} between "
                       f"{behind} and {event.revision}")
            behind = event.revision
        left = [change for change in self._changes if change.key.startswith(watched.prefix)
                and (behind is None or change.revision > behind)]
        if left:
            yield f"a watch of {watched.prefix!r} ended before {len(left)} changes from {left[0].revision} on"

    def _under(self, prefix: bytes, revision: int) -> Items:
        return {key: item for key, item in self.at(revision).items() if key.startswith(prefix)}


def _place(change: KeyChange) -> tuple[int, bytes]:
    return change.revision, change.key


def _holds(items: Items, condition: Compare) -> bool:
    item = items.get(condition.key)
    if item is None:
        return condition.field != "value" and condition.expected == 0
    return bool(getattr(item, condition.field) == condition.expected)


def _effect(asked: Commit, before: Items) -> dict[bytes, bytes | None]:
    return {write.key: write.value for write in asked.writes if write.value is not None or write.key in before}


def _written(changes: Sequence[KeyChange]) -> dict[bytes, bytes | None]:
    return {change.key: None if change.item is None else change.item.value for change in changes}


# --- registers: without a look at revisions


def calls_on(key: bytes, operations: Sequence[Operation],
             known_s: Mapping[bytes, float] | None) -> list[Call[bytes | None]]:
    """What was done to one key alone, as calls on a register that holds a value or None."""
    found = []
    for operation in operations:
        asked, ended_s = operation.asked, operation.ended_s
        if known_s is not None and operation.answer is None and isinstance(asked, Commit):
            values = [write.value for write in asked.writes if write.value is not None]
            if values and values[0] not in known_s:
                continue
            ended_s = known_s[values[0]] if values else ended_s
        if isinstance(asked, Reading) and asked == Reading(key, False) and isinstance(operation.answer, Snapshot):
            step = _reads(next((item.value for item in operation.answer.items), None))
        elif isinstance(asked, Commit) and [write.key for write in asked.writes] == [key]:
            assert all(condition.key == key and condition.field != "mod_revision" for condition in asked.conditions)
            step = _writes(asked, operation.answer)  # type: ignore[arg-type]
        else:
            continue
        found.append(Call(operation.begun_s, ended_s, step, f"{operation.client}: {asked}"))
    return found


def register_complaint(key: bytes, operations: Sequence[Operation],
                       known_s: Mapping[bytes, float] | None = None) -> str | None:
    """Why the calls on a key have no order; None: they have one. known_s: of the values that were written, each of
    which is written once, by when (`StoreModel.known_s`): a call without an answer was done by then, or not at all.
    Without that there may be very many orders."""
    stuck = stuck_at(calls_on(key, operations, known_s), None)
    return None if stuck is None else f"{key!r}: none of these can be next: {[call.shown for call in stuck]}"


def _reads(value: bytes | None):
    def step(state: bytes | None) -> bytes | None:
        if state != value:
            raise Impossible
        return state
    return step


def _writes(asked: Commit, answer: Committed | None):
    def step(state: bytes | None) -> bytes | None:
        holds = all(state == condition.expected if condition.field == "value" else state is None
                    for condition in asked.conditions)
        if holds != (answer is None or answer.succeeded):  # one without an answer need not be done to do nothing
            raise Impossible
        return asked.writes[0].value if holds else state
    return step


# --- leaders


def complaints_of_leaders(beliefs: Sequence[Belief]) -> list[str]:
    """At most one leads at a time, and tokens rise."""
    reigns = sorted((belief for belief in beliefs if belief.last_s), key=lambda belief: belief.since_s)
    found = []
    for earlier, later in itertools.pairwise(reigns):
        if earlier.last_s > later.since_s:
            found.append(f"{earlier.owner} and {later.owner} led at a time, for {earlier.last_s - later.since_s:.3f} s")
        if earlier.token >= later.token:
            found.append(f"the token of {later.owner} is {later.token}, and before it was {earlier.token}")
    return found
