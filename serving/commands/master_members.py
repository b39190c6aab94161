"""`MasterMembers`: tells a master's cluster clients which instances they may use, wherever these are known from."""

from __future__ import annotations

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
from xllm.client.remote import RemoteClient
from xllm.stats import EngineStats

logger = logging.getLogger("xllm.master")


@dataclass(frozen=True, slots=True)
class _Refused:
    client: RemoteClient
    role: str
    reason: str


class MasterMembers:
    """An instance is used for the model that it serves (`MasterModels`), or refused by name.

    on_names(model, is_new): called when an instance has joined, with its model, whose names may be more now, and
    whether it is the first of it.
    """

    def __init__(self, models: MasterModels, keys: ClusterKeys, on_names: Callable[[MasterModel, bool], None]):
        self._models, self._keys, self._on_names = models, keys, on_names
        self._registry: Registry | None = None
        self._static: StaticInstances | None = None
        self._refused: dict[str, _Refused] = {}  # by name, those that are connected and not used
        self._roles: dict[str, str] = {}  # by name, of those that are used

    async def follow_store(self, store: KeyValueStore) -> Callable[[], Mapping[str, EngineStats]]:
        """Use what registers there; returns what gives the loads of the instances. Raises as `Registry.start` does."""
        self._registry = registry = Registry(store, LinkSettings(self._keys), on_join=self._join_registered,
                                             on_leave=self._leave)
        await registry.start()
        return registry.loads

    def follow_addresses(self, addresses: Sequence[str]) -> None:
        """Use what listens there."""
        self._static = StaticInstances(addresses, self._keys, on_join=self._join, on_leave=self._leave)
        self._static.start()

    async def close(self) -> None:
        """Leave them all."""
        if self._registry is not None:
            await self._registry.close()
        if self._static is not None:
            await self._static.close()

    def rows(self) -> list[MemberRow]:
        """All that are known, as they are now."""
        if self._registry is not None:
            return [self._registered_row(member) for member in self._registry.members()]
        return [self._static_row(one) for one in (() if self._static is None else self._static.all)]

    # ---

    def _join_registered(self, name: str, client: RemoteClient, record: InstanceRecord) -> None:
        self._join(name, client, "DEFAULT" if record.role == "MIX" else record.role)  # both do all of a request

    def _join(self, name: str, client: RemoteClient, role: str = "DEFAULT") -> None:
        assert client.model is not None
        try:
            model = self._models.find(client.model)
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
        refused, state = self._refused.get(one.address), MemberState.ACTIVE
        if one.client is None:
            state = MemberState.SUSPECT
        elif refused:
            state = MemberState.REFUSED
        elif one.client.draining:
            state = MemberState.DRAINING
        return MemberRow(name=one.address, role="DEFAULT", state=state.value, client=one.client, address=one.address,
                         reason=refused.reason if refused else one.reason)
