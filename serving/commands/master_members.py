"""`MasterMembers`: tells a master's `ClusterClient` which instances it may use, wherever they are known from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from serving.api.cluster_view import MemberRow
from serving.cluster.instance_link import LinkSettings, MemberState
from serving.cluster.instance_record import InstanceRecord
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.registry import Member, Registry
from serving.cluster.static_instances import StaticInstance, StaticInstances
from xllm.client.cluster import ClusterClient
from xllm.client.cluster_keys import ClusterKeys
from xllm.client.remote import RemoteClient
from xllm.stats import EngineStats

logger = logging.getLogger("xllm.master")


class MasterMembers:
    """One model is served, that of the first instance that joins; those of another one are refused by name.

    on_names(names): called when an instance has joined, with the names under which the model is served by any of them.
    """

    def __init__(self, cluster: ClusterClient, keys: ClusterKeys, on_names: Callable[[tuple[str, ...]], None]):
        self._cluster, self._keys, self._on_names = cluster, keys, on_names
        self._registry: Registry | None = None
        self._static: StaticInstances | None = None
        self._refused: dict[str, str] = {}  # names of instances that are connected and not used, and why
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
        self._refused.pop(name, None)
        model = client.model
        if self._fingerprint is not None and model.fingerprint != self._fingerprint:
            self._refuse(name, f"it serves another model, {model.names[0]} (fingerprint {model.fingerprint}), and this "
                               f"master serves {next(iter(self._names))} ({self._fingerprint})")
            return
        try:
            self._cluster.join(name, client, role=role)
        except ValueError as error:
            self._refuse(name, str(error))
            return
        self._fingerprint = model.fingerprint
        self._names.update(dict.fromkeys(model.names))
        self._on_names(tuple(self._names))

    def _refuse(self, name: str, reason: str) -> None:
        self._refused[name] = reason
        logger.error("instance %s is not used: %s", name, reason)

    def _leave(self, name: str, reason: str) -> None:
        self._refused.pop(name, None)
        self._cluster.leave(name, reason)

    def _registered_row(self, member: Member) -> MemberRow:
        refused = self._refused.get(member.name)
        return MemberRow(name=member.name, role=member.role,
                         state=MemberState.REFUSED.value if refused else member.state.value,
                         reason=refused or member.reason, client=member.client,
                         address="" if member.record is None else member.record.rpc_address)

    def _static_row(self, one: StaticInstance) -> MemberRow:
        refused, state = self._refused.get(one.address), MemberState.ACTIVE
        if one.client is None:
            state = MemberState.SUSPECT
        elif refused:
            state = MemberState.REFUSED
        elif one.client.draining:
            state = MemberState.DRAINING
        return MemberRow(name=one.address, role="DEFAULT", state=state.value, reason=refused or one.reason,
                         client=one.client, address=one.address)
