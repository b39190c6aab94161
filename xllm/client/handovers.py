"""`Handovers`: calls whose prompt one instance computes and that go on at another one, which gets the KV meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from xllm.client.ask_pauses import AskPauses, Life
from xllm.client.cluster_call import ClusterCall
from xllm.client.cluster_members import ClusterMember, ClusterMembers
from xllm.engine.commands import Expected
from xllm.errors import EngineDeadError
from xllm.kv_offer import NOTHING_MISSING, KVOffer
from xllm.request import Request
from xllm.routing.fleet import Fleet
from xllm.routing.fleet_snapshot import Decision
from xllm.routing.pair_snapshot import PairDecision

# For an instance to say where KV is to go. Chosen: some steps of a busy engine; the prompt is computed without it then.
ASK_S = 2.0
# For the KV of running requests to reach another instance. Chosen: far more than it takes, and less than a drain waits.
MOVE_S = 10.0
LOOK_S = 0.05  # between looks whether it has. Chosen: a drain waits that much longer
logger = logging.getLogger("xllm.cluster")

Send = Callable[[ClusterCall, Decision, Sequence[Request]], None]


# What comes of calls that begin at an instance that only prefills: the one that was to go on made an offer, has all of
# the KV already, refused, did not answer, was lost; and of those with an offer, how many have gone on there.
OUTCOMES = ("offered", "nothing_missing", "refused", "silent", "lost", "moved")


class Handovers:
    """Belongs to the dispatcher and its event loop. counts: of `OUTCOMES`. send: sends a call where a decision says, or
    elsewhere if that is gone."""

    def __init__(self, members: ClusterMembers, fleet: Fleet, counts: Counter[str], send: Send):
        self._members, self._fleet, self._counts, self._send = members, fleet, counts, send
        # And what each request has as its landing; None: all of its KV is there.
        self._receivers: dict[ClusterCall, tuple[str, dict[str, int | None]]] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._pauses = AskPauses()

    @property
    def paused(self) -> set[str]:
        """The names of instances that are not asked for room at present: they have not answered."""
        self._pauses.keep([_life(member) for member in self._members.all.values()])
        return self._pauses.names(time.monotonic())

    def can_be(self, pair: PairDecision, requests: Sequence[Request]) -> bool:
        """Whether the KV of a call can go from one instance of a pair to the other, and is of any use there."""
        if pair.prefill is None or pair.decode is None or not all(map(_goes_on, requests)):
            return False
        if pair.decode in self.paused:
            return False
        return self._fit(self._members.all[pair.prefill], self._members.all[pair.decode])

    def _fit(self, sender: ClusterMember, receiver: ClusterMember) -> bool:
        mine, theirs = _block_size(sender), _block_size(receiver)
        return sends_kv(sender) and sends_kv(receiver) and not (mine % theirs and theirs % mine)

    def begin(self, call: ClusterCall, requests: Sequence[Request], pair: PairDecision) -> None:
        """Ask the instance that is to decode where the KV is to go, and then send the requests to the other one."""
        task = asyncio.create_task(self._begin(call, requests, pair), name="cluster-handover")
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _begin(self, call: ClusterCall, requests: Sequence[Request], pair: PairDecision) -> None:
        assert pair.decode is not None
        decision = Decision(pair.prefill, pair.reason, pair.scores, pair.matched_tokens)
        found = await self._ask(pair.decode, requests)
        requests = self._open(call, pair.decode, requests, found)
        if not requests:
            return
        if found and all(each.reason == NOTHING_MISSING for each in found.values()):
            self._counts["nothing_missing"] += 1
            self._send(call, Decision(pair.decode, "direct", pair.scores, pair.decode_tokens), requests)
        elif found and all(each.offer is not None or each.reason == NOTHING_MISSING for each in found.values()):
            self._counts["offered"] += 1
            for request in requests:
                self._fleet.expect(pair.decode, request.request_id, len(request.prompt_token_ids))
            self._note(call, pair.decode, requests, found)
            offers = _offers(requests, found)
            self._send(call, decision, [replace(request, offer=offers.get(request.request_id)) for request in requests])
        else:
            if found:
                self._counts["refused"] += 1
                self._call_off(pair.decode, found.values())
            self._send(call, decision, requests)

    def can_move(self, sender: str, receiver: str) -> bool:
        """Whether KV of running requests can go from one instance to another."""
        mine, theirs = self._members.all.get(sender), self._members.all.get(receiver)
        if mine is None or theirs is None or receiver in self.paused:  # one that has left has no KV
            return False
        return self._fit(mine, theirs)

    def move(self, call: ClusterCall, place: str, requests: Sequence[Request], otherwise: Callable[[], object]) -> None:
        """Have a running call go on at `place` once its KV is there; it goes on where it is meanwhile. otherwise: is
        called if that does not come about."""
        task = asyncio.create_task(self._move(call, call.place, place, requests, otherwise), name="cluster-migration")
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _move(self, call: ClusterCall, sender: str | None, place: str, requests: Sequence[Request],
                    otherwise: Callable[[], object]) -> None:
        if call.place != sender:  # it was lost meanwhile
            return
        if call not in self._receivers:  # else it is leaving already
            found = await self._ask(place, requests)
            requests = self._open(call, place, requests, found)
            if not requests or call.place != sender or call in self._receivers:
                self._call_off(place, found.values())
                return
            if found and all(each.offer is not None for each in found.values()):
                self._counts["offered"] += 1
                self._note(call, place, requests, found)
                for request_id, offer in _offers(requests, found).items():
                    call.depart(request_id, offer)
            else:
                self._call_off(place, found.values())
        until_s = time.monotonic() + MOVE_S
        while call in self._receivers and call.open_ids and call.place == sender and time.monotonic() < until_s:
            await asyncio.sleep(LOOK_S)
        if call.open_ids and call.place == sender and call.next_place is None:
            self.forget(call)
            otherwise()

    def _open(self, call: ClusterCall, place: str, requests: Sequence[Request], found: dict[int, Expected]
              ) -> list[Request]:
        """Those that have not ended while an instance was asked. What was asked for the others is taken back."""
        rest = [request for request in requests if request.request_id in call.open_ids]
        unwanted = found.keys() - {id(request.prompt_token_ids) for request in rest}
        self._call_off(place, [found.pop(prompt) for prompt in unwanted])
        return rest

    def _note(self, call: ClusterCall, place: str, requests: Sequence[Request], found: Mapping[int, Expected]) -> None:
        """Where a call is to go on, and which of its requests have KV on its way there."""
        answers = {request.request_id: found[id(request.prompt_token_ids)] for request in requests}
        self._receivers[call] = place, {request_id: None if answer.offer is None else answer.landing
                                        for request_id, answer in answers.items()}

    async def _ask(self, place: str, requests: Sequence[Request]) -> dict[int, Expected]:
        """By the identity of each prompt; empty if the instance has not answered for all of them: what it has answered
        is taken back then."""
        member = self._members.all.get(place)
        prompts = {id(request.prompt_token_ids): request for request in reversed(requests)}
        if member is None or member.client.facts is None:
            return {}
        lease_s = member.client.facts.config.transfer.kv_lease_s
        tasks = {prompt: asyncio.create_task(member.client.expect(request, lease_s), name="cluster-expect")
                 for prompt, request in prompts.items()}
        try:
            await asyncio.wait(tasks.values(), timeout=ASK_S)
        finally:
            for task in tasks.values():
                task.cancel()
        found, outcome = _answered(tasks)
        if outcome:
            self._counts[outcome] += 1
            self._call_off(place, found.values())
            if outcome == "silent":
                self._note_silent(member)
            return {}
        self._pauses.answered(_life(member))
        for answer in found.values():
            if answer.offer is None and answer.reason != NOTHING_MISSING:
                logger.info("%s does not take the KV of a request: %s", place, answer.reason)
        return found

    def _note_silent(self, member: ClusterMember) -> None:
        pause_s = self._pauses.silent(_life(member), time.monotonic())
        logger.warning("%s has not said within %g s where KV is to go: it is not asked again for %.1f s", member.name,
                       ASK_S, pause_s)

    def _call_off(self, place: str, answers: Iterable[Expected]) -> None:
        """Take back what was asked for: nothing goes there."""
        for answer in answers:
            if answer.offer is not None:
                self._unexpect(place, {answer.landing})

    def _unexpect(self, place: str, landings: Iterable[int | None]) -> None:
        if (member := self._members.all.get(place)) is not None:
            for landing in landings:
                if landing is not None:
                    member.client.unexpect(landing)

    def take(self, call: ClusterCall) -> tuple[str, list[Request]] | None:
        """Where a call goes on that was handed over, and what of it; None: that instance is gone, or takes nothing."""
        place, landings = self._receivers.get(call, ("", {}))
        if place not in self._members.able(call.model, call.adapters, call.rest):
            self.forget(call)
            return None
        del self._receivers[call]
        self._counts["moved"] += 1
        return place, [replace(request, landing=landings.get(request.request_id)) for request in call.rest]

    def forget(self, call: ClusterCall) -> None:
        """A call goes on somewhere else, or is where it was not to be."""
        if (receiver := self._receivers.get(call)) is not None:
            self.left(call, list(receiver[1]))

    def left(self, call: ClusterCall, request_ids: Sequence[str]) -> None:
        """Requests of a call do not go on where their KV was to go: that frees the room, if no other of the call has
        the same prompt."""
        if call not in self._receivers:
            return
        place, landings = self._receivers[call]
        gone = {landings.pop(request_id, None) for request_id in request_ids}
        for request_id in request_ids if place != call.place else ():
            self._fleet.left(place, request_id)
        self._unexpect(place, gone.difference(landings.values()))
        if not landings:
            del self._receivers[call]

    def stays(self, call: ClusterCall, request_id: str) -> None:
        """The KV of a prompt, of which this is a request, cannot be sent: it needs no room."""
        _, landings = self._receivers.get(call, ("", dict[str, int | None]()))
        if (landing := landings.get(request_id)) is not None:
            self.left(call, [name for name, found in landings.items() if found == landing])

    async def close(self) -> None:
        """End what asks."""
        for task in list(self._asking):
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)


def _answered(tasks: Mapping[int, asyncio.Task[Expected]]) -> tuple[dict[int, Expected], str]:
    """What has been answered, and why that is not all, as one of `OUTCOMES`; "": it is."""
    found, outcome = dict[int, Expected](), ""
    for prompt, task in tasks.items():
        if not task.done():
            outcome = outcome or "silent"
        elif isinstance(task.exception(), EngineDeadError):
            outcome = "lost"
        else:
            found[prompt] = task.result()
    return found, outcome


def _offers(requests: Sequence[Request], found: Mapping[int, Expected]) -> dict[str, KVOffer]:
    """One request of each prompt, by id, and where the KV of that is to go: what several share is sent once."""
    first = {id(request.prompt_token_ids): request.request_id for request in reversed(requests)}
    return {first[prompt]: answer.offer for prompt, answer in found.items() if answer.offer is not None}


def _life(member: ClusterMember) -> Life:
    return member.name, member.client.incarnation


def sends_kv(member: ClusterMember) -> bool:
    """Whether an instance sends KV to others and takes theirs."""
    return member.client.facts is not None and member.client.facts.config.transfer.enable_disagg_pd


def _block_size(member: ClusterMember) -> int:
    assert member.client.facts is not None and member.client.facts.config.cache.block_size is not None
    return member.client.facts.config.cache.block_size


def _goes_on(request: Request) -> bool:
    """Whether a request has more than one token to come."""
    return request.pooling is None and request.sampling.max_tokens != 1
