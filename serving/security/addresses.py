"""Decides which IP addresses this server may be sent to by a stranger: public unicast only.

The tables are IANA's special-purpose registries. `ipaddress.is_global` is not enough: it calls NAT64 and 6to4 addresses
global whatever IPv4 address they wrap, and a cloud's metadata service may have a public one.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_REFUSED_V4 = tuple(map(ipaddress.IPv4Network, (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
    "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    "168.63.129.16/32",  # Azure's metadata and wire server
)))
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_V6 = tuple(map(ipaddress.IPv6Network, (
    "2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
)))
_WRAPPERS = tuple(map(ipaddress.IPv6Network, ("::ffff:0:0/96", "64:ff9b::/96")))  # the last 32 bits are IPv4


def unwrap(address: Address) -> Address:
    """The IPv4 address that a mapped or translated IPv6 address stands for, else itself."""
    if isinstance(address, ipaddress.IPv6Address) and any(address in network for network in _WRAPPERS):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def is_public(address: Address) -> bool:
    """Whether this is an ordinary address of the internet."""
    address = unwrap(address)
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _REFUSED_V4)
    return address in _UNICAST_V6 and not address.scope_id and not any(address in network for network in _REFUSED_V6)


def is_allowed(address: Address, networks: Sequence[Network] = ()) -> bool:
    """Public, or in one of the networks that an operator has named."""
    plain = unwrap(address)
    return is_public(address) or any(plain.version == network.version and plain in network for network in networks)
