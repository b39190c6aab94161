"""`Handovers`: calls whose prompt one instance computes and that go on at another one, which gets the KV meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from xllm.client.cluster_call import ClusterCall
from xllm.client.cluster_members import ClusterMember, ClusterMembers
from xllm.engine.commands import Expected
from xllm.errors import EngineDeadError
from xllm.kv_offer import NOTHING_MISSING
from xllm.request import Request
from xllm.routing.fleet_snapshot import Decision
from xllm.routing.roles import TAKES_OVER, WHOLE

# For an instance to say where KV is to go. Chosen: some steps of a busy engine; the prompt is computed without it then.
ASK_S = 2.0
logger = logging.getLogger("xllm.cluster")

Choose = Callable[[ClusterCall, Sequence[Request], set[str]], Decision]  # among these instances
Send = Callable[[ClusterCall, Decision, Sequence[Request]], None]


# What comes of calls that begin at an instance that only prefills: the one that was to go on made an offer, has all of
# the KV already, refused, did not answer, was lost; and of those with an offer, how many have gone on there.
OUTCOMES = ("offered", "nothing_missing", "refused", "silent", "lost", "moved")


class Handovers:
    """Belongs to the dispatcher and its event loop. counts: of `OUTCOMES`. choose: finds the best of some instances for
    a call. send: sends it where a decision says, or elsewhere if that is gone."""

    def __init__(self, members: ClusterMembers, counts: Counter[str], choose: Choose, send: Send):
        self._counts = counts
        self._members, self._choose, self._send = members, choose, send
        self._receivers: dict[ClusterCall, tuple[str, dict[str, int]]] = {}  # and what each request has as its landing
        self._asking: set[asyncio.Task[None]] = set()

    def receiver(self, call: ClusterCall, requests: Sequence[Request], place: str) -> Decision | None:
        """Where a call that begins at `place` is to go on; None: there."""
        begins = self._members.all[place]
        if begins.role != "PREFILL" or not _sends_kv(begins) or not all(map(_goes_on, requests)):
            return None
        others = {name for name in self._members.able(call.model, call.adapters, requests)
                  if name != place and self._fits(begins, self._members.all[name])}
        decision = self._choose(call, requests, others) if others else None
        return None if decision is None or decision.name is None or decision.reason == "full" else decision

    def _fits(self, begins: ClusterMember, member: ClusterMember) -> bool:
        mine, theirs = _block_size(begins), _block_size(member)
        return member.role in (*TAKES_OVER, *WHOLE) and _sends_kv(member) and not (mine % theirs and theirs % mine)

    def begin(self, call: ClusterCall, requests: Sequence[Request], decision: Decision, receiver: Decision) -> None:
        """Ask the receiver where the KV is to go, and then send the requests to where `decision` says."""
        task = asyncio.create_task(self._begin(call, requests, decision, receiver), name="cluster-handover")
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _begin(self, call: ClusterCall, requests: Sequence[Request], decision: Decision,
                     receiver: Decision) -> None:
        assert receiver.name is not None
        found = await self._ask(receiver.name, requests)
        requests = [request for request in requests if request.request_id in call.open_ids]
        if not requests:
            return
        if found and all(each.reason == NOTHING_MISSING for each in found.values()):
            self._counts["nothing_missing"] += 1
            self._send(call, receiver, requests)
        elif found and all(each.offer is not None for each in found.values()):
            self._counts["offered"] += 1
            self._receivers[call] = receiver.name, {request.request_id: found[id(request.prompt_token_ids)].landing
                                                    for request in requests}
            self._send(call, decision, [replace(request, offer=found[id(request.prompt_token_ids)].offer)
                                        for request in requests])
        else:
            if found:
                self._counts["refused"] += 1
            self._send(call, decision, requests)

    async def _ask(self, place: str, requests: Sequence[Request]) -> dict[int, Expected]:
        """By the identity of each prompt; empty if the instance has not answered."""
        member = self._members.all.get(place)
        prompts = {id(request.prompt_token_ids): request for request in reversed(requests)}
        if member is None or member.client.facts is None:
            return {}
        lease_s = member.client.facts.config.transfer.kv_lease_s
        try:
            answers = await asyncio.wait_for(
                asyncio.gather(*(member.client.expect(request, lease_s) for request in prompts.values())), ASK_S)
        except asyncio.TimeoutError:
            self._counts["silent"] += 1
            return {}
        except EngineDeadError:
            self._counts["lost"] += 1
            return {}
        for answer in answers:
            if answer.offer is None and answer.reason != NOTHING_MISSING:
                logger.info("%s does not take the KV of a request: %s", place, answer.reason)
        return dict(zip(prompts, answers, strict=True))

    def take(self, call: ClusterCall) -> tuple[str, list[Request]] | None:
        """Where a call goes on that was handed over, and what of it; None: that instance is gone, or takes nothing."""
        place, landings = self._receivers.pop(call, ("", {}))
        if place not in self._members.able(call.model, call.adapters, call.rest):
            return None
        self._counts["moved"] += 1
        return place, [replace(request, landing=landings.get(request.request_id)) for request in call.rest]

    def forget(self, call: ClusterCall) -> None:
        """A call has ended, or is where it was not to be."""
        self._receivers.pop(call, None)

    async def close(self) -> None:
        """End what asks."""
        for task in list(self._asking):
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)


def _sends_kv(member: ClusterMember) -> bool:
    return member.client.facts is not None and member.client.facts.config.transfer.enable_disagg_pd


def _block_size(member: ClusterMember) -> int:
    assert member.client.facts is not None and member.client.facts.config.cache.block_size is not None
    return member.client.facts.config.cache.block_size


def _goes_on(request: Request) -> bool:
    """Whether a request has more than one token to come."""
    return request.pooling is None and request.sampling.max_tokens != 1
