"""`ClusterInstance`: the part of an `xllm serve` process that makes it an instance of a cluster."""

from __future__ import annotations

import logging
from pathlib import Path

from serving.cluster.engine_gate import EngineGate
from serving.cluster.etcd_link import open_etcd
from serving.cluster.instance_record import ROLES, InstanceRecord
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.registration import Registration, start_store
from serving.cluster.served_link import ServedLink
from serving.commands.cluster_plan import ClusterPlan, advertised_host, store_target
from serving.commands.gated_calls import GatedCalls
from xllm.client.gate_wire import PROTOCOL, ServedModel
from xllm.client.process import ProcessClient
from xllm.client.replicas import Replicas
from xllm.host_port import host_and_port, is_loopback
from xllm.version import __version__

logger = logging.getLogger("xllm.cluster")


class ClusterInstance:
    """In the order of its life: `listen`, `find_store` beside the engine's start, `join`, `drain`, `leave`."""

    def __init__(self, plan: ClusterPlan, engine: ProcessClient | Replicas, http: tuple[str, int],
                 lora_folder: str | None, calls: GatedCalls):
        """http: address and port that HTTP listens at. calls: told of those that the cluster has had answered."""
        self._plan, self._engine, self._http = plan, engine, http
        self._gate = EngineGate(engine, engine.engines, plan.keys, Path(lora_folder) if lora_folder else None,
                                tells_cache=plan.tells_cache, role=ROLES[plan.role])
        self._gate.on_call_end = calls.note
        self._model: ServedModel | None = None
        self._store: KeyValueStore | None = None
        self._registration: Registration | None = None

    @property
    def num_open(self) -> int:
        """Requests of the cluster that have not ended."""
        return self._gate.num_open

    @property
    def announcement(self) -> str:
        """Where it is, once it has joined."""
        text = f"its engine answers the cluster at {self._gate.address}"
        if self._registration is None:
            return text
        assert self._store is not None
        return f"{text}, registered as {self._name} in {self._store.name}"

    def listen(self) -> None:
        """Take the gate's port. Raises ConfigError."""
        self._gate.listen(self._plan.listen)

    async def find_store(self) -> None:
        """Connect to the metadata store, if it is wanted; one that does not answer is waited for. Raises ConfigError,
        StoreError."""
        plan = self._plan
        if plan.store is not None:
            self._store = KeyValueStore(ServedLink(plan.store))
        elif plan.etcd is not None:
            if is_loopback(host_and_port(plan.listen)[0]) and not plan.etcd.is_local:
                logger.warning("cluster_listen %s: masters on other machines cannot reach it", plan.listen)
            self._store = open_etcd(plan.etcd, namespace=plan.namespace)
        else:
            return
        self._find_addresses(store_target(plan))
        await start_store(self._store)

    async def join(self, model: ServedModel) -> None:
        """Let masters in; the engine is loaded. Raises NameTakenError, StoreError."""
        self._model = model
        self._gate.open(model)
        if self._store is not None:
            self._registration = Registration(self._store, self._describe)
            await self._registration.start()

    def drain(self) -> None:
        """Take no more requests of the cluster."""
        self._gate.drain()
        if self._registration is not None:
            self._registration.drain()

    async def leave(self) -> None:
        """Be gone, from the store first."""
        if self._registration is not None:
            await self._registration.close()
        self._gate.close()
        if self._store is not None:
            await self._store.close()

    def _find_addresses(self, target: str) -> None:
        """Those that others are told. Raises ConfigError."""
        gate_host = advertised_host(host_and_port(self._plan.listen)[0], target)
        self._rpc_address = f"{gate_host}:{self._gate.port}"
        host, port = self._http
        http_host = advertised_host(host, target)
        self._http_address = f"{http_host}:{port}"
        # 127.0.0.1:8000 is a name on this machine only.
        is_own = is_loopback(host) and not is_loopback(gate_host.strip("[]"))
        self._name = self._plan.name or f"{gate_host if is_own else http_host}:{port}"

    def _describe(self) -> InstanceRecord | None:
        facts, model, incarnation = self._engine.facts, self._model, self._gate.incarnation
        if facts is None or model is None or not incarnation:
            return None
        device, block_size = facts.config.device, facts.config.cache.block_size
        assert block_size is not None, "a resolved config says it"
        return InstanceRecord(
            name=self._name, rpc_address=self._rpc_address, incarnation_id=incarnation, register_ts_ms=0,
            type=self._plan.role, http_address=self._http_address, model_names=model.names,
            fingerprint=model.fingerprint, protocol=PROTOCOL, version=__version__, max_model_len=facts.max_model_len,
            block_size=block_size, dp_size=device.data_parallel_size, tp_size=device.tensor_parallel_size)
