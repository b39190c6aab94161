"""From the status of a call to etcd to the error that says what is wrong, and with what."""

from __future__ import annotations

import re
from typing import Any

from serving.cluster.store_errors import (
    CompactedError,
    LeaseLostError,
    StoreError,
    StoreRefusedError,
    StoreUnreachableError,
)

_GRPC = re.compile(r"^[A-Z_]+: ipv[46]:[^ ]+: ")  # its own status and the address, which the message has already
_TLS = re.compile(r"handshake failed|handshake read failed|SSL_ERROR|CERTIFICATE_", re.IGNORECASE)
# What etcd's messages mean (its api/v3rpc/rpctypes/error.go), and for whom they are.
_MEANINGS = (
    ("authentication failed", StoreRefusedError, "wrong user or password"),
    ("user name is empty", StoreRefusedError, "it has authentication enabled, and no user and password were given"),
    ("authentication is not enabled", StoreRefusedError, "a user was given, but authentication is not enabled there: "
                                                         "leave the user out, or enable it (etcdctl auth enable)"),
    ("permission denied", StoreRefusedError, "the user has no permission for these keys"),
    ("database space exceeded", StoreRefusedError, "its database is full: compact it, or raise --quota-backend-bytes"),
    ("request is too large", StoreRefusedError, "the request is larger than its --max-request-bytes"),
    ("lease not found", LeaseLostError, "it has no such lease any more"),
    ("has been compacted", CompactedError, "changes of that revision are not kept any more"),
)
_TOKEN = ("invalid auth token", "auth store is old")


def is_about_token(code: Any, details: str | None) -> bool:
    """Whether a new token may help: they expire, and do not survive a restart."""
    return code.name == "UNAUTHENTICATED" or any(words in (details or "") for words in _TOKEN)


def store_error(name: str, code: Any, details: str | None, user: str | None = None) -> StoreError:
    """The error for a call's status. name: of the store. user: whom it was about. `code` is a `grpc.StatusCode`."""
    said = (details or "").removeprefix("etcdserver: ").strip()
    for words, kind, meaning in _MEANINGS:
        if words in said:
            who = f"user {user!r}: " if user is not None else ""
            return kind(f"{name}: {who}{meaning} ({said})")
    if _TLS.search(said):
        return StoreRefusedError(f"{name}: TLS failed: {_shortened(said)}")
    if code.name == "UNIMPLEMENTED":
        return StoreRefusedError(f"{name}: what answers there is no etcd with API v3 ({said})")
    if code.name in ("PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_ARGUMENT", "FAILED_PRECONDITION"):
        return StoreRefusedError(f"{name}: it refused: {said}")
    if code.name == "UNAVAILABLE":
        return StoreUnreachableError(f"{name}: no connection: {_shortened(said)}")
    return StoreUnreachableError(f"{name}: no answer: {code.name.lower()}: {_shortened(said)}")


def _shortened(said: str) -> str:
    """Of grpc's list of causes the last one, which it puts behind these words."""
    cause = _GRPC.sub("", said.rpartition("last error: ")[2]).removesuffix(": OK") or "the connection was closed"
    return f"{cause} (is it https:// there?)" if cause == "Socket closed" else cause
