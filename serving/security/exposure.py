"""Decides whether a server may listen where it was told to: beyond this machine only with keys, or with --insecure."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from pathlib import Path

from serving.config import HttpSettings
from serving.security.hosts import HostRule
from serving.security.keys import KeyRing, build_key_ring, holds_plain_keys
from xllm import env
from xllm.errors import ConfigError
from xllm.private_files import check_not_everybodys, exposure_of


def key_ring(http: HttpSettings) -> KeyRing:
    """The keys of flags, environment and file. Raises ConfigError."""
    return build_key_ring(api_keys=(*http.api_key, *env.api_keys()),
                          admin_keys=(*http.admin_api_key, *env.admin_api_keys()), file=http.api_key_file)


def check_key_files(http: HttpSettings) -> list[str]:
    """Warnings about key files that other users of this machine can read, or members of their group change.

    Every file has been read before. Raises ConfigError for one that every user can change.
    """
    files = {name: Path(file) for name in ("api_key_file", "ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
             if (file := getattr(http, name)) and Path(file).is_file()}  # keys may come through a pipe, once
    warnings = []
    for name, path in files.items():
        check_not_everybodys(name, path)
        is_secret = (name == "ssl_keyfile" or (name == "api_key_file" and holds_plain_keys(path))
                     or (name == "ssl_certfile" and not http.ssl_keyfile))  # then it holds the key too
        if (problem := exposure_of(path, is_secret=is_secret)) is not None:
            warnings.append(f"{name} {path} {problem}")
    return warnings


def check_exposure(listener: socket.socket, http: HttpSettings, keys: KeyRing) -> None:
    """Raise ConfigError if anybody beyond this machine could use the server without a key."""
    if keys.has_user_keys or http.insecure or is_local(listener):
        return
    raise ConfigError(f"host {http.host} can be reached from other machines: set --api-key, or say --insecure to serve "
                      "everybody who can reach it")


def is_local(listener: socket.socket) -> bool:
    if listener.family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def host_rule(http: HttpSettings, keys: KeyRing) -> HostRule:
    return HostRule((*http.allowed_host, http.host), any_name=keys.has_user_keys or http.insecure)


def tls_context(http: HttpSettings) -> ssl.SSLContext | None:
    """None: plain HTTP. With CA certificates clients must show one of theirs.

    Raises ConfigError for files that cannot be used.
    """
    if not http.ssl_certfile:
        if http.ssl_keyfile or http.ssl_ca_certs:
            raise ConfigError("ssl_keyfile and ssl_ca_certs need ssl_certfile")
        return None
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        file = getattr(http, name)
        if file and not Path(file).is_file():
            raise ConfigError(f"{name}: there is no file {file}")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(http.ssl_certfile, http.ssl_keyfile, password=lambda: "")
        if http.ssl_ca_certs:
            context.load_verify_locations(http.ssl_ca_certs)
            context.verify_mode = ssl.CERT_REQUIRED
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(f"ssl_certfile, ssl_keyfile or ssl_ca_certs cannot be used: {error}") from None
    return context
