"""`ServerConfig`: the settings of the HTTP server, beside the engine's own `xllm.config.EngineConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm.config import option
from xllm.errors import ConfigError

LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0: any free one")
    api_key: tuple[str, ...] = option((), "require one of these keys as bearer token; may be given several times")
    served_model_name: tuple[str, ...] = option((), "names that requests may use for the model; the first is shown",
                                                aliases=("model_id",))
    generation_config: str = option("auto", "where sampling defaults come from: auto (the model's "
                                    "generation_config.json), vllm (none), or a folder")
    drain_timeout: float = option(30.0, "seconds that open requests get to finish after SIGTERM")
    health_timeout: float = option(9.0, "seconds without progress after which /health reports failure")
    uvicorn_log_level: str = option("warning", "log level of the HTTP server; info: one line per request",
                                    choices=LOG_LEVELS)


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    max_body_bytes: int = option(8 * 2**20, "largest request body")
    max_json_depth: int = option(64, "deepest nesting in a request body")
    max_sequences_per_request: int = option(1024, "prompts times n, at most")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """All settings of one server. Raises ConfigError for values that cannot work."""

    http: HttpSettings = field(default_factory=HttpSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)

    def __post_init__(self) -> None:
        h, limits = self.http, self.limits
        if not 0 <= h.port <= 65535:
            raise ConfigError(f"port must be in 0 to 65535, got {h.port}")
        if any(not key.strip() for key in h.api_key):
            raise ConfigError("api_key must not be empty")
        if any(not name for name in h.served_model_name):
            raise ConfigError("served_model_name must not be empty")
        for name, value in (("drain_timeout", h.drain_timeout), ("health_timeout", h.health_timeout)):
            if not 0 <= value < 1e6:
                raise ConfigError(f"{name} must be a number of seconds, got {value}")
        for name, number in (("max_body_bytes", limits.max_body_bytes), ("max_json_depth", limits.max_json_depth),
                             ("max_sequences_per_request", limits.max_sequences_per_request)):
            if number < 1:
                raise ConfigError(f"{name} must be at least 1, got {number}")
