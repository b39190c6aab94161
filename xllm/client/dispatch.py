"""`Dispatcher`: finds an instance for each call of a cluster, and another one when that is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from xllm.client.call_watcher import CallWatcher
from xllm.client.cluster_call import ClusterCall, Loss
from xllm.client.cluster_members import ClusterMember, ClusterMembers
from xllm.client.dispatch_counts import DispatchCounts
from xllm.client.distinct_prompts import distinct_prompts
from xllm.client.engine_client import EngineAwayError, EngineBusyError
from xllm.client.handovers import Handovers
from xllm.errors import EngineDeadError, RequestError
from xllm.request import Request
from xllm.routing.fleet import Fleet
from xllm.routing.fleet_snapshot import Decision
from xllm.routing.pair_snapshot import PairDecision
from xllm.routing.prompt_marks import NO_MARKS, PromptMarks, prompt_marks
from xllm.routing.recovery import Interrupted, Present, blamed, is_suspect, next_step
from xllm.routing.roles import unsuited

MAX_DECISIONS = 100  # that are kept to be looked at. Chosen: a screen or two
LOOK_S = 0.25  # between looks for an instance where none has room. Chosen: half a sign of life
logger = logging.getLogger("xllm.cluster")


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One decision that was followed. unix_s: when. num_lost: instances that the call had lost before."""

    unix_s: float
    request_id: str
    num_requests: int
    num_tokens: int
    num_lost: int
    decision: Decision


class Dispatcher:
    """Belongs to the event loop of the instances' clients. calls: those that are open, by request id. recent: the last
    decisions, the newest behind."""

    def __init__(self, members: ClusterMembers, fleet: Fleet, watcher: CallWatcher):
        self.calls: dict[str, ClusterCall] = {}
        self.recent: deque[Dispatch] = deque(maxlen=MAX_DECISIONS)
        self.counts = DispatchCounts()
        self._members, self._fleet, self._watcher = members, fleet, watcher
        self.handovers = Handovers(members, fleet, self.counts.handovers, self._send_or_go_on)
        self._going_on: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._fresh: list[tuple[ClusterCall, Loss]] = []  # of this turn of the event loop
        self._handed = Counter[str]()  # requests that went over to successors in this turn, by where they were

    # --- calls

    def begin(self, requests: Sequence[Request]) -> ClusterCall:
        """Send a call to an instance. Raises EngineAwayError: there is none; RequestError: none of them can do
        what is asked for."""
        digests = self._members.digests if any(request.lora for request in requests) else {}
        adapters = {(r.lora, digests[r.lora]) for r in requests if r.lora in digests}
        call = ClusterCall(requests, self._members.model, adapters, self)
        pair = self._decide_pair(call, requests)
        if pair.first is None:
            raise self._members.refusal(requests) or EngineAwayError(self._members.why_none())
        self.calls.update(dict.fromkeys(call.open_ids, call))
        if self.handovers.can_be(pair, requests):
            self.handovers.begin(call, requests, pair)
        else:
            self._send(call, Decision(pair.first, pair.reason, pair.scores, pair.matched_tokens), requests)
        return call

    def num_sent(self, name: str) -> int:
        """Requests that are at this instance."""
        return sum(call.place == name for call in self.calls.values())

    def notice(self) -> None:
        """An instance may take more than it could before: look again for those that wait."""
        self._changed.set()

    def lives(self, incarnation: str | None) -> None:
        """An instance is connected again: what it was lost under it did not die of."""
        for call in set(self.calls.values()):
            for loss in call.tries.lost:
                loss.counts = loss.counts and (loss.life is None or loss.life != incarnation)

    def hand_over(self, member: ClusterMember) -> None:
        """Have others go on with what an instance has, as far as there are others that take it."""
        calls = {call for call in self.calls.values() if call.place == member.name}
        kept = [call for call in calls
                if not (call.next_place or call.is_aborted or self._move_kv(call) or self._pass_on(call, "drained"))]
        if num_requests := sum(len(call.open_ids) for call in kept):
            logger.warning("%s goes on with %d requests: no other instance takes them", member.name, num_requests)

    def _move_kv(self, call: ClusterCall) -> bool:
        """Have a call go on at another instance with its KV. False: there is none that could take that."""
        requests, place = call.unaborted, self._decide_next(call).name
        if place is None or call.place is None or not self.handovers.can_move(call.place, place):
            return False
        self.handovers.move(call, place, requests, lambda: self._pass_on(call, "drained"))
        return True

    def _decide_next(self, call: ClusterCall) -> Decision:
        """Where a call may go on, but for where it is and was."""
        tries = call.tries
        return self._decide(call, call.unaborted, {
            call.place or "", *tries.busy, *tries.refused, *self._trials(call), *(loss.place for loss in tries.lost)})

    def _pass_on(self, call: ClusterCall, cause: str, error: str = "") -> bool:
        """Ask another instance to take what one has that goes on with it meanwhile. cause, error: as of
        `CallWatcher.lost`. False: there is none."""
        requests, decision = call.unaborted, self._decide_next(call)
        if decision.name is None or decision.reason == "full":
            return False
        self._watcher.lost(call.open_ids, cause, error)
        sent = self._note_sent(call, decision, requests, is_again=True)
        try:
            call.hand_over(self._members.all[decision.name].client, decision.name, sent)
        except EngineDeadError as away:
            self.not_taken(call, decision.name, away)
        return True

    async def close(self) -> None:
        """End the open calls with an EngineDeadError."""
        for call in set(self.calls.values()):
            call.fail(EngineDeadError("the cluster's client was closed"))
        self._changed.set()
        await self.handovers.close()
        await asyncio.gather(*self._going_on)

    # --- what calls tell: see `CallKeeper`

    def begun(self, call: ClusterCall, request_id: str) -> None:
        """See `CallKeeper`."""
        if call.place is not None:
            self._fleet.begun(call.place, request_id)

    def proven(self, call: ClusterCall) -> None:
        """See `CallKeeper`."""
        if is_suspect(call.tries.num_counted):
            self._changed.set()  # it is the next one's turn

    def left(self, call: ClusterCall, request_ids: Sequence[str]) -> None:
        """See `CallKeeper`."""
        known = [request_id for request_id in request_ids if self.calls.pop(request_id, None) is not None]
        for place in (call.place, call.next_place):
            self._forget_sent(place, known)
        self._watcher.left(request_ids)
        self.handovers.left(call, request_ids)
        if not call.open_ids:
            self._changed.set()  # there may be room

    def stays(self, call: ClusterCall, request_id: str) -> None:
        """See `CallKeeper`."""
        self.handovers.stays(call, request_id)

    def handed_over(self, call: ClusterCall, place: str) -> None:
        """See `CallKeeper`."""
        self._forget_sent(place, call.open_ids)
        if (member := self._members.all.get(place)) is not None and member.was_drained:
            self._note_moved(place, len(call.open_ids))
        if (taken := self.handovers.take(call)) is None:
            self._begin_going_on(call, EngineDeadError(f"{place} has handed it over to an instance that is gone"))
            return
        receiver, requests = taken
        matched = tuple(_num_tokens(request) for request in distinct_prompts(requests))
        self._send(call, Decision(receiver, "handed_over", {}, matched), requests)

    def moved(self, call: ClusterCall, place: str) -> None:
        """See `CallKeeper`."""
        self.handovers.forget(call)
        self._forget_sent(place, call.open_ids)
        self._note_moved(place, len(call.open_ids))

    def _note_moved(self, place: str, num_requests: int) -> None:
        self.counts.recovered["drained"] += 1
        if not self._handed:
            asyncio.get_running_loop().call_soon(self._note_handed)
        self._handed[place] += num_requests

    def _note_handed(self) -> None:
        for place, num_requests in self._handed.items():  # one event, however many calls there were
            self._members.note_recovered(place, num_requests)
        self._handed.clear()

    def not_taken(self, call: ClusterCall, place: str, error: Exception) -> None:
        """See `CallKeeper`."""
        self._forget_sent(place, call.open_ids)
        call.tries.busy.add(place)
        cause = _cause(error)
        why = str(error) if cause == "lost" else ""
        if not self._pass_on(call, cause, why):
            logger.warning("%s goes on with what it has: no other instance takes it (%s: %s)", call.place, place, error)
            self._watcher.lost(call.open_ids, cause, why)
            for request in call.rest:
                self._watcher.sent(request, call.place or "", "stays")

    def lost(self, call: ClusterCall, place: str, error: Exception) -> None:
        """See `CallKeeper`."""
        self._forget_sent(place, call.open_ids)
        tries, cause = call.tries, _cause(error)
        self._watcher.lost(call.open_ids, cause, str(error) if cause == "lost" else "")
        if cause == "busy":
            tries.busy.add(place)
        elif cause == "refused" and not call.is_admitted:
            call.fail(error)  # it is wrong anywhere
            return
        elif cause == "refused":
            tries.refused[place] = str(error)
        else:
            self._note_lost(call, place, str(error))
        self._begin_going_on(call, error)

    def _begin_going_on(self, call: ClusterCall, error: Exception) -> None:
        self.handovers.forget(call)
        task = asyncio.create_task(self._go_on(call, error), name="cluster-call")
        self._going_on.add(task)
        task.add_done_callback(self._going_on.discard)

    def _note_lost(self, call: ClusterCall, place: str, why: str) -> None:
        member = self._members.all.get(place)
        has_ended = member is not None and member.client.dead_reason is not None  # else only one of its engines has
        loss = Loss(place, member.client.incarnation if member is not None and has_ended else None, why, call.has_taken)
        call.tries.lost.append(loss)
        if not self._fresh:
            asyncio.get_running_loop().call_soon(self._settle)  # before any of them goes on
        self._fresh.append((call, loss))

    def _settle(self) -> None:
        """Find what counts against whom, once all calls of an instance have heard of its end."""
        fresh, self._fresh = self._fresh, []
        for place in dict.fromkeys(loss.place for _, loss in fresh):
            there = [(call, loss) for call, loss in fresh if loss.place == place]
            counted = blamed([Present(loss.was_taken, call.on_trial) for call, loss in there])
            for (_, loss), counts in zip(there, counted, strict=True):
                loss.counts = counts
            num_requests = sum(len(call.open_ids) for call, _ in there)
            logger.warning("%s was lost: %s; open requests that go on elsewhere: %d", place, there[0][1].reason,
                           num_requests)
            self._members.note_recovered(place, num_requests)

    # --- going on

    async def _go_on(self, call: ClusterCall, error: Exception) -> None:
        since_s = call.tries.since_s = call.tries.since_s or time.monotonic()
        while call.open_ids:
            self._changed.clear()
            rest, tries = call.rest, call.tries
            decision = self._decide_again(call, rest)
            awaits_turn = decision.name is None and self._awaits_turn(call)
            if awaits_turn:
                since_s = tries.since_s = time.monotonic()
            step = next_step(Interrupted(
                num_lost=len(tries.lost), num_taken=sum(loss.was_taken for loss in tries.lost),
                num_counted=tries.num_counted, was_taken=call.is_admitted,
                was_refused=isinstance(error, EngineBusyError), has_place=decision.name is not None,
                awaits_turn=awaits_turn, waited_s=time.monotonic() - since_s))
            if step == "recompute":
                if isinstance(error, EngineBusyError):
                    self.counts.retried += 1
                else:
                    self.counts.recovered["lost"] += 1
                self._send(call, decision, rest, is_again=True)
                return
            if step == "pass on":
                call.fail(error)
            elif step == "give up":
                self.counts.given_up += 1
                call.fail(self._given_up(call))
            else:
                tries.busy.clear()  # they may have room by then
                await self._wait()

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), LOOK_S)
        except asyncio.TimeoutError:
            return

    def _decide_again(self, call: ClusterCall, rest: Sequence[Request]) -> Decision:
        """Where a call goes on: not at an instance that was lost under it, unless there is no other and it is back."""
        tries = call.tries
        not_there = {*tries.busy, *tries.refused, *self._trials(call)}
        decision = self._decide(call, rest, not_there.union(loss.place for loss in tries.lost))
        return decision if decision.name is not None else self._decide(call, rest, not_there)

    def _trials(self, call: ClusterCall) -> set[str]:
        """Where a call must not go on because another suspect is on trial there, if it is one itself."""
        if not is_suspect(call.tries.num_counted):
            return set()
        return {other.place for other in self.calls.values()
                if other is not call and other.place is not None and other.on_trial}

    def _awaits_turn(self, call: ClusterCall) -> bool:
        able = self._members.able(call.model, call.adapters, call.rest)
        return not self._trials(call).isdisjoint(able - call.tries.busy - call.tries.refused.keys())

    def _given_up(self, call: ClusterCall) -> EngineDeadError:
        tries = call.tries
        tried = [f"{loss.place} was lost ({loss.reason})" for loss in tries.lost]
        if (refusal := self._members.refusal(call.rest)) is not None:
            tried.append(f"none of the others can go on ({refusal})")
        tried += [f"{name} refused to go on ({reason})" for name, reason in tries.refused.items()]
        what = f"the request was given up: {'; '.join(tried)}"
        if self._members.up:
            return EngineDeadError(what)
        return EngineAwayError(f"{what}; {self._members.why_none()}")

    # --- deciding and sending

    def _decide(self, call: ClusterCall, requests: Sequence[Request], exclude: Collection[str]) -> Decision:
        able = self._members.able(call.model, call.adapters, requests)
        wrong = unsuited(self._members.roles, begins=not any(request.generated_token_ids for request in requests))
        if able - wrong - set(exclude):  # else whoever is there does all of it
            able -= wrong
        prompts = distinct_prompts(requests)
        marks = [self._marks(call, request) for request in prompts]
        first = requests[0]
        return self._fleet.decide(
            marks, sum(map(_num_tokens, prompts)), len(requests), time.monotonic(), session=first.session_id,
            exclude={*exclude, *(self._members.all.keys() - able)}, deadline_s=first.deadline_s)

    def _send(self, call: ClusterCall, decision: Decision, requests: Sequence[Request], *, is_again: bool = False
              ) -> None:
        assert decision.name is not None
        sent = self._note_sent(call, decision, requests, is_again=is_again)
        try:
            call.send(self._members.all[decision.name].client, decision.name, sent)
        except EngineDeadError as error:
            self.lost(call, decision.name, error)

    def _decide_pair(self, call: ClusterCall, requests: Sequence[Request]) -> PairDecision:
        able = self._members.able(call.model, call.adapters, requests)
        able = able - self.handovers.paused or able  # one that does not answer gets nothing while there are others
        prompts, first = distinct_prompts(requests), requests[0]
        return self._fleet.decide_pair(
            [self._marks(call, request) for request in prompts], sum(map(_num_tokens, prompts)), len(requests),
            time.monotonic(), session=first.session_id, exclude=self._members.all.keys() - able,
            deadline_s=first.deadline_s)

    def _send_or_go_on(self, call: ClusterCall, decision: Decision, requests: Sequence[Request]) -> None:
        """Send a call where it was to go before it waited; elsewhere if that takes nothing any more."""
        if decision.name in self._members.able(call.model, call.adapters, requests):
            self._send(call, decision, requests)
        else:
            self._begin_going_on(call, EngineDeadError(f"{decision.name} takes no requests any more"))

    def _note_sent(self, call: ClusterCall, decision: Decision, requests: Sequence[Request], *, is_again: bool
                   ) -> list[Request]:
        """As they go there."""
        assert decision.name is not None
        prompts = distinct_prompts(requests)
        num_tokens = sum(map(_num_tokens, prompts))
        self.counts.decisions[decision.reason] += 1
        self.recent.append(Dispatch(time.time(), requests[0].request_id, len(requests), num_tokens,
                                    len(call.tries.lost), decision))
        to_compute = [max(0, _num_tokens(request) - matched)
                      for request, matched in zip(prompts, decision.matched_tokens, strict=True)]
        self.counts.recomputed_tokens += sum(to_compute) if is_again else 0
        own = dict(zip((request.request_id for request in prompts), to_compute, strict=True))
        for request in requests:
            request_id = request.request_id
            self._fleet.sent(decision.name, request_id, own.get(request_id, 0),
                             self._marks(call, request) if request_id in own else NO_MARKS)
        return [self._watcher.sent(request, decision.name, decision.reason) for request in requests]

    def _forget_sent(self, place: str | None, request_ids: Iterable[str]) -> None:
        """Requests are there no more."""
        for request_id in request_ids:
            if place is not None:
                self._fleet.left(place, request_id)

    def _marks(self, call: ClusterCall, request: Request) -> PromptMarks:
        """Of its prompt, made once a call and size of a block."""
        facts, block_size = self._members.facts, self._fleet.block_size
        if facts is None or block_size is None or not facts.config.cache.enable_prefix_caching:
            return NO_MARKS
        key = (block_size, id(request.prompt_token_ids))
        if (known := call.marks.get(key)) is None:
            digest = dict(call.adapters).get(request.lora, "")
            known = prompt_marks(request.prompt_token_ids, block_size, request.cache_salt, digest)
            call.marks[key] = known
        return known


def _cause(error: Exception) -> str:
    """As of `CallWatcher.lost`."""
    if isinstance(error, EngineBusyError):
        return "busy"
    return "refused" if isinstance(error, RequestError) else "lost"


def _num_tokens(request: Request) -> int:
    return len(request.prompt_token_ids) + len(request.generated_token_ids)
