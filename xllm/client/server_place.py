"""`ServerPlace`: where an OpenAI server is, as a setting says it. Light: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class KVEventsPlace:
    """Where an instance publishes its KV events, in vLLM's form: of its PUB socket, and of the ROUTER that sends
    batches again; None: there is none."""

    endpoint: str
    replay_endpoint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlace:
    """url: http or https, host and port. api_key: sent as a bearer token. events: where it publishes KV events.
    tokenizer_path: folder or Hub id of its model, or of the tokenizer's files and config.json; None: the folder that it
    names itself."""

    name: str
    url: str
    api_key: str | None = field(default=None, repr=False)
    events: KVEventsPlace | None = None
    tokenizer_path: str | None = None
