"""`ClusterClient`: the instances of a cluster, which come and go, as one engine.

A call goes to one of them, chosen by `xllm/routing/fleet.py`. What an instance had when it is lost, or shuts down, goes
on at another one, behind the tokens that its reader has got; the reader sees a pause and nothing else. A command goes
to all.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from xllm.client.call_watcher import CallWatcher, NoCallWatcher
from xllm.client.cluster_members import ClusterMember, ClusterMembers
from xllm.client.dispatch import Dispatch, Dispatcher
from xllm.client.dispatch_counts import DispatchCounts
from xllm.client.engine_client import EngineAwayError, Stream
from xllm.client.kv_subscriber import KVSubscriber
from xllm.client.member_client import MemberClient
from xllm.client.replica_control import ReplicaControl
from xllm.client.role_keeper import RoleKeeper
from xllm.engine.commands import Action, Controlled, EngineState, Expected
from xllm.engine.facts import EngineFacts
from xllm.engine.step_log import StepReport
from xllm.errors import EngineDeadError, RequestError
from xllm.kv_offer import KVOffer
from xllm.request import Request
from xllm.routing.fleet import Fleet
from xllm.routing.role_snapshot import RoleRules
from xllm.routing.routed_instance import LoadReport
from xllm.routing.vllm_reader import VllmReader
from xllm.stats import EngineStats

_SEED_BITS = 63  # Chosen: what a signed 64-bit number holds, wherever it is written down
_READER_TIERS = 2  # blocks that are followed of an instance, over those of its device. Chosen: it may offload as many
logger = logging.getLogger("xllm.cluster")


class ClusterClient:
    """A `WatchedEngine` for one event loop. Whoever connects the instances tells it who is there (`join`, `leave`).

    Its clients belong to whoever joined them: they are not closed here. watcher: None: nobody. rules: by which
    instances that prefill are turned to decode, and back; None: they keep the roles that they joined with.
    """

    def __init__(self, fleet: Fleet | None = None, watcher: CallWatcher | None = None, *,
                 rules: RoleRules | None = None):
        self.members = ClusterMembers()
        self._fleet = fleet or Fleet()
        self._dispatcher = Dispatcher(self.members, self._fleet, watcher or NoCallWatcher())
        self._roles = None if rules is None else RoleKeeper(self.members, self._fleet, self._dispatcher, rules)
        self._keeping: asyncio.Task[None] | None = None
        self._control = ReplicaControl(self._up_labelled)
        self._joining: dict[str, asyncio.Task[None]] = {}
        self._subscriber: KVSubscriber | None = None  # to the events of instances that publish them
        self._unfound: dict[str, int | None] = {}  # sizes of blocks that were warned of, by instance

    # --- who is there

    def join(self, name: str, client: MemberClient, *, role: str = "DEFAULT") -> None:
        """An instance is connected and may get requests, as soon as it has the adapters and the state of the others.
        An instance of that name that is there leaves first. Raises ValueError as `Fleet.join` does."""
        self.leave(name, "another one has joined under its name")
        facts = client.facts
        assert facts is not None and facts.config.cache.block_size is not None, "it is connected"
        scheduler = facts.config.scheduler
        self._fleet.join(name, role=role, block_size=facts.config.cache.block_size,
                         max_waiting=scheduler.max_waiting_requests,
                         max_open=scheduler.max_concurrent_requests or 2**63, num_blocks=facts.num_blocks,
                         kv_token_bytes=facts.placement.kv_token_bytes)
        member = self.members.add(name, client, role)
        if self._roles is not None and self._keeping is None:
            self._keeping = asyncio.create_task(self._roles.run(), name="cluster-roles")
        self._dispatcher.lives(client.incarnation)
        client.on_cache_changes = lambda changes: self._fleet.changed(name, changes.tier, changes.stored,
                                                                      changes.removed)
        client.on_condition = lambda: self._heard(member)
        if client.kv_events is not None:
            self._subscriber = self._subscriber or KVSubscriber(self._fleet.index)
            self._subscriber.follow(name, client.kv_events.endpoint, client.kv_events.replay_endpoint,
                                    reader=VllmReader(_READER_TIERS * facts.num_blocks))
        self._control.know_adapters(facts.config.lora.lora_modules)
        if self._control.state is None:
            self._ready(member)
        else:
            task = asyncio.create_task(self._catch_up(member), name=f"cluster-join-{name}")
            self._joining[name] = task
            task.add_done_callback(lambda done: self._joining.pop(name, None))

    def leave(self, name: str, reason: str) -> None:
        """An instance is gone, or gets no more requests: what it has is handed over, as far as others take it."""
        if (member := self.members.remove(name, reason)) is None:
            return
        if (joining := self._joining.pop(name, None)) is not None:
            joining.cancel()
        member.client.on_cache_changes = lambda changes: None
        member.client.on_condition = lambda: None
        self._dispatcher.hand_over(member)
        if self._subscriber is not None:
            self._subscriber.drop(name)
        self._fleet.leave(name)
        if self._control.state is not None and not self.members.all:
            logger.warning("the last instance has left; the next ones get the state that it had")

    def _ready(self, member: ClusterMember) -> None:
        member.is_ready = True
        self._heard(member)
        self._dispatcher.notice()

    async def _catch_up(self, member: ClusterMember) -> None:
        try:
            await self._control.catch_up(member.client)
        except EngineDeadError as error:
            logger.warning("%s was lost while it was brought to the state of the others: %s", member.name, error)
            return
        if self.members.all.get(member.name) is member:
            self._ready(member)

    def _look_at_blocks(self, name: str) -> None:
        """Say it once if what an instance publishes cannot be found."""
        followed = None if self._subscriber is None else self._subscriber.instances.get(name)
        size = None if followed is None else followed.feed.block_size
        if size not in (None, self._fleet.block_size, self._unfound.get(name)):
            self._unfound[name] = size
            logger.warning("%s: its KV events are of blocks of %d tokens, prompts are looked up in blocks of %d: "
                           "nothing that it has cached is found", name, size, self._fleet.block_size)

    def _heard(self, member: ClusterMember) -> None:
        self._look_at_blocks(member.name)
        client, stats = member.client, member.client.stats
        self._fleet.heard(member.name, LoadReport(
            num_waiting=stats.num_waiting, num_running=stats.num_running, num_free_blocks=_num_free_blocks(client),
            steps=client.steps.recent), time.monotonic())
        if client.draining and not member.was_drained:
            member.was_drained = True
            self._dispatcher.hand_over(member)

    def _up_labelled(self) -> dict[str, MemberClient]:
        up = self.members.up
        return {f"instance {name}": client for name, client in up.items()
                if client.takes_commands or not any(one.takes_commands for one in up.values())}

    async def close(self) -> None:
        """End what looks for an instance, and forget all of them."""
        for name in list(self.members.all):
            self.members.remove(name, "the cluster's client was closed")
        for task in (*self._joining.values(), *filter(None, [self._keeping])):
            task.cancel()
        await self._dispatcher.close()
        if self._subscriber is not None:
            await self._subscriber.close()

    # --- how they are

    @property
    def facts(self) -> EngineFacts | None:
        """Of the first that is there, or else of the last that was; what is not of the model, such as the size of a KV
        block, may differ."""
        return self.members.facts

    @property
    def is_up(self) -> bool:
        """Whether requests are taken: one instance is enough."""
        return self.members.any_up

    @property
    def dead_reason(self) -> str | None:
        """None: others may join at any time."""
        return None

    @property
    def restarting_after(self) -> str | None:
        """Why there is no instance, after there has been one."""
        return None if self.is_up or self.phase == "waiting for an instance" else self.members.why_none()

    @property
    def phase(self) -> str:
        """Before the first instance has joined it is waited for."""
        if self.is_up:
            return "ready"
        return "all instances are away" if self.members.all or self.members.gone else "waiting for an instance"

    @property
    def engines(self) -> tuple[ClusterClient, ...]:
        """Itself: instances come and go, and each of them counts for itself."""
        return (self,)

    def silent_for_s(self) -> float:
        """Of the instance that moved on last: as long as one does, requests are served."""
        return self.members.silent_for_s()

    @property
    def stats(self) -> EngineStats:
        """Of all instances together, totals of those that have left included."""
        return self.members.stats

    @property
    def steps(self) -> StepReport:
        """Of all instances together."""
        return self.members.steps

    @property
    def on_steps(self) -> Callable[[StepReport], None]:
        """Called with each report of steps, whichever instance it comes from."""
        return self.members.on_steps

    @on_steps.setter
    def on_steps(self, hear: Callable[[StepReport], None]) -> None:
        self.members.on_steps = hear

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that requests may ask for: one instance that has the adapter is enough."""
        return self.members.adapters

    @property
    def sleep_level(self) -> int:
        """0: awake."""
        return self.members.sleep_level

    @property
    def counts(self) -> DispatchCounts:
        """What was decided, and what went on elsewhere."""
        return self._dispatcher.counts

    @property
    def flips(self) -> Mapping[str, int]:
        """How often an instance's role was changed, by the reasons."""
        return {} if self._roles is None else self._roles.flips

    @property
    def recent(self) -> deque[Dispatch]:
        """The last decisions, the newest behind."""
        return self._dispatcher.recent

    def num_sent(self, name: str) -> int:
        """Requests that are at this instance."""
        return self._dispatcher.num_sent(name)

    def num_cached_blocks(self, name: str) -> int:
        """KV blocks that this instance can find, in whichever tier, as far as is known."""
        return self._fleet.index.num_blocks_of(name)

    # --- requests and commands

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of the requests that have not ended."""
        return tuple(self._dispatcher.calls)

    def submit(self, requests: Sequence[Request]) -> Stream:
        """See `EngineClient.submit`. All requests of a call go to one instance, and to another one together."""
        for request in requests:
            if request.request_id in self._dispatcher.calls:
                raise RequestError(f"request_id {request.request_id!r} is in use", field="request_id")
        return self._dispatcher.begin([_seeded(request) for request in requests])

    def abort(self, request_ids: Iterable[str]) -> None:
        """See `EngineClient.abort`."""
        for request_id in request_ids:
            if (call := self._dispatcher.calls.get(request_id)) is not None:
                call.abort_at([request_id])

    async def expect(self, request: Request, lease_s: float) -> Expected:
        """See `EngineClient.expect`: its instances send KV to each other, nobody to all of them."""
        return Expected(0, reason="a cluster as a whole takes no KV")

    def unexpect(self, landing: int) -> None:
        """See `EngineClient.unexpect`: it makes no offers."""

    def depart(self, request_id: str, offer: KVOffer) -> None:
        """See `EngineClient.depart`: where its requests are is its own affair."""

    async def control(self, action: Action, **options: Any) -> Controlled:
        """See `EngineClient.control`: all instances do it, or none. The error of one that refuses names it."""
        if not self.is_up:
            raise EngineAwayError(self.members.why_none())
        deaf = [name for name, client in self.members.up.items() if not client.takes_commands]
        if deaf and action != "state":
            return Controlled(0, EngineState(), error=f"instance {deaf[0]} takes no commands, and all do it or none",
                              is_state=True)
        return await self._control.run(action, options)


def _num_free_blocks(client: MemberClient) -> int:
    """As it said last; before it has said anything, all."""
    assert client.facts is not None
    return client.stats.num_free_blocks if client.stats.num_blocks else client.facts.num_blocks


def _seeded(request: Request) -> Request:
    """With a seed, if it draws at random and has none: whoever goes on with it draws the same."""
    sampling = request.sampling
    if sampling.seed is not None or sampling.temperature == 0 or request.pooling is not None:
        return request
    return request.varied(sampling=sampling.varied(seed=random.getrandbits(_SEED_BITS)))
