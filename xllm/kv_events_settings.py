"""`KVEvents`: whether, where and how changes of the KV cache are published: the JSON object that is vLLM's
`kv_events_config`, with its keys."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm.errors import ConfigError
from xllm.json_setting import parse_object
from xllm.private_files import read_secret
from xllm.suggestion import nearest

NAME = "kv_events_config"
MIN_KEY_BYTES, MAX_KEY_BYTES = 32, 4096  # of the key file. Chosen: 256 bits at least; more than any key has
_PORTS = range(1, 2**16)
ENCODINGS = ("array", "map")  # of an event: as vLLM wrote it for long, and as its version 0.33 does


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEvents:
    """endpoint: of the PUB socket. An address of this machine's loopback, a wildcard or an ipc path is bound, another
    one is connected to (vLLM connects to a loopback address, too). replay_endpoint: where a ROUTER is bound that sends
    batches again. buffer_steps: batches that are kept for it. hwm: messages that wait for one subscriber before it
    loses some. max_queue_size: batches that wait to be published before a step waits for it. data_parallel_rank: what
    batches say. event_encoding: whether events are arrays or maps (`kv/event_wire.py`)."""

    enable_kv_cache_events: bool = False
    publisher: str = "zmq"
    endpoint: str = "tcp://127.0.0.1:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
    data_parallel_rank: int = 0
    event_encoding: str = "array"

    @property
    def endpoints(self) -> tuple[str, ...]:
        return (self.endpoint,) if self.replay_endpoint is None else (self.endpoint, self.replay_endpoint)


def parse_kv_events(text: str | None) -> KVEvents | None:
    """What the setting says; None: nothing is published. Raises ConfigError."""
    given = parse_object(NAME, text)
    if given is None:
        return None
    fields = {field.name: field for field in dataclasses.fields(KVEvents)}
    for key, value in given.items():
        if key not in fields:
            raise ConfigError(f"{NAME}: unknown key {key!r}{nearest(key, list(fields))}")
        _check_type(key, value, type(fields[key].default))
    events = KVEvents(**{key: value for key, value in given.items() if value is not None})
    if events.publisher not in ("zmq", "null"):
        raise ConfigError(f"{NAME}: publisher must be zmq or null, got {events.publisher!r}")
    if events.event_encoding not in ENCODINGS:
        raise ConfigError(f"{NAME}: event_encoding must be array or map, got {events.event_encoding!r}")
    for name in ("buffer_steps", "hwm", "max_queue_size"):
        if getattr(events, name) < 1:
            raise ConfigError(f"{NAME}: {name} must be at least 1, got {getattr(events, name)}")
    if events.data_parallel_rank < 0:
        raise ConfigError(f"{NAME}: data_parallel_rank must not be negative, got {events.data_parallel_rank}")
    for endpoint in events.endpoints:
        _host_of(endpoint)
    return events if events.enable_kv_cache_events and events.publisher == "zmq" else None


def _check_type(key: str, value: Any, wanted: type) -> None:
    if value is None and key in ("publisher", "replay_endpoint"):
        return  # what vLLM has for "not given"
    wanted = str if wanted is type(None) else wanted
    if type(value) is not wanted:
        raise ConfigError(f"{NAME}: {key} must be of type {wanted.__name__}, got {json.dumps(value)[:80]}")


def check_kv_events(text: str | None, *, has_token_ids: bool, key_file: str | None, has_prefix_cache: bool) -> None:
    """Raise ConfigError if the settings do not go together, or anybody on the network could read or ask."""
    events = parse_kv_events(text)
    if events is None:
        for name, is_given in (("kv_events_token_ids", has_token_ids), ("kv_events_key_file", key_file is not None)):
            if is_given:
                raise ConfigError(f"{name} needs {NAME} with enable_kv_cache_events: nothing is published")
        return
    if not has_prefix_cache:
        raise ConfigError(f"{NAME} needs enable_prefix_caching: without it no block can be found again")
    for endpoint in events.endpoints if key_file is None else ():
        if not is_local(endpoint):
            raise ConfigError(f"{NAME}: {endpoint} reaches other machines and needs kv_events_key_file; "
                              "tcp://127.0.0.1:PORT and ipc://PATH are for this machine alone")


def read_key(key_file: str) -> bytes:
    """The secret that publisher and subscribers share. Raises ConfigError."""
    key = read_secret("kv_events_key_file", Path(key_file), MAX_KEY_BYTES)
    if len(key) < MIN_KEY_BYTES:
        raise ConfigError(f"kv_events_key_file {key_file} has {len(key)} bytes: at least {MIN_KEY_BYTES} are needed")
    return key


def is_local(endpoint: str) -> bool:
    """Whether only this machine can be at the other end."""
    host = _host_of(endpoint)
    return host is None or host == "localhost" or _is_loopback(host)


def is_bound(endpoint: str) -> bool:
    """Whether a publisher binds it; else it connects."""
    host = _host_of(endpoint)
    return host is None or host in ("*", "::", "0.0.0.0") or _is_loopback(host)


def of_rank(text: str | None, rank: int) -> str | None:
    """The setting for the engine of this number among several: its TCP ports are higher by that, as vLLM has it."""
    if rank == 0 or (events := parse_kv_events(text)) is None:
        return text
    moved = {name: None if endpoint is None else _moved(endpoint, rank)
             for name, endpoint in (("endpoint", events.endpoint), ("replay_endpoint", events.replay_endpoint))}
    return json.dumps({**dataclasses.asdict(events), **moved, "data_parallel_rank": events.data_parallel_rank + rank})


def _moved(endpoint: str, rank: int) -> str:
    if endpoint.startswith("ipc://"):
        return f"{endpoint}_dp{rank}"
    head, _, port = endpoint.rpartition(":")
    if int(port) + rank not in _PORTS:
        raise ConfigError(f"{NAME}: {endpoint} leaves no port for engine {rank}")
    return f"{head}:{int(port) + rank}"


def _host_of(endpoint: str) -> str | None:
    """The host of a TCP endpoint, None for an ipc path. Raises ConfigError."""
    if endpoint.startswith("ipc://") and len(endpoint) > len("ipc://"):
        return None
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not host or not port.isdecimal() or int(port) not in _PORTS:
        raise ConfigError(f"{NAME}: an endpoint is tcp://HOST:PORT or ipc://PATH, got {endpoint[:80]!r}")
    return host.removeprefix("[").removesuffix("]")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
