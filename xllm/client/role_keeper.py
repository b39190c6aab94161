"""`RoleKeeper`: turns instances of a running cluster from prefill to decode and back, as the load changes.

What is decided is `routing/role_plan.py`'s; here it is carried out. New work goes by the new role at once. What an
instance has of the old one leaves it: running requests go on at others with their KV (`Dispatcher.hand_over`), and
prompts that wait are computed where they are. Nothing waits for that, and a request that nobody else takes stays.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from xllm.client.cluster_members import ClusterMembers
from xllm.client.dispatch import Dispatcher
from xllm.client.handovers import sends_kv
from xllm.routing.fleet import Fleet
from xllm.routing.role_plan import plan_roles
from xllm.routing.role_snapshot import Flip, RolePlan, RoleRules, RoleSnapshot, RoleState
from xllm.routing.roles import Role

LOOK_S = 0.5  # between looks. Chosen: as often as instances say how they are, and several within what a state must last
KEPT_ROLES = ("DEFAULT", "MIX")  # of instances that do whole requests: theirs are never changed
logger = logging.getLogger("xllm.cluster")

RolePlanner = Callable[[RoleSnapshot, RoleState, RoleRules], RolePlan]


class _Turn(NamedTuple):
    """An instance on its way out of a role, and the requests that it had of it."""

    role: Role
    request_ids: frozenset[str]


class RoleKeeper:
    """Belongs to the event loop of the dispatcher. flips: how many there were, by their reasons. plan: `plan_roles`,
    or another pure function like it."""

    def __init__(self, members: ClusterMembers, fleet: Fleet, dispatcher: Dispatcher, rules: RoleRules,
                 plan: RolePlanner = plan_roles):
        self.flips = Counter[str]()
        self._members, self._fleet, self._dispatcher = members, fleet, dispatcher
        self._rules, self._plan = rules, plan
        self._state = RoleState()
        self._turns: dict[str, _Turn] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                self.look()
            except Exception:  # roles stay as they are, and requests are served
                logger.exception("the roles of the cluster's instances could not be looked at")

    def look(self) -> None:
        """Decide once, and begin what was decided."""
        self._turns = {name: turn for name, turn in self._turns.items() if self._is_turning(name, turn)}
        if not self._fleet.has_pairs:
            return
        fixed = {name for name, member in self._members.all.items()
                 if member.role in KEPT_ROLES or member.was_drained or not member.is_ready or not sends_kv(member)}
        snapshot = self._fleet.roles(time.monotonic(), {name: turn.role for name, turn in self._turns.items()}, fixed)
        plan = self._plan(snapshot, self._state, self._rules)
        self._state = plan.state
        for flip in plan.flips:
            self._turn(flip)

    def _is_turning(self, name: str, turn: _Turn) -> bool:
        """Whether an instance still has work of the role that it had."""
        if name not in self._members.all:
            return False
        calls = {call for request_id in turn.request_ids
                 if (call := self._dispatcher.calls.get(request_id)) is not None and call.place == name}
        return bool(calls) if turn.role == "DECODE" else not all(call.has_output for call in calls)

    def _turn(self, flip: Flip) -> None:
        member = self._members.all[flip.name]
        before: Role = "DECODE" if flip.role == "PREFILL" else "PREFILL"
        there = frozenset(request_id for request_id, call in self._dispatcher.calls.items() if call.place == flip.name)
        self.flips[flip.reason] += 1
        self._turns[flip.name] = _Turn(before, there)
        self._members.turn(flip.name, flip.role, flip.reason)
        self._fleet.turn(flip.name, flip.role)
        logger.info("%s is a %s instance from now on (%s): it spares %.2f s beyond the targets, adds %.2f s, and "
                    "costs %.2f s; requests there: %d", flip.name, flip.role, flip.reason, flip.gain_s, flip.loss_s,
                    flip.cost_s, len(there))
        if flip.role == "PREFILL":
            self._dispatcher.hand_over(member)
        self._dispatcher.notice()
