"""Fetching what a stranger names: real servers on loopback, which stands for the network that must not be reached."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import time
from typing import Any

import pytest

from serving.limits import MEDIA
from serving.security.addresses import is_allowed, is_public
from serving.security.image_header import MAX_PIXELS
from serving.security.media_fetch import MediaFetcher, MediaPolicy, inline_medium
from serving.security.media_url import MAX_CHARS, MediaError, parse_url, resolve_redirect
from tests.security.site import Site, ok, redirect
from xllm.errors import ConfigError

LOOPBACK = ("127.0.0.0/8",)


class Names:
    """A name server that says what it is told, and keeps count."""

    def __init__(self, **answers: list[list[str]] | list[str]):
        self.answers: dict[str, Any] = {name.replace("_", "."): answer for name, answer in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answer = self.answers[host]
        return answer.pop(0) if isinstance(answer[0], list) else answer


def fetcher(*domains: str, names: Names | None = None, networks: tuple[str, ...] = LOOPBACK,
            **policy: Any) -> MediaFetcher:
    made = MediaPolicy(domains=domains, private_networks=networks, **policy)
    return MediaFetcher(made, resolve=names or Names(cdn_example=["127.0.0.1"]))


def test_no_row_of_the_table_is_without_a_test() -> None:
    assert {limit.name for limit in MEDIA} == {"MAX_MEDIA_BYTES", "MAX_MEDIA_PIXELS", "MAX_MEDIA_REDIRECTS",
                                               "MAX_MEDIA_SECONDS", "MAX_MEDIA_URL_CHARS"}
    policy = MediaPolicy()
    by_name = {limit.name: limit.default for limit in MEDIA}
    assert (policy.max_bytes, policy.max_redirects, policy.timeout_s, MAX_PIXELS, MAX_CHARS) == tuple(
        by_name[name] for name in ("MAX_MEDIA_BYTES", "MAX_MEDIA_REDIRECTS", "MAX_MEDIA_SECONDS", "MAX_MEDIA_PIXELS",
                                   "MAX_MEDIA_URL_CHARS"))


# --- addresses


@pytest.mark.parametrize("text", [
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "169.254.169.254",
    "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.168.1.1", "198.18.0.1", "198.51.100.7", "203.0.113.9",
    "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16", "::", "::1", "::ffff:127.0.0.1",
    "::ffff:169.254.169.254", "::ffff:a9fe:a9fe", "::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b::7f00:1",
    "64:ff9b:1::1", "2002:7f00:1::1", "2002:a9fe:a9fe::", "2001::1", "2001:db8::1", "fc00::1", "fd00:ec2::254",
    "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "3fff::1", "5f00::1", "100::1",
])
def test_addresses_that_are_not_public(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", ["1.1.1.1", "93.184.215.14", "172.15.255.255", "172.32.0.1", "100.63.255.255",
                                  "2606:4700::1111", "2a00:1450:4001::1", "64:ff9b::101:101", "::ffff:1.1.1.1"])
def test_addresses_that_are(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


def test_every_address_that_python_calls_private_is_refused() -> None:
    """A second opinion, over all of IPv4 in steps that meet every /16."""
    for number in range(0, 2**32, 2**16 - 1):
        address = ipaddress.IPv4Address(number)
        if not address.is_global or address.is_multicast:
            assert not is_public(address), address


def test_a_named_network_is_allowed_also_when_mapped() -> None:
    networks = (ipaddress.ip_network("10.1.0.0/16"),)
    for text, allowed in (("10.1.2.3", True), ("::ffff:10.1.2.3", True), ("10.2.0.1", False), ("127.0.0.1", False)):
        assert is_allowed(ipaddress.ip_address(text), networks) == allowed


# --- the parser

@pytest.mark.parametrize(("text", "host", "port", "target"), [
    ("https://Example.COM/a?b=c", "example.com", 443, "/a?b=c"), ("http://a.b:8080", "a.b", 8080, "/"),
    ("HTTP://a/%41~!$&'()*+,;=:@", "a", 80, "/%41~!$&'()*+,;=:@"), ("https://a?q=/x?y", "a", 443, "/?q=/x?y"),
    ("http://[2606:4700:0::1111]:81/x", "2606:4700::1111", 81, "/x"), ("http://1.2.3.4/", "1.2.3.4", 80, "/"),
    ("https://xn--bcher-kva.example/", "xn--bcher-kva.example", 443, "/"),
])
def test_plain_addresses(text: str, host: str, port: int, target: str) -> None:
    url = parse_url(text)
    assert (url.host, url.port, url.target) == (host, port, target)


@pytest.mark.parametrize("text", [
    "", "x", "//a/", "http:/a", "http:a", "ftp://a/", "file:///etc/passwd", "gopher://a/", "data:,x", "unix:///x",
    "http://", "http:///x", "http://a@b/", "http://user:pw@b/", "http://a\\@b/", "http://a\\.b/", "http://a/\\x",
    "http://a b/", "http://a/ b", "http://a/\tb", "http://a\n/", "http://a/\r\nX: y", "http://a/\0", "http://a#@b/",
    "http://a/#x", "http://a./", "http://.a/", "http://a..b/", "http://-a/", "http://a-/", "http://a_b/",
    "http://bücher.example/", "http://ⓐ.com/", "http://１２７.0.0.1/", "http://127。0。0。1/", "http://%61/",
    "http://a%2eb/", "http://a:0/", "http://a:65536/", "http://a:/", "http://a:1:2/", "http://a:+80/", "http://a:8 0/",
    "http://2130706433/", "http://0x7f000001/", "http://0x7f.0.0.1/", "http://0177.0.0.1/", "http://017700000001/",
    "http://127.1/", "http://127.0.1/", "http://127.0.0.01/", "http://1.2.3.4.5/", "http://256.1.1.1/", "http://0/",
    "http://0x/", "http://a.0x1/", "http://[::1/", "http://::1/", "http://[1.2.3.4]/", "http://[fe80::1%25eth0]/",
    "http://[v1.a]/", "http://[]/", "http://a/%zz", "http://a/%", "http://a/<", "http://a/ü", "http://a/?#",
    "http://" + "a" * 64 + "/", "http:\\\\a/", "http://a?\\", " http://a/", "http://a/ ",
])
def test_addresses_that_two_parsers_could_read_differently(text: str) -> None:
    with pytest.raises(MediaError):
        parse_url(text)


def test_length_of_an_address() -> None:
    assert parse_url("http://a/".ljust(MAX_CHARS, "x"))
    with pytest.raises(MediaError, match=f"longer than {MAX_CHARS}"):
        parse_url("http://a/".ljust(MAX_CHARS + 1, "x"))


def test_where_redirects_lead() -> None:
    base = parse_url("https://a.example:444/x/y?z")
    assert resolve_redirect(base, "/w?v").authority == "a.example:444"
    assert resolve_redirect(base, "https://b.example/").host == "b.example"
    for location in ("http://a.example/", "//b.example/", "w", "", "?x", "/\\b", "file:///x", "https:/b", "/\\/b"):
        with pytest.raises(MediaError):
            resolve_redirect(base, location)


# --- the list of domains


@pytest.mark.parametrize(("domain", "fine", "refused"), [
    ("a.example", ["https://a.example/", "https://A.EXAMPLE:443/x"],
     ["http://a.example/", "https://b.a.example/", "https://xa.example/", "https://a.example:8443/"]),
    (".a.example", ["https://a.example/", "https://b.a.example/", "https://c.b.a.example/"], ["https://ba.example/"]),
    ("http://a.example:8080", ["http://a.example:8080/"], ["http://a.example/", "https://a.example:8080/"]),
    ("1.2.3.4", ["https://1.2.3.4/"], ["https://4.1.2.3/"]),
])
def test_the_list(domain: str, fine: list[str], refused: list[str]) -> None:
    policy = MediaPolicy(domains=(domain,))
    assert all(policy.allows(parse_url(text)) for text in fine)
    assert not any(policy.allows(parse_url(text)) for text in refused)


@pytest.mark.parametrize("domain", ["", ".", "*", "*.example", "https://", "a.example/", "a.example/x", "a b",
                                    ".1.2.3.4", "ftp://a", "..a", "://a"])
def test_a_wrong_entry_stops_the_start(domain: str) -> None:
    with pytest.raises(ConfigError):
        MediaPolicy(domains=(domain,))
    with pytest.raises(ConfigError):
        MediaPolicy(private_networks=("10.0.0.1/8",))


# --- fetching


async def test_a_domain_that_is_not_listed_is_not_even_looked_up() -> None:
    async with Site({"/": ok(b"x")}) as site:
        names = Names(other_example=["127.0.0.1"])
        listed = (f"http://cdn.example:{site.port}", "https://other.example", "http://other.example:1")
        for host in ("other.example", "127.0.0.1", "x.cdn.example", "[::ffff:127.0.0.1]"):
            with pytest.raises(MediaError, match="not on this server's list"):
                await fetcher(*listed, names=names).fetch(f"http://{host}:{site.port}/")
        assert (names.asked, site.num_connections) == ([], 0)


async def test_off_by_default() -> None:
    async with Site({"/": ok(b"x")}) as site:
        with pytest.raises(MediaError, match="does not fetch media"):
            await MediaFetcher(MediaPolicy()).fetch(f"http://127.0.0.1:{site.port}/")
        assert site.num_connections == 0


async def test_a_medium_comes_and_the_request_tells_nothing() -> None:
    async with Site({"/a.png?b": ok(b"pixels")}) as site:
        names = Names(cdn_example=["127.0.0.1"])
        medium = await fetcher(f"http://cdn.example:{site.port}", names=names).fetch(
            f"http://cdn.example:{site.port}/a.png?b")
        assert (medium.content, medium.media_type) == (b"pixels", "image/png")
        assert names.asked == ["cdn.example"]
        sent = {line.partition(":")[0].lower() for line in site.requests[0].splitlines()[1:] if line}
        assert sent == {"host", "accept", "accept-encoding", "connection"}
        assert f"cdn.example:{site.port}" in site.requests[0]


async def test_chunked_and_until_closed() -> None:
    chunked = ok(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", "Transfer-Encoding: chunked")
    until_closed = b"HTTP/1.0 200 OK\r\n\r\nabcde"
    async with Site({"/c": chunked, "/u": until_closed}) as site:
        for path in "cu":
            medium = await fetcher(f"http://cdn.example:{site.port}").fetch(f"http://cdn.example:{site.port}/{path}")
            assert medium.content == b"abcde"


@pytest.mark.parametrize("answer", [["127.0.0.1"], ["1.1.1.1", "127.0.0.1"], ["::ffff:127.0.0.1"], ["10.0.0.1"], [],
                                    ["169.254.169.254"], ["64:ff9b::7f00:1"]], ids=str)
async def test_a_listed_name_that_leads_inside(answer: list[str]) -> None:
    """Also if only one of its addresses does: the next connection might take that one."""
    async with Site({"/": ok(b"secret")}) as site:
        names = Names(cdn_example=[answer])
        with pytest.raises(MediaError, match="not a public one"):
            await fetcher(f"http://cdn.example:{site.port}", names=names, networks=()).fetch(
                f"http://cdn.example:{site.port}/")
        assert site.num_connections == 0


async def test_a_name_is_asked_for_once_and_its_answer_is_kept() -> None:
    """DNS rebinding: the second answer would be another machine."""
    async with Site({"/": ok(b"first")}, address="127.0.0.1") as site:
        names = Names(cdn_example=[["127.0.0.1"], ["127.0.0.2"]])
        medium = await fetcher(f"http://cdn.example:{site.port}", names=names).fetch(f"http://cdn.example:{site.port}/")
        assert medium.content == b"first"
        assert names.asked == ["cdn.example"]


@pytest.mark.parametrize("location", [
    "http://inner.example:{inner}/", "http://127.0.0.2:{inner}/", "http://[::ffff:127.0.0.2]:{inner}/",
    "http://2130706434:{inner}/", "//127.0.0.2:{inner}/", "http://cdn.example@127.0.0.2:{inner}/",
    "http://127.0.0.2:{inner}\\@cdn.example:{outer}/", "file:///etc/passwd", "gopher://127.0.0.2:{inner}/_x",
])
@pytest.mark.parametrize("status", [301, 303, 307])
async def test_a_redirect_does_not_lead_inside(location: str, status: int) -> None:
    async with Site({"/": ok(b"secret")}, address="127.0.0.2") as inner, Site({}) as outer:
        outer.answers["/"] = redirect(location.format(inner=inner.port, outer=outer.port), status)
        domains = [f"http://cdn.example:{outer.port}", f"http://inner.example:{inner.port}"]
        names = Names(cdn_example=["127.0.0.1"], inner_example=["127.0.0.2"])
        with pytest.raises(MediaError):
            await fetcher(*domains, names=names, networks=("127.0.0.1/32",)).fetch(f"http://cdn.example:{outer.port}/")
        assert (outer.num_connections, inner.num_connections) == (1, 0)


async def test_a_redirect_to_the_same_name_is_resolved_and_checked_again() -> None:
    async with Site({"/": redirect("/next"), "/next": ok(b"secret")}) as site:
        names = Names(cdn_example=[["127.0.0.1"], ["127.0.0.2"]])
        with pytest.raises(MediaError, match="not a public one"):
            await fetcher(f"http://cdn.example:{site.port}", names=names, networks=("127.0.0.1/32",)).fetch(
                f"http://cdn.example:{site.port}/")
        assert site.paths == ["/"]


@pytest.mark.parametrize(("num_redirects", "comes"), [(3, True), (4, False)])
async def test_number_of_redirects(num_redirects: int, comes: bool) -> None:
    answers: dict[str, Any] = {f"/{i}": redirect(f"/{i - 1}") for i in range(1, 5)}
    async with Site({**answers, "/0": ok(b"x")}) as site:
        getting = fetcher(f"http://cdn.example:{site.port}").fetch(f"http://cdn.example:{site.port}/{num_redirects}")
        if comes:
            assert (await getting).content == b"x"
        else:
            with pytest.raises(MediaError, match="more than 3 redirects"):
                await getting


async def test_bytes_are_counted_whether_they_are_declared_or_not() -> None:
    sent = 0

    async def endless(writer: Any) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            sent += 65536
            await writer.drain()

    answers = {"/declared": ok(b"", "Content-Length: 1000000000"), "/endless": endless, "/fits": ok(b"x" * 1000),
               "/beyond": ok(b"x" * 1001), "/chunked": ok(b"3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n",
                                                          "Transfer-Encoding: chunked")}
    async with Site(answers) as site:  # type: ignore[arg-type]
        get = fetcher(f"http://cdn.example:{site.port}", max_bytes=1000).fetch
        assert len((await get(f"http://cdn.example:{site.port}/fits")).content) == 1000
        for path in ("declared", "beyond", "chunked", "endless"):
            with pytest.raises(MediaError, match="larger than 1000 bytes"):
                await get(f"http://cdn.example:{site.port}/{path}")
    assert sent < 2**24, "the reader stopped; what was sent is what the sockets hold"


@pytest.mark.parametrize("stalls", ["connect", "head", "body", "drip"])
async def test_seconds(stalls: str) -> None:
    async def stall(writer: Any) -> None:
        if stalls != "head":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(1000):
            if stalls == "drip":
                writer.write(b"x")
                await writer.drain()
            await asyncio.sleep(0.05)

    async with Site({"/": stall}) as site:
        names = Names(cdn_example=["127.0.0.1"])
        if stalls == "connect":
            async def never(host: str, port: int) -> list[str]:
                await asyncio.sleep(60)
                return []
        else:
            never = names
        policy = MediaPolicy(domains=(f"http://cdn.example:{site.port}",), private_networks=LOOPBACK, timeout_s=0.3)
        started_s = time.monotonic()
        with pytest.raises(MediaError, match=r"within 0\.3 s"):
            await MediaFetcher(policy, resolve=never).fetch(f"http://cdn.example:{site.port}/")
        assert time.monotonic() - started_s < 3.0


@pytest.mark.parametrize("answer", [
    b"", b"nonsense\r\n\r\n", b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 204 No\r\n\r\n",
    b"HTTP/1.1 206 Part\r\nContent-Length: 1\r\n\r\nx", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
    b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
    b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nx",
    b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
], ids=lambda answer: answer[:40].decode())
async def test_answers_that_are_none(answer: bytes) -> None:
    async with Site({"/": answer}) as site:
        with pytest.raises(MediaError) as raised:
            await fetcher(f"http://cdn.example:{site.port}").fetch(f"http://cdn.example:{site.port}/")
        assert "127.0.0.1" not in str(raised.value)
        assert str(site.port) not in str(raised.value)


async def test_a_closed_port_and_a_wrong_answer_read_the_same() -> None:
    """Else the messages would be a port scanner."""
    async with Site({"/": b"SSH-2.0-x\r\n"}) as site:
        port = site.port
        with pytest.raises(MediaError) as open_port:
            await fetcher(f"http://cdn.example:{port}").fetch(f"http://cdn.example:{port}/")
    with pytest.raises(MediaError) as closed_port:
        await fetcher(f"http://cdn.example:{port}").fetch(f"http://cdn.example:{port}/")
    assert str(open_port.value) == str(closed_port.value)


async def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Site({}) as proxy, Site({"/": ok(b"x")}) as site:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        await fetcher(f"http://cdn.example:{site.port}").fetch(f"http://cdn.example:{site.port}/")
        assert (proxy.num_connections, site.num_connections) == (0, 1)


# --- inline


@pytest.mark.parametrize(("size", "fits"), [(999, True), (1000, True), (1001, False), (1002, False), (5000, False)])
def test_inline_size(size: int, fits: bool) -> None:
    text = "data:image/png;base64," + base64.b64encode(b"x" * size).decode()
    if fits:
        assert inline_medium(text, 1000).content == b"x" * size
    else:
        with pytest.raises(MediaError, match="larger than 1000 bytes"):
            inline_medium(text, 1000)


@pytest.mark.parametrize("text", ["data:", "data:,x", "data:image/png,x", "data:;base64", "data:;base64,*",
                                  "data:;base64,é", "data:;base64,QQ", "data:x;base32,QQ==", "data:;base64,QQ==\n"])
def test_inline_nonsense(text: str) -> None:
    with pytest.raises(MediaError):
        inline_medium(text, 1000)


async def test_inline_needs_no_list() -> None:
    assert (await MediaFetcher(MediaPolicy()).fetch("DATA:image/gif;base64,QUI=")).content == b"AB"
