"""`interface_to`: the network interface by which this machine reaches another one. Linux; elsewhere it finds none."""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915  # asks for an interface's IPv4 address, see netdevice(7)
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")


def interface_to(url: str) -> str | None:
    """The interface's name, for the host of SCHEME://HOST:PORT; None if it cannot be told."""
    host, _, port = url.partition("://")[2].rpartition(":")
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing, but chooses the way
            own = socket.inet_pton(family, probe.getsockname()[0].partition("%")[0])
    except (OSError, ValueError):
        return None
    names = _with_ipv6(own) if family == socket.AF_INET6 else _with_ipv4(own)
    return names[0] if names else None


def _with_ipv4(address: bytes) -> list[str]:
    try:
        import fcntl
    except ImportError:
        return []
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no such address
                if fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == address:
                    found.append(name)
    return found


def _with_ipv6(address: bytes) -> list[str]:
    try:
        rows = [line.split() for line in _IPV6_ADDRESSES.read_text().splitlines()]
    except OSError:
        return []
    return [row[-1] for row in rows if row[0] == address.hex()]
