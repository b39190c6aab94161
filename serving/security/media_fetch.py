"""`MediaFetcher`: media from addresses that a request names, without becoming the requester's hand in our network.

Off until an operator names the domains. Names are resolved once, every address of the answer must be allowed, and the
connection goes to that very address; a redirect is a new address and passes the same gate. No proxy, no cookie, no
credential, no compression; bytes and seconds are bounded while they come. Only https unless a domain says otherwise.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import h11

from serving.limits import BY_NAME
from serving.security.addresses import Address, Network, is_allowed
from serving.security.media_url import MediaError, MediaUrl, parse_url, resolve_redirect
from xllm.errors import ConfigError

READ_BYTES = 65536  # of one read, after which the bounds are checked again. Chosen
MAX_HEAD_BYTES = 16384  # of an answer's head: h11's own default
REDIRECTS = frozenset({301, 302, 303, 307, 308})
Resolver = Callable[[str, int], Awaitable[list[str]]]


async def system_resolver(host: str, port: int) -> list[str]:
    """All addresses of a name, as the system finds them. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]).partition("%")[0] for *_, address in found]


@dataclass(frozen=True, kw_only=True)
class MediaPolicy:
    """What may be fetched. Nothing, as it is.

    domains: `example.com` allows that host by https, `.example.com` what is below it too, `http://example.com` and
    `example.com:8443` also that scheme or port. private_networks: such as 10.1.0.0/16, allowed in spite of being
    private. Raises ConfigError.
    """

    domains: tuple[str, ...] = ()
    private_networks: tuple[str, ...] = ()
    max_bytes: int = BY_NAME["MAX_MEDIA_BYTES"].default
    max_redirects: int = BY_NAME["MAX_MEDIA_REDIRECTS"].default
    timeout_s: float = BY_NAME["MAX_MEDIA_SECONDS"].default
    networks: tuple[Network, ...] = field(init=False, default=())
    origins: frozenset[tuple[str, str, int]] = field(init=False, default=frozenset())

    def __post_init__(self) -> None:
        try:
            networks = tuple(ipaddress.ip_network(text) for text in self.private_networks)
            origins = frozenset(_origin(text) for text in self.domains)
        except ValueError as error:
            raise ConfigError(f"media: {error}") from None
        object.__setattr__(self, "networks", networks)
        object.__setattr__(self, "origins", origins)

    def allows(self, url: MediaUrl) -> bool:
        """Whether scheme, host and port are on the list; the address is another question."""
        labels = url.host.split(".")
        hosts = [url.host]
        if url.address is None:
            hosts += ["." + ".".join(labels[start:]) for start in range(len(labels))]
        return any((url.scheme, host, url.port) in self.origins for host in hosts)


def _origin(text: str) -> tuple[str, str, int]:
    """(scheme, host with its leading dot, port) of an entry of the list."""
    scheme, separator, rest = text.rpartition("://")
    below = rest.startswith(".")
    url = parse_url(f"{scheme or 'https'}://{rest.removeprefix('.')}")
    if url.target != "/" or rest.endswith("/") or (separator and not scheme) or (below and url.address is not None):
        raise ConfigError(f"{text!r} is not a domain")
    return url.scheme, "." * below + url.host, url.port


@dataclass(frozen=True)
class Medium:
    """A fetched medium: its bytes and the type that its sender names."""

    content: bytes
    media_type: str  # as the sender says; a decoder does not rely on it


class MediaFetcher:
    """policy: what is allowed. resolve: for tests that play a hostile name server. tls: for a private authority."""

    def __init__(self, policy: MediaPolicy, *, resolve: Resolver = system_resolver,
                 tls: ssl.SSLContext | None = None):
        self._policy, self._resolve = policy, resolve
        self._tls = tls

    async def fetch(self, text: str) -> Medium:
        """The medium behind an http(s) or data address. Raises MediaError, which says nothing about our network."""
        if text[:5].lower() == "data:":
            return inline_medium(text, self._policy.max_bytes)
        if not self._policy.origins:
            raise MediaError("this server does not fetch media; send them inline, as a data: address")
        url = parse_url(text)
        try:
            return await asyncio.wait_for(self._follow(url), self._policy.timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            raise MediaError(f"the medium did not come within {self._policy.timeout_s:g} s") from None
        except (OSError, ssl.SSLError, h11.ProtocolError, asyncio.IncompleteReadError):
            # Which of them it was would tell the requester what listens where.
            raise MediaError("the medium could not be fetched") from None

    async def _follow(self, url: MediaUrl) -> Medium:
        for _ in range(self._policy.max_redirects + 1):
            found = await self._get(url, await self._pin(url))
            if isinstance(found, Medium):
                return found
            url = resolve_redirect(url, found)
        raise MediaError(f"more than {self._policy.max_redirects} redirects")

    async def _pin(self, url: MediaUrl) -> Address:
        """The one address to connect to. Raises MediaError unless every address of the host may be used."""
        if not self._policy.allows(url):
            raise MediaError("media may not be fetched from there: the domain is not on this server's list")
        if url.address is not None:
            addresses: list[Address] = [url.address]
        else:
            addresses = [ipaddress.ip_address(text) for text in await self._resolve(url.host, url.port)]
        if not addresses or not all(is_allowed(address, self._policy.networks) for address in addresses):
            raise MediaError("media may not be fetched from there: the host is not a public one")
        return addresses[0]

    async def _get(self, url: MediaUrl, address: Address) -> Medium | str:
        """The medium, or where a redirect leads."""
        tls = (self._tls or ssl.create_default_context()) if url.scheme == "https" else None
        reader, writer = await asyncio.open_connection(str(address), url.port, ssl=tls,
                                                       server_hostname=url.host if tls else None)
        try:
            return await self._exchange(url, reader, writer)
        finally:
            writer.close()
            with suppress(OSError, ssl.SSLError):
                await writer.wait_closed()

    async def _exchange(self, url: MediaUrl, reader: asyncio.StreamReader,
                        writer: asyncio.StreamWriter) -> Medium | str:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        head = h11.Request(method="GET", target=url.target, headers=[
            ("Host", url.authority), ("Accept", "*/*"), ("Accept-Encoding", "identity"), ("Connection", "close")])
        writer.write((connection.send(head) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        await writer.drain()
        response = await _next_event(connection, reader)
        while isinstance(response, h11.InformationalResponse):
            response = await _next_event(connection, reader)
        if not isinstance(response, h11.Response):
            raise MediaError("the medium could not be fetched")
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
        if response.status_code in REDIRECTS:
            return headers.get("location", "")
        self._check_response(response.status_code, headers)
        return Medium(await self._body(connection, reader), headers.get("content-type", ""))

    def _check_response(self, status: int, headers: dict[str, str]) -> None:
        if status != 200:
            raise MediaError("the medium could not be fetched")
        if headers.get("content-encoding", "identity") != "identity":
            raise MediaError("the medium came compressed, which was not asked for")
        if int(headers.get("content-length", "0")) > self._policy.max_bytes:  # h11 has checked that it is a number
            raise self._too_large()

    async def _body(self, connection: h11.Connection, reader: asyncio.StreamReader) -> bytes:
        content = bytearray()
        while not isinstance(event := await _next_event(connection, reader), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                content += event.data
                if len(content) > self._policy.max_bytes:
                    raise self._too_large()
            elif isinstance(event, h11.ConnectionClosed):
                raise MediaError("the medium could not be fetched")
        return bytes(content)

    def _too_large(self) -> MediaError:
        return MediaError(f"the medium is larger than {self._policy.max_bytes} bytes")


async def _next_event(connection: h11.Connection, reader: asyncio.StreamReader) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(READ_BYTES))
    return event


def inline_medium(text: str, max_bytes: int) -> Medium:
    """A `data:TYPE;base64,...` address. Raises MediaError; the size is known before anything is decoded."""
    head, comma, body = text.partition(",")
    media_type, marker, encoding = head[5:].rpartition(";")
    if not comma or not marker or encoding.lower() != "base64":
        raise MediaError("an inline medium is data:TYPE;base64,...")
    if len(body) > (max_bytes + 2) // 3 * 4:
        raise MediaError(f"the medium is larger than {max_bytes} bytes")
    try:
        content = base64.b64decode(body.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise MediaError("an inline medium is not valid base64") from None
    if len(content) > max_bytes:
        raise MediaError(f"the medium is larger than {max_bytes} bytes")
    return Medium(content, media_type)
