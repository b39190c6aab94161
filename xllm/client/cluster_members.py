"""`ClusterMembers`: the instances of a cluster that are there, by their names."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from xllm.client.gate_wire import UNCHECKED
from xllm.client.member_client import MemberClient
from xllm.client.merged_stats import merged_stats, merged_steps
from xllm.engine.facts import EngineFacts
from xllm.engine.step_log import StepReport
from xllm.errors import RequestError
from xllm.request import Request
from xllm.stats import Counters, EngineStats

# Without a sign of progress an instance gets no requests while others move on. As in `replicas.py`.
SILENT_S = 5.0
MAX_EVENTS = 100  # that are kept to be looked at. Chosen: minutes of a cluster in trouble, years of one that is not
MAX_GONE = 64  # lives of instances whose totals are kept one by one. Chosen: those that may come back


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    """What has happened to an instance, and when. recovered: calls that it had go on elsewhere. turned: it has
    another role. text: why it left, how many calls, or which role and why."""

    unix_s: float
    kind: Literal["joined", "left", "recovered", "turned"]
    instance: str
    text: str = ""


@dataclass(slots=True, eq=False)
class ClusterMember:
    """role: of `routing/roles.py:ROLES`. is_ready: it has been brought to the state that the others are in.
    was_drained: its requests were handed over."""

    name: str
    client: MemberClient
    role: str = "DEFAULT"
    is_ready: bool = False
    was_drained: bool = False


class ClusterMembers:
    """on_steps: called with each report of steps of any of them. gone: why each name that is not there any more left.
    events: the last ones, the newest behind.

    Belongs to the event loop of the clients.
    """

    def __init__(self) -> None:
        self.all: dict[str, ClusterMember] = {}
        self.gone: dict[str, str] = {}
        self.events: deque[ClusterEvent] = deque(maxlen=MAX_EVENTS)
        self.on_steps: Callable[[StepReport], None] = lambda steps: None
        self._facts: EngineFacts | None = None
        self._past: dict[str, EngineStats] = {}  # totals of those that left, by incarnation
        self._long_past = EngineStats()

    def add(self, name: str, client: MemberClient, role: str = "DEFAULT") -> ClusterMember:
        """An instance is there."""
        member = self.all[name] = ClusterMember(name, client, role)
        self.gone.pop(name, None)
        self.events.append(ClusterEvent(time.time(), "joined", name))
        if client.incarnation is not None:
            self._past.pop(client.incarnation, None)  # its connection was cut, it counts on
        client.on_steps = lambda steps: self.on_steps(steps)
        return member

    def remove(self, name: str, reason: str) -> ClusterMember | None:
        """It has left; None: it was not there."""
        if (member := self.all.pop(name, None)) is None:
            return None
        self.gone[name] = reason
        self.events.append(ClusterEvent(time.time(), "left", name, reason))
        while len(self.gone) > MAX_GONE:
            del self.gone[next(iter(self.gone))]
        self._past[member.client.incarnation or name] = _totals(member.client.stats)
        if len(self._past) > MAX_GONE:
            oldest = self._past.pop(next(iter(self._past)))
            self._long_past = merged_stats([self._long_past, oldest])
        return member

    def note_recovered(self, name: str, num_requests: int) -> None:
        """Requests that an instance had go on elsewhere."""
        requests = "request goes" if num_requests == 1 else "requests go"
        self.events.append(ClusterEvent(time.time(), "recovered", name, f"{num_requests} {requests} on elsewhere"))

    def turn(self, name: str, role: str, reason: str) -> None:
        """An instance that is there has another role, for new work."""
        self.all[name].role = role
        self.events.append(ClusterEvent(time.time(), "turned", name, f"{role} ({reason})"))

    # --- who takes requests

    @property
    def up(self) -> dict[str, MemberClient]:
        """Those that take requests."""
        return {name: member.client for name, member in self.all.items() if member.is_ready and member.client.is_up}

    @property
    def roles(self) -> dict[str, str]:
        """Of all that are there, by name."""
        return {name: member.role for name, member in self.all.items()}

    @property
    def any_up(self) -> bool:
        """Whether any takes requests."""
        return any(member.is_ready and member.client.is_up for member in self.all.values())

    @property
    def model(self) -> str | None:
        """The fingerprint of what the first of those serves that take requests and have one."""
        found = [_model_of(member.client) for member in self.all.values() if member.is_ready and member.client.is_up]
        return next(filter(None, found), found[0] if found else None)

    def able(self, model: str | None, adapters: Collection[tuple[str, str]],
             requests: Sequence[Request] = ()) -> set[str]:
        """The names of those that serve this model, have these adapters (name and digest), can do what these requests
        ask for and take requests: one that hangs gets none while another one moves on."""
        up = {name: client for name, client in self.up.items()
              if (_model_of(client) == model or UNCHECKED in (model, _model_of(client)))
              and client.refusal(requests) is None}
        moving = {name: client for name, client in up.items() if client.silent_for_s() < SILENT_S} or up
        if not adapters:
            return set(moving)
        return {name for name, client in moving.items()
                if set(adapters) <= set(zip(client.adapters, client.adapter_digests))}

    def refusal(self, requests: Sequence[Request]) -> RequestError | None:
        """Why none of those that take requests can do what these ask for; None: one can, or none takes any."""
        found = [client.refusal(requests) for client in self.up.values()]
        return None if None in found else next(iter(found), None)

    @property
    def digests(self) -> dict[str, str]:
        """Of the adapters that are loaded, by name: of two that have one name those of the first instance count."""
        found: dict[str, str] = {}
        for client in self._seen():
            for name, digest in zip(client.adapters, client.adapter_digests):
                found.setdefault(name, digest)
        return found

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that requests may ask for."""
        return tuple(self.digests)

    @property
    def sleep_level(self) -> int:
        """0: one of them at least is awake."""
        return min((client.sleep_level for client in self._seen()), default=0)

    def _seen(self) -> Iterable[MemberClient]:
        return self.up.values()

    # --- what they say

    @property
    def facts(self) -> EngineFacts | None:
        """Of the first that is there; where none is, those of the last one."""
        found = next((member.client.facts for member in self.all.values()), None)
        self._facts = found or self._facts
        return self._facts

    @property
    def stats(self) -> EngineStats:
        """Of all of them together; totals are those of instances that have left, too."""
        return merged_stats([self._long_past, *self._past.values(),
                             *(member.client.stats for member in self.all.values())])

    @property
    def steps(self) -> StepReport:
        """Of all that are there together."""
        return merged_steps([member.client.steps for member in self.all.values()])

    def silent_for_s(self) -> float:
        """Of the one that moved on last."""
        return min((client.silent_for_s() for client in self.up.values()), default=0.0)

    def why_none(self) -> str:
        """Why nobody takes requests, as far as is known."""
        said = [f"{name}: {_why_not_up(member)}" for name, member in self.all.items()]
        said += [f"{name}: {reason}" for name, reason in list(self.gone.items())[-3:]]
        return "no instance takes requests" + (f" ({'; '.join(said)})" if said else ": none has joined")


def _why_not_up(member: ClusterMember) -> str:
    client = member.client
    if client.dead_reason is not None:
        return client.dead_reason
    if client.draining:
        return "it is shutting down"
    return "it is brought to the state of the others" if not member.is_ready else client.phase


def _model_of(client: MemberClient) -> str | None:
    return None if client.model is None else client.model.fingerprint


def _totals(stats: EngineStats) -> EngineStats:
    return EngineStats(num_steps=stats.num_steps, **{f.name: getattr(stats, f.name) for f in fields(Counters)})
