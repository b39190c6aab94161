"""`host_and_port`: reads HOST:PORT; `is_loopback`: whether a host is this machine alone."""

from __future__ import annotations

import contextlib
import ipaddress

from xllm.errors import ConfigError

MAX_PORT = 2**16 - 1  # of TCP


def host_and_port(address: str) -> tuple[str, int]:
    """Of HOST:PORT, where an IPv6 address stands in brackets. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare and bare == host) or not (port.isascii() and port.isdecimal()) or int(port) > MAX_PORT:
        raise ConfigError(f"an address is HOST:PORT, or [HOST]:PORT for IPv6, got {address!r}")
    return bare, int(port)


def is_loopback(host: str) -> bool:
    """Of an address, without brackets, or a name; of names `localhost` alone is known to be."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
