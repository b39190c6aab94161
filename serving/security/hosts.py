"""`HostRule`: decides which `Host` headers are accepted.

A malformed one is refused always. On a server without keys a browser is the danger: a page on another site can point
its own name at this machine (DNS rebinding) and then read answers as its own. Such a request carries that name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from serving.api.errors import ApiError, invalid

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(?:(?P<name>{_NAME})|\[(?P<v6>[0-9A-Fa-f:.]{{2,45}})\])(?::[0-9]{{1,5}})?", re.ASCII)


class HostRule:
    """names: beside localhost and IP addresses, whose owners need no DNS. any_name: only check the form."""

    def __init__(self, names: Sequence[str] = (), *, any_name: bool = False):
        self._names = {"localhost", *(name.lower() for name in names)}
        self._any_name = any_name

    def complaint(self, headers: list[tuple[bytes, bytes]]) -> ApiError | None:
        """What is wrong with a request's Host headers; HTTP/1.0 may come without one."""
        given = [value for name, value in headers if name == b"host"]
        if not given:
            return None
        match = _HOST.fullmatch(given[0].decode("latin-1"))
        if len(given) > 1 or match is None:
            return invalid("malformed Host header")
        if self._any_name or match["v6"] or match["name"].lower() in self._names or _is_address(match["name"]):
            return None
        return ApiError(403, f"this server does not answer as {match['name'][:64]!r}; --allowed-host adds a name, and "
                        "with --api-key all are allowed")


def _is_address(name: str) -> bool:
    try:
        ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return True
