"""Reads `--openai-server`: which OpenAI servers a master uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from xllm import env
from xllm.client.server_place import KVEventsPlace, ServerPlace
from xllm.errors import ConfigError
from xllm.host_port import host_and_port, is_loopback
from xllm.private_files import read_secret

KEYS = ("events", "replay", "tokenizer", "api-key-file")
_FORM = "NAME=URL[,events=ENDPOINT][,replay=ENDPOINT][,tokenizer=PATH][,api-key-file=FILE]"
_MAX_KEY_BYTES = 4096  # of an API key and a line's end. Chosen: far more than a key has


def read_places(texts: Sequence[str], tokenizer_path: str | None) -> list[ServerPlace]:
    """One for each value of the flag. tokenizer_path: for those that name none. Raises ConfigError, which shows no
    key."""
    places = [_read(text, tokenizer_path) for text in texts]
    for what, found in (("name", [place.name for place in places]), ("URL", [place.url for place in places])):
        if (twice := next((one for one in found if found.count(one) > 1), None)) is not None:
            raise ConfigError(f"openai_server: the {what} {twice} is given twice")
    return places


def is_clear(place: ServerPlace) -> bool:
    """Whether prompts and answers, and a key, cross a network as plain text."""
    parts = urlsplit(place.url)
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")


def _read(text: str, tokenizer_path: str | None) -> ServerPlace:
    first, *others = (part.strip() for part in text.split(","))
    name, is_named, url = first.partition("=")
    if not is_named or not name or "/" in name:
        raise ConfigError(f"openai_server: {first[:100]!r} is not {_FORM}")
    given: dict[str, str] = {}
    for other in others:
        key, _, value = other.partition("=")
        if key not in KEYS or not value or key in given:
            raise ConfigError(f"openai_server {name}: {key[:100]!r} must be one of {', '.join(KEYS)}, each once and "
                              f"with a value: {_FORM}")
        given[key] = value
    if "replay" in given and "events" not in given:
        raise ConfigError(f"openai_server {name}: replay needs events: missing batches of these are sent again there")
    events = None
    if "events" in given:
        replay = given.get("replay")
        events = KVEventsPlace(_endpoint(name, "events", given["events"]),
                               None if replay is None else _endpoint(name, "replay", replay))
    return ServerPlace(name=name, url=_url(name, url), api_key=_api_key(name, given.get("api-key-file")), events=events,
                       tokenizer_path=given.get("tokenizer") or tokenizer_path)


def _url(name: str, url: str) -> str:
    """Without the `/v1` that clients of OpenAI want in it."""
    wrong = f"openai_server {name}: the URL must be http://HOST:PORT or https://HOST:PORT"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError(wrong) from None
    if "@" in parts.netloc:
        raise ConfigError(f"openai_server {name}: no password belongs in a URL; api-key-file names a file with the key")
    if (parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment
            or parts.path.rstrip("/") not in ("", "/v1")):
        raise ConfigError(wrong)
    return f"{parts.scheme}://{parts.netloc}"


def _endpoint(name: str, key: str, endpoint: str) -> str:
    """Of a socket of the server, to connect to. Raises ConfigError."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc" and rest:
        return endpoint
    if scheme != "tcp":
        raise ConfigError(f"openai_server {name}: {key} must be tcp://HOST:PORT or ipc://PATH, got {endpoint[:100]!r}")
    host, port = host_and_port(rest)
    if host in ("*", "0.0.0.0", "::") or not port:
        raise ConfigError(f"openai_server {name}: {key} is where the server is reached, got {endpoint[:100]!r}: name "
                          "its host and port")
    return endpoint


def _api_key(name: str, file: str | None) -> str | None:
    if file is None:
        return env.openai_api_key()
    try:
        key = read_secret(f"openai_server {name}: api-key-file", Path(file), _MAX_KEY_BYTES).decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not key or any(char.isspace() for char in key):
        raise ConfigError(f"openai_server {name}: api-key-file {file} does not hold one key")
    return key
