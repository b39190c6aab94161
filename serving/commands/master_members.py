"""`MasterMembers`: tells a master's `ClusterClient` which instances it may use, wherever they are known from."""

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
from xllm.client.cluster import ClusterClient
from xllm.client.cluster_keys import ClusterKeys
from xllm.client.gate_wire import ServedModel
from xllm.client.remote import RemoteClient
from xllm.stats import EngineStats

logger = logging.getLogger("xllm.master")


@dataclass(frozen=True, slots=True)
class _Refused:
    client: RemoteClient
    role: str
    reason: str


class MasterMembers:
    """One model is served, that of the first instance that joins; those of another one are not used. Once nobody
    serves it any more, another one with a name of it takes its place: it was upgraded.

    on_names(names, is_new): called when an instance has joined, with the names under which the model is served by any
    of them, and whether it is the first of its model.
    """

    def __init__(self, cluster: ClusterClient, keys: ClusterKeys, on_names: Callable[[tuple[str, ...], bool], None]):
        self._cluster, self._keys, self._on_names = cluster, keys, on_names
        self._registry: Registry | None = None
        self._static: StaticInstances | None = None
        self._refused: dict[str, _Refused] = {}  # by name, those that are connected and not used
        self._fingerprint: str | None = None
        self._names: dict[str, None] = {}

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
        model, refusal = client.model, self._refusal(client.model)
        if refusal is None:
            try:
                self._cluster.join(name, client, role=role)
            except ValueError as error:
                refusal = str(error)
        if refusal is not None:
            self._refused[name] = _Refused(client, role, refusal)
            logger.error("instance %s is not used: %s", name, refusal)
            return
        self._refused.pop(name, None)
        is_new = model.fingerprint != self._fingerprint
        self._names = dict.fromkeys((*(() if is_new else self._names), *model.names))
        self._fingerprint = model.fingerprint
        self._on_names(tuple(self._names), is_new)

    def _refusal(self, model: ServedModel) -> str | None:
        """Why what serves this model is not used now."""
        is_same = self._fingerprint in (None, model.fingerprint)
        if is_same or (not self._cluster.members.all and not self._names.keys().isdisjoint(model.names)):
            return None
        return (f"it serves {', '.join(model.names)} (fingerprint {model.fingerprint}), and this master "
                f"{', '.join(self._names)} ({self._fingerprint}): one model a master")

    def _leave(self, name: str, reason: str) -> None:
        self._refused.pop(name, None)
        self._cluster.leave(name, reason)
        if not self._cluster.members.all:
            for other, refused in list(self._refused.items()):
                self._join(other, refused.client, refused.role)

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
