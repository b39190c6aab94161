"""`MasterMembers`: tells a master's cluster clients which instances they may use, wherever these are known from."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from serving.api.cluster_view import MemberRow
from serving.cluster.instance_link import LinkSettings, MemberState
from serving.cluster.instance_record import InstanceRecord
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.registry import Member, Registry
from serving.cluster.static_instances import StaticInstance, StaticInstances
from serving.commands.master_models import MasterModel, MasterModels
from xllm.client.cluster_keys import ClusterKeys
from xllm.client.gate_wire import UNCHECKED
from xllm.client.member_client import MemberClient
from xllm.client.openai_server import OpenAIServer
from xllm.client.remote import RemoteClient
from xllm.client.server_place import ServerPlace
from xllm.engine.facts import EngineFacts
from xllm.stats import EngineStats

logger = logging.getLogger("xllm.master")


@dataclass(frozen=True, slots=True)
class _Refused:
    client: MemberClient
    role: str
    reason: str


class MasterMembers:
    """An instance is used for the model that it serves (`MasterModels`), or refused by name.

    on_names(model, is_new): called when an instance has joined, with its model, whose names may be more now, and
    whether it is the first of it.
    """

    def __init__(self, models: MasterModels, keys: ClusterKeys | None, on_names: Callable[[MasterModel, bool], None]):
        self._models, self._keys, self._on_names = models, keys, on_names
        self._registry: Registry | None = None
        self._static: list[StaticInstances] = []
        self._refused: dict[str, _Refused] = {}  # by name, those that are connected and not used
        self._roles: dict[str, str] = {}  # by name, of those that are used

    async def follow_store(self, store: KeyValueStore) -> Callable[[], Mapping[str, EngineStats]]:
        """Use what registers there; returns what gives the loads of the instances. Raises as `Registry.start` does."""
        assert self._keys is not None
        self._registry = registry = Registry(store, LinkSettings(self._keys), on_join=self._join_registered,
                                             on_leave=self._leave)
        await registry.start()
        return registry.loads

    def follow_addresses(self, addresses: Sequence[str]) -> None:
        """Use what listens there."""
        if addresses:
            assert self._keys is not None
            self._follow({address: functools.partial(RemoteClient, address, self._keys, name="master")
                          for address in addresses})

    def follow_servers(self, servers: Sequence[ServerPlace]) -> None:
        """Use these OpenAI servers."""
        self._follow({place.name: functools.partial(OpenAIServer, place) for place in servers})

    def _follow(self, makers: Mapping[str, Callable[[], MemberClient]]) -> None:
        static = StaticInstances(makers, on_join=self._join, on_leave=self._leave)
        self._static.append(static)
        static.start()

    async def close(self) -> None:
        """Leave them all."""
        if self._registry is not None:
            await self._registry.close()
        for static in self._static:
            await static.close()

    def rows(self) -> list[MemberRow]:
        """All that are known, as they are now."""
        registered = () if self._registry is None else self._registry.members()
        return [*map(self._registered_row, registered),
                *(self._static_row(one) for static in self._static for one in static.all)]

    # ---

    def _join_registered(self, name: str, client: RemoteClient, record: InstanceRecord) -> None:
        self._join(name, client, record.role)

    def _join(self, name: str, client: MemberClient, role: str | None = None) -> None:
        """role: None: the one that it says it has."""
        role = role or client.role
        assert client.model is not None and client.facts is not None
        try:
            model = self._models.find(client.model)
            if model.is_served and (wrong := _difference(client.facts, model.cluster.facts)):
                raise ValueError(wrong)
            model.cluster.join(name, client, role=role)
        except ValueError as error:
            self._refuse(name, _Refused(client, role, str(error)))
            return
        self._refused.pop(name, None)
        self._roles[name] = role
        self._on_names(model, self._models.note(model, client.model))

    def _refuse(self, name: str, refused: _Refused) -> None:
        self._refused[name] = refused
        logger.error("instance %s is not used: %s", name, refused.reason)

    def give_up(self, model: MasterModel, fault: str) -> None:
        """A model cannot be served here: its instances are used no more."""
        model.fault = fault
        for name, member in list(model.cluster.members.all.items()):
            model.cluster.leave(name, fault)
            self._refuse(name, _Refused(member.client, self._roles[name], fault))

    def _leave(self, name: str, reason: str) -> None:
        self._refused.pop(name, None)
        for model in self._models.all:
            if name in model.cluster.members.all:
                model.cluster.leave(name, reason)
                if not model.is_served:
                    self._try_again()

    def _try_again(self) -> None:
        """What was refused for the sake of others that have left."""
        for name, refused in list(self._refused.items()):
            self._join(name, refused.client, refused.role)

    def _registered_row(self, member: Member) -> MemberRow:
        refused = self._refused.get(member.name)
        return MemberRow(name=member.name, role=member.role,
                         state=MemberState.REFUSED.value if refused else member.state.value,
                         reason=refused.reason if refused else member.reason, client=member.client,
                         address="" if member.record is None else member.record.rpc_address)

    def _static_row(self, one: StaticInstance) -> MemberRow:
        refused, state = self._refused.get(one.name), MemberState.ACTIVE
        if one.client is None:
            state = MemberState.SUSPECT
        elif refused:
            state = MemberState.REFUSED
        elif one.client.draining:
            state = MemberState.DRAINING
        role = "DEFAULT" if one.client is None else one.client.role
        return MemberRow(name=one.name, role=role, state=state.value, client=one.client, address=one.address,
                         reason=refused.reason if refused else one.reason or _remark(one.client))


def _difference(facts: EngineFacts, others: EngineFacts | None) -> str:
    """What keeps an instance from going on with what the others have begun; empty: nothing. Fingerprints, where they
    are known, tell of it before."""
    for what, mine, theirs in (("max_model_len", facts.max_model_len, others and others.max_model_len),
                               ("vocab_size", facts.vocab_size, others and others.vocab_size)):
        if mine != theirs:
            return f"its {what} is {mine}, and that of the other instances of this model {theirs}"
    return ""


def _remark(client: MemberClient | None) -> str:
    is_unchecked = client is not None and client.model is not None and client.model.fingerprint == UNCHECKED
    return "its model is known by name, its fingerprint is not checked" if is_unchecked else ""
