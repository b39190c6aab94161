"""`ServerConfig`: the settings of the HTTP server, beside the engine's own `xllm.config.EngineConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.cluster_access import ClusterAccess
from serving.limits import LimitSettings
from serving.parsers.parser_registry import check_names
from xllm import env
from xllm.errors import ConfigError
from xllm.host_port import host_and_port
from xllm.logs import FORMATS, LEVELS
from xllm.option import option
from xllm.routing.roles import ROLES


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """Where the server listens, who may call it, and under which names it serves the model."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0: any free one")
    api_key: tuple[str, ...] = option((), "require one of these keys as bearer token; may be given several times",
                                      is_guard=True)
    admin_api_key: tuple[str, ...] = option((), "keys for the routes that change the server, which are closed without; "
                                            "may be given several times", is_guard=True)
    api_key_file: str | None = option(None, "file of keys with names, weights and quotas, one a line; see "
                                      "docs/security.md", is_guard=True)
    insecure: bool = option(False, "serve other machines without a key", is_guard=True)
    allowed_host: tuple[str, ...] = option((), "without keys: Host names to answer to, beside localhost and addresses; "
                                           "may be given several times", is_guard=True)
    cors_origin: tuple[str, ...] = option((), "web sites whose pages may call this server (CORS); may be given several "
                                          "times; none: no page may", is_guard=True)
    ssl_certfile: str | None = option(None, "serve HTTPS with this certificate chain (PEM)", is_guard=True)
    ssl_keyfile: str | None = option(None, "the certificate's private key (PEM), if it is not in ssl_certfile",
                                     is_guard=True)
    ssl_ca_certs: str | None = option(None, "let in only clients with a certificate of these authorities (PEM)",
                                      is_guard=True)
    served_model_name: tuple[str, ...] = option((), "names that requests may use for the model; the first is shown",
                                                aliases=("model_id",))
    lora_folder: str | None = option(None, "folder below which /v1/load_lora_adapter finds adapters; none: the route "
                                     "is closed", is_guard=True)
    otlp_traces_endpoint: str | None = option(None, "send traces of requests there over OTLP/HTTP, such as "
                                              "http://127.0.0.1:4318/v1/traces; needs the extra 'otel'")
    drain_timeout: float = option(30.0, "seconds that open requests get to finish after SIGTERM")
    health_timeout: float = option(9.0, "seconds without progress after which /health reports failure")
    uvicorn_log_level: str = option("warning", "log level of the HTTP server's own messages, none of which is about "
                                    "a request that went well", choices=LEVELS)


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """Of all processes of a server. See docs/observability.md."""

    log_level: str | None = option(None, "log lines of this level and above; none: what XLLM_LOG says, or info",
                                   choices=LEVELS)
    log_format: str | None = option(None, "one line of text, or one JSON object, for each log record; none: what "
                                    "XLLM_LOG_FORMAT says, or text", choices=FORMATS)
    enable_log_requests: bool = option(True, "a log line for each request when it has ended: id, key's name, route, "
                                       "status, tokens and times, no texts; vLLM's --disable-log-requests works too")
    disable_log_stats: bool = option(False, "no log line every 10 s about throughput while there is traffic")


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """Chat templates, tools and reasoning."""

    tool_call_parser: str = option("auto", "format of the model's tool calls, see docs/tools.md; auto: from its chat "
                                   "template; none: tools are refused")
    reasoning_parser: str = option("auto", "format of the model's reasoning, see docs/tools.md; auto: from its chat "
                                   "template; none: reasoning stays in the content")
    chat_template_timeout: float = option(10.0, "seconds that rendering a chat template may take")
    trust_request_chat_template: bool = option(False, "let requests bring their own chat_template", is_guard=True)


END_REASONS = ("head_timeout", "body_timeout", "write_timeout", "max_connections")  # of connections, by the server


@dataclass(frozen=True, kw_only=True)
class ConnectionSettings:
    """Bounds on connections: how many, and how long a peer may take."""

    head_timeout: float = option(20.0, "seconds in which a request's head must arrive, fewer when more than half of "
                                 "max_connections are in use; 0: any")
    body_timeout: float = option(120.0, "seconds in which its body must follow; 0: any")
    write_timeout: float = option(30.0, "seconds in which a reader must take some of its answer, 1 KiB for each of "
                                  "them at least; 0: any")
    max_connections: int = option(4096, "connections at a time; then the one that has waited longest for a "
                                  "request's head is ended")


@dataclass(frozen=True, kw_only=True)
class ResilienceSettings:
    """What is refused first under load, time limits, and restarts of the engine."""

    engine_restarts: int = option(5, "times that an engine that died is started again within engine_restart_window; 0: "
                                  "never")
    engine_restart_window: float = option(600.0, "seconds")
    request_timeout: float = option(0.0, "seconds after which a request that is not done fails; requests may ask for "
                                    "less (timeout_s); 0: any")
    low_priority_watermark: float = option(0.8, "share of max_queue_tokens from which requests of low priority (above "
                                           "0) are refused")
    offline_watermark: float = option(0.5, "share of max_queue_tokens from which offline requests are refused")
    step_timeout: float = option(300.0, "seconds without progress after which the engine is taken for stuck and ended; "
                                 "0: never")


@dataclass(frozen=True, kw_only=True)
class ClusterSettings(ClusterAccess):
    """How this process is an instance of a cluster. See docs/cluster.md and docs/cluster-instances.md."""

    cluster_listen: str | None = option(None, "HOST:PORT at which a cluster's master reaches the engine, port 0: any "
                                        "free one; none: any of 127.0.0.1 if etcd_addr is this machine, else there is "
                                        "no such port", is_guard=True)
    etcd_addr: str | None = option(None, "etcd, in which this instance registers for a cluster's masters: host:port, "
                                   "http:// or https://, several members parted by commas", is_guard=True)
    enable_service_routing: bool | None = option(None, "register in etcd_addr; none: if that is given")
    enable_cache_upload: bool = option(True, "tell masters which KV blocks are cached, so that they can send requests "
                                       "where their prompts are")
    instance_role: str = option("DEFAULT", "DEFAULT or MIX: prefill and decode; PREFILL: computes prompts, whose KV "
                                "goes to instances that decode; DECODE: goes on with them; these two need "
                                "enable_disagg_pd")
    instance_name: str | None = option(None, "name of this instance in the cluster; none: host:port of its HTTP API")

    def __post_init__(self) -> None:
        if self.cluster_listen is not None:
            host_and_port(self.cluster_listen)
        elif self.cluster_secret_file is not None and not self.has_store:
            raise ConfigError("cluster_secret_file needs cluster_listen or etcd_addr")
        if self.instance_role == "ENCODE":
            raise ConfigError("instance_role ENCODE: instances that only encode media are not built yet")
        if self.instance_role not in ROLES:
            raise ConfigError(f"instance_role must be one of {', '.join(ROLES)}, got {self.instance_role!r}")
        if not self.has_store:
            for name in ("enable_service_routing", "instance_name"):
                if getattr(self, name):
                    raise ConfigError(f"{name} needs etcd_addr")
        self.check_etcd()
        if self.instance_role != "DEFAULT" and not self.registers:
            raise ConfigError(f"instance_role {self.instance_role} is for instances that register: it needs etcd_addr")

    @property
    def has_store(self) -> bool:
        """Whether a metadata store was named: etcd, or by the environment that of another process of this machine."""
        return self.etcd_addr is not None or env.cluster_store() is not None

    @property
    def registers(self) -> bool:
        """Whether this instance is in the metadata store."""
        return self.has_store and self.enable_service_routing is not False


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """All settings of one server. Raises ConfigError for values that cannot work."""

    http: HttpSettings = field(default_factory=HttpSettings)
    log: LogSettings = field(default_factory=LogSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    chat: ChatSettings = field(default_factory=ChatSettings)
    resilience: ResilienceSettings = field(default_factory=ResilienceSettings)
    connections: ConnectionSettings = field(default_factory=ConnectionSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)

    def __post_init__(self) -> None:
        h = self.http
        if not 0 <= h.port <= 65535:
            raise ConfigError(f"port must be in 0 to 65535, got {h.port}")
        for name, keys in (("api_key", h.api_key), ("admin_api_key", h.admin_api_key)):
            if any(not key.strip() for key in keys):
                raise ConfigError(f"{name} must not be empty")
        if "*" in h.cors_origin:
            raise ConfigError("cors_origin must name web sites, such as https://example.com; '*' would be all of them")
        check_names(self.chat.tool_call_parser, self.chat.reasoning_parser)
        if any(not name for name in h.served_model_name):
            raise ConfigError("served_model_name must not be empty")
        if not 0 < self.chat.chat_template_timeout < 1e6:
            raise ConfigError(f"chat_template_timeout must be a positive number of seconds, got "
                              f"{self.chat.chat_template_timeout}")
        r = self.resilience
        if r.engine_restarts < 0:
            raise ConfigError(f"engine_restarts must be at least 0, got {r.engine_restarts}")
        for name, share in (("low_priority_watermark", r.low_priority_watermark),
                            ("offline_watermark", r.offline_watermark)):
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"{name} must be in [0, 1], got {share}")
        c = self.connections
        if c.max_connections < 1:
            raise ConfigError(f"max_connections must be at least 1, got {c.max_connections}")
        for name, value in (("drain_timeout", h.drain_timeout), ("health_timeout", h.health_timeout),
                            ("engine_restart_window", r.engine_restart_window), ("step_timeout", r.step_timeout),
                            ("request_timeout", r.request_timeout),
                            ("head_timeout", c.head_timeout), ("body_timeout", c.body_timeout),
                            ("write_timeout", c.write_timeout)):
            if not 0 <= value < 1e6:
                raise ConfigError(f"{name} must be a number of seconds, got {value}")
