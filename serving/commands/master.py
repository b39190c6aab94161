"""`xllm master`: the HTTP API of a cluster, over the instances that register in its metadata store or are named."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from pathlib import Path

from serving.api.cluster_view import ClusterView
from serving.api.state import ServerState
from serving.cluster.etcd_link import open_etcd
from serving.cluster.etcd_settings import EtcdSettings
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.master_seat import MasterSeat
from serving.cluster.openai_places import is_clear
from serving.cluster.registration import start_store
from serving.commands.cluster_plan import advertised_host, etcd_settings, namespace_of
from serving.commands.master_members import MasterMembers
from serving.commands.master_models import MasterModel, MasterModels
from serving.commands.serve import load_front
from serving.commands.server_life import FrontDoor, ServerLife, front_door
from serving.master_config import POLICY_OF, MasterConfig
from serving.observe.instance_spans import InstanceSpans
from serving.observe.throughput_log import ThroughputLog
from serving.security.cluster_secret import read_cluster_keys
from xllm import logs
from xllm.client.cluster import ClusterClient
from xllm.client.cluster_keys import ClusterKeys
from xllm.errors import ConfigError, XllmError
from xllm.host_port import host_and_port, is_loopback
from xllm.routing.fleet import Fleet
from xllm.routing.role_snapshot import RoleRules

logger = logging.getLogger("xllm.master")


def run(config: MasterConfig) -> int:
    """Serve until a signal comes. Returns the exit code. Raises ConfigError before anything has started."""
    logs.take_over()
    etcd = None if config.master.etcd_addr is None else etcd_settings(config.master)
    is_local = etcd.is_local if etcd is not None else all(
        is_loopback(host_and_port(address)[0]) for address in config.addresses)
    keys = None
    if etcd is not None or config.addresses:
        keys = read_cluster_keys(config.master.cluster_secret_file, is_local=is_local,
                                 whose="a master of instances that are not all on this machine")
    for place in config.openai_places:
        if is_clear(place):
            logger.warning("%s: prompts and answers%s cross the network to %s unencrypted; https:// is encrypted",
                           place.name, " and the API key" if place.api_key else "", place.url)
    with front_door(config.http) as door:
        return asyncio.run(Master(config, door, keys, etcd).run())


class Master(ServerLife):
    """A server whose engines are clusters, one a model: it follows who is there, and serves as long as somebody is."""

    def __init__(self, config: MasterConfig, door: FrontDoor, keys: ClusterKeys | None, etcd: EtcdSettings | None):
        super().__init__(config.server, door)
        self._etcd = etcd
        self._settings, self._keys, self._master_config = config.master, keys, config
        self._store: KeyValueStore | None = None
        self._seat: MasterSeat | None = None
        self._joined = asyncio.Event()  # an instance has

    def _make_state(self) -> ServerState:
        s = self._settings
        only_by = "served_model_name" if self._config.http.served_model_name else \
            "tokenizer_path" if s.tokenizer_path else None
        self._models = MasterModels(self._make_cluster, only_by=only_by)
        first = self._models.all[0]
        self._cluster = first.cluster
        self._members = MasterMembers(self._models, self._keys, self._note_names)
        self._store = self._open_store()
        state = ServerState(self._cluster, self._config, keys=self._door.keys, tracer=self._door.tracer)
        state.cluster = ClusterView(
            engine=self._cluster, engines=lambda: [model.cluster for model in self._models.all],
            policy=s.load_balance_policy, members=self._members.rows, address=self._address,
            store=self._store_text, leader=self._leader)
        self._states: dict[MasterModel, ServerState] = {first: state}
        self._watching: list[asyncio.Task[None]] = []  # of models behind the first, what they do
        return state

    def _make_cluster(self) -> ClusterClient:
        s = self._settings
        tracer = self._door.tracer
        return ClusterClient(Fleet(POLICY_OF[s.load_balance_policy], target_ttft_s=s.target_ttft / 1000,
                                   target_tpot_s=s.target_tpot / 1000),
                             None if tracer is None else InstanceSpans(tracer),
                             rules=RoleRules() if s.dynamic_roles else None)

    def _open_store(self) -> KeyValueStore | None:
        """Where instances register, within the event loop; None: they were named."""
        if self._etcd is None:
            return None
        return open_etcd(self._etcd, namespace=namespace_of(self._settings.etcd_namespace))

    @property
    def _address(self) -> str:
        """What it is called in the store."""
        host = self._config.http.host
        if self._etcd is not None:
            host = advertised_host(host, self._etcd.targets[0])
        return f"{host}:{self._settings.rpc_server_port}"

    def _store_text(self) -> str | None:
        return None if self._store is None else f"{self._store.name}: {self._store.state}"

    async def _leader(self) -> str | None:
        try:
            return None if self._seat is None else await self._seat.leader()
        except XllmError:
            return None  # the store does not answer, which its state says

    # --- its life

    async def _look_after(self) -> None:
        try:
            self._members.follow_servers(self._master_config.openai_places)
            if self._store is None:
                self._members.follow_addresses(self._master_config.addresses)
                places = [place.url for place in self._master_config.openai_places]
                logger.info("waiting for instances at %s", ", ".join((*self._master_config.addresses, *places)))
            else:
                await start_store(self._store)
                self._seat = MasterSeat(self._store, self._address, await self._members.follow_store(self._store))
                self._seat.start()
                logger.info("waiting for instances in %s; this master is called %s there, where nothing listens",
                            self._store.name, self._address)
            while True:
                await self._joined.wait()
                self._joined.clear()
                for model in self._models.all:
                    await self._bring_up(model)
        except XllmError as error:
            logger.error("the master does not start: %s", error)
            self._fail()
        except Exception:  # whatever it was: a server that waits for ever would be worse
            logger.exception("the master does not start")
            self._fail()

    async def _bring_up(self, model: MasterModel) -> None:
        """Serve a model if instances do. Raises XllmError if that cannot be and it is the first one."""
        state = self._states[model]
        if state.loaded or not model.is_served:
            return
        try:
            is_done = await self._load(model, state)
        except XllmError as error:
            if state is self._state:
                raise
            self._members.give_up(model, f"{model} is not served: {error}")
            return
        if not is_done:  # others are there now, perhaps of another model
            self._joined.set()
        elif state is self._state:
            self._note_loaded()
            self._say(f"xLLM's master serves {state.served_names[0]} on {self._door.url} (longest sequence "
                      f"{state.facts.max_model_len} tokens, policy {self._settings.load_balance_policy})")
            self._say_how_to_call()
        else:
            state.loaded = True
            self._say(f"xLLM's master serves {state.served_names[0]}, too (longest sequence "
                      f"{state.facts.max_model_len} tokens)")
            if state not in state.states:
                self._show(state)

    def _show(self, state: ServerState) -> None:
        """Have a further model in the API and in what is observed."""
        state.states.append(state)
        self._watching.append(asyncio.create_task(state.history.run(state.engine, lambda: None)))
        if not self._config.log.disable_log_stats:
            log = ThroughputLog(state.engine, model=state.served_names[0])
            self._watching.append(asyncio.create_task(log.run()))

    async def _load(self, served: MasterModel, state: ServerState) -> bool:
        """Read the tokenizer; False: it may be another model's by now. Raises ConfigError if the model's folder is not
        here, ModelError."""
        facts, fingerprint = state.facts, served.fingerprint
        model, path = facts.config.model, self._settings.tokenizer_path
        folder = path or facts.model_path
        if path is None and not Path(folder).is_dir():
            raise ConfigError(f"the model's folder, {folder}, is not on this machine: --tokenizer-path says where its "
                              "tokenizer is")
        model = dataclasses.replace(model, model=folder, revision=None,
                                    tokenizer=model.tokenizer if path is None else None)
        tokenizer, defaults = await asyncio.to_thread(load_front, model)
        if served.cluster.facts is not facts or served.fingerprint != fingerprint:
            return False
        state.tokenizer, state.sampling_defaults = tokenizer, defaults
        return True

    def _note_names(self, model: MasterModel, is_new: bool) -> None:
        """An instance of a model has joined. is_new: it is another model than before."""
        state = self._states.get(model)
        if state is None:
            state = self._states[model] = self._state.beside(model.cluster)
            assert self._state.cluster is not None
            state.cluster = dataclasses.replace(self._state.cluster, engine=model.cluster)
        elif is_new:
            state.forget_model()
        state.serve_names(tuple(model.names))
        self._joined.set()

    async def _shut_down(self) -> None:
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        for model in self._models.all:
            await model.cluster.close()
        if self._seat is not None:
            await self._seat.close()
        await self._members.close()
        if self._store is not None:
            await self._store.close()

    def _kill(self) -> None:
        return  # nothing outlives this process: instances notice that it is gone
