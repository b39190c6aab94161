"""`MediaUrl`: the one parser of addresses that strangers send. What is checked and what is connected to come from the
same fields of the same object; no other library reads the text again.

It takes a small part of RFC 3986 and refuses the rest: what two parsers could read differently is no address here.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from serving.limits import BY_NAME
from xllm.errors import RequestError

MAX_CHARS = BY_NAME["MAX_MEDIA_URL_CHARS"].default
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = rf"(?P<name>{_LABEL}(?:\.{_LABEL})*)|\[(?P<v6>[0-9a-f:.]{{2,45}})\]"
# No user info, no backslash, no fragment, no blank, nothing but ASCII; a percent sign only before two hex digits.
_TARGET = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*"
_URL = re.compile(rf"(?P<scheme>https?)://(?:{_HOST})(?::(?P<port>[0-9]{{1,5}}))?(?P<path>/{_TARGET})?"
                  rf"(?P<query>\?(?:{_TARGET}|\?)*)?", re.ASCII)
_DEFAULT_PORTS = {"http": 80, "https": 443}


class MediaError(RequestError):
    """A medium cannot be had; the message holds nothing about the network behind this server."""


@dataclass(frozen=True)
class MediaUrl:
    """host: lower case, or the address in its canonical form. target: what stands in the request line."""

    scheme: str
    host: str
    port: int
    target: str
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None  # where host is one

    @property
    def authority(self) -> str:
        """Host and, unless it is the scheme's own, port: as in a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parse_url(text: str) -> MediaUrl:
    """Raises MediaError for anything but a plain http(s) address."""
    if len(text) > MAX_CHARS:
        raise MediaError(f"the address is longer than {MAX_CHARS} characters")
    scheme, separator, rest = text.partition("://")
    cut = min((rest.find(mark) for mark in "/?" if mark in rest), default=len(rest))
    match = _URL.fullmatch(scheme.lower() + separator + rest[:cut].lower() + rest[cut:])
    if match is None:
        raise MediaError("only plain http and https addresses can be fetched: no user name, backslash, blank or "
                         "fragment, and international names in their xn-- form")
    port = int(match["port"]) if match["port"] else _DEFAULT_PORTS[match["scheme"]]
    if not 1 <= port <= 65535:
        raise MediaError("the port must be in 1 to 65535")
    address = _address(match["name"], match["v6"])
    host = str(address) if address is not None else match["name"]
    return MediaUrl(match["scheme"], host, port, (match["path"] or "/") + (match["query"] or ""), address)


def _address(name: str | None, v6: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Raises MediaError for the odd forms of addresses that C libraries read: 2130706433, 0x7f.1, 0177.0.0.1, 127.1."""
    try:
        if v6 is not None:
            return ipaddress.IPv6Address(v6)
        assert name is not None
        last = name.rpartition(".")[2]
        if not (last.isdecimal() or re.fullmatch("0x[0-9a-f]*", last)):
            return None
        return ipaddress.IPv4Address(name)
    except ValueError:
        raise MediaError("the host is neither a name nor an address in its usual form") from None


def resolve_redirect(base: MediaUrl, location: str) -> MediaUrl:
    """Where a Location header leads: a whole address, or a path on the same host. Raises MediaError."""
    if location.startswith("/") and not location.startswith("//"):
        return parse_url(f"{base.scheme}://{base.authority}{location}")
    url = parse_url(location)
    if base.scheme == "https" and url.scheme == "http":
        raise MediaError("a redirect from https to http is not followed")
    return url
