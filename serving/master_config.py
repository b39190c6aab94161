"""`MasterConfig`: the settings of `xllm master`: those of an HTTP server, and of the cluster behind it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from serving.cluster.openai_places import read_places
from serving.cluster_access import ClusterAccess
from serving.config import (
    ChatSettings,
    ConnectionSettings,
    HttpSettings,
    LogSettings,
    ResilienceSettings,
    ServerConfig,
)
from serving.limits import LimitSettings
from xllm.client.server_place import ServerPlace
from xllm.errors import ConfigError
from xllm.host_port import host_and_port
from xllm.option import option

# `--load_balance_policy`, as upstream has it (LOAD and RANDOM are ours), and the modules of `xllm/routing/policies/`.
POLICY_OF = {"RR": "round_robin", "CAR": "cache_aware", "LOAD": "load_aware", "SLO_AWARE": "slo_aware",
             "RANDOM": "random"}
# Of `ServerConfig`, what is an engine's: a master has none of its own.
NOT_OF_A_MASTER = ("engine_restarts", "engine_restart_window", "step_timeout")


@dataclass(frozen=True, kw_only=True)
class MasterHttpSettings(HttpSettings):
    """As of `xllm serve`, on another port."""

    port: int = option(8888, "port to listen on; 0: any free one", aliases=("http_server_port",))
    served_model_name: tuple[str, ...] = option((), "names that requests may use for the model; the first is shown; "
                                                "none: those of the instances", aliases=("model_id",))


@dataclass(frozen=True, kw_only=True)
class MasterSettings(ClusterAccess):
    """Which cluster a master is for, and how it uses its instances. See docs/cluster.md."""

    instances: str | None = option(None, "instead of etcd: HOST:PORT of each instance's --cluster-listen, with commas "
                                   "between")
    openai_server: tuple[str, ...] = option((), "NAME=URL of a server of OpenAI's API with vLLM's fields, such as vllm "
                                            "serve, to be used beside or instead of instances; behind it, parted by "
                                            "commas: events=ENDPOINT and replay=ENDPOINT of its KV events, "
                                            "tokenizer=PATH as tokenizer_path, api-key-file=FILE (none: what "
                                            "XLLM_OPENAI_API_KEY says); may be given several times")
    rpc_server_port: int = option(8889, "part of this master's name in etcd, HOST:PORT; nothing listens there, as a "
                                  "master connects to its instances")
    tokenizer_path: str | None = option(None, "folder or Hub id of the model, or of its tokenizer's files and "
                                        "config.json; none: the folder that the instances have it in, if it is here")
    load_balance_policy: str = option("CAR", "which instance a request goes to: RR: in turn; CAR: by what is cached "
                                      "there and by load; LOAD: by load alone; SLO_AWARE: by target_ttft and "
                                      "target_tpot; RANDOM: any", choices=tuple(POLICY_OF))
    target_ttft: float = option(1000.0, "time to the first token that SLO_AWARE and dynamic_roles keep where they can, "
                                "in milliseconds")
    target_tpot: float = option(50.0, "time from token to token that SLO_AWARE and dynamic_roles keep where they can, "
                                "in milliseconds")
    dynamic_roles: bool = option(False, "turn prefill instances to decode and back as the load changes, by target_ttft "
                                 "and target_tpot; one prefill and two decode instances stay")


@dataclass(frozen=True, kw_only=True)
class MasterConfig:
    """All settings of one master. Raises ConfigError for values that cannot work."""

    http: MasterHttpSettings = field(default_factory=MasterHttpSettings)
    log: LogSettings = field(default_factory=LogSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    chat: ChatSettings = field(default_factory=ChatSettings)
    resilience: ResilienceSettings = field(default_factory=ResilienceSettings)
    connections: ConnectionSettings = field(default_factory=ConnectionSettings)
    master: MasterSettings = field(default_factory=MasterSettings)

    def __post_init__(self) -> None:
        m = self.master
        self._check_place()
        if not 0 <= m.rpc_server_port <= 65535:
            raise ConfigError(f"rpc_server_port must be in 0 to 65535, got {m.rpc_server_port}")
        for address in self.addresses:
            if not host_and_port(address)[1]:
                raise ConfigError(f"instances: {address!r} has no port")
        if len(set(self.addresses)) < len(self.addresses):
            raise ConfigError("instances: an address is given twice")
        if taken := {place.name for place in self.openai_places}.intersection(self.addresses):
            raise ConfigError(f"openai_server: {min(taken)} is the address of an instance")
        for name, value in (("target_ttft", m.target_ttft), ("target_tpot", m.target_tpot)):
            if not 0 < value < 1e9:
                raise ConfigError(f"{name} must be a positive number of milliseconds, got {value}")
        assert self.server is not None  # which checks the rest, as this does
        m.check_etcd()

    def _check_place(self) -> None:
        m = self.master
        if m.etcd_addr is not None and m.instances is not None:
            raise ConfigError("etcd_addr, where instances register, and instances: a master takes one of the two")
        if m.etcd_addr is None and m.instances is None and not m.openai_server:
            raise ConfigError("a master needs etcd_addr, where its instances register, or instances, or openai_server")

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the instances, without a store."""
        return _split(self.master.instances)

    @functools.cached_property
    def openai_places(self) -> list[ServerPlace]:
        """The OpenAI servers."""
        return read_places(self.master.openai_server, self.master.tokenizer_path)

    @property
    def server(self) -> ServerConfig:
        """Of the HTTP server."""
        return ServerConfig(http=self.http, log=self.log, limits=self.limits, chat=self.chat,
                            resilience=self.resilience, connections=self.connections)


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
