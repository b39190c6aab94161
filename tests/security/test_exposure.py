"""Where a server listens, and TLS with a real certificate and real clients."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from serving.commands.server_life import bind
from serving.config import HttpSettings
from serving.security.exposure import check_exposure, is_local, tls_context
from serving.security.keys import KeyRing, build_key_ring
from tests.certificates import make_certificates
from tests.serving.server_process import ROOT, ServerProcess
from xllm.errors import ConfigError

KEYS = build_key_ring(api_keys=["a"])


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("localhost", True), ("127.8.9.1", True),
                                             ("0.0.0.0", False)])
def test_beyond_this_machine_only_with_a_key(host: str, local: bool) -> None:
    listener = bind(host, 0)
    try:
        assert is_local(listener) == local
        http = HttpSettings(host=host)
        check_exposure(listener, http, KEYS)
        check_exposure(listener, HttpSettings(host=host, insecure=True), KeyRing())
        if local:
            check_exposure(listener, http, KeyRing())
            return
        for keys in (KeyRing(), build_key_ring(admin_keys=["only-admin"])):
            with pytest.raises(ConfigError, match=r"--api-key.*--insecure"):
                check_exposure(listener, http, keys)
    finally:
        listener.close()


def test_the_command_refuses(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-m", "serving.commands.cli", "serve", "--port", "0", "--host", "0.0.0.0"],
                            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "can be reached from other machines: set --api-key, or say --insecure" in result.stderr.splitlines()[-1]


def test_only_the_configured_address_listens(open_server: ServerProcess) -> None:
    """All that the two processes listen on is one TCP port of 127.0.0.1; the rest are unix sockets."""
    pids = (open_server.process.pid, open_server.engine_pid)
    inodes = {os.readlink(link) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for table in ("tcp", "tcp6", "udp", "udp6")
            for line in Path(f"/proc/{pids[0]}/net/{table}").read_text().splitlines()[1:]]
    own = [row for row in rows if f"socket:[{row[9]}]" in inodes and row[3] in ("0A", "07")]  # listening, unconnected
    port = int(open_server.url.rpartition(":")[2])
    assert [row[1] for row in own] == [f"0100007F:{port:04X}"]


# --- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates of it for a server at 127.0.0.1 and for a client."""
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls_server(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """HTTPS, and only for clients with a certificate of the authority."""
    files = {name: str(certificates / name) for name in ("server.pem", "server.key", "ca.pem")}
    with ServerProcess(tmp_path_factory.mktemp("log") / "log.txt", "--ssl-certfile", files["server.pem"],
                       "--ssl-keyfile", files["server.key"], "--ssl-ca-certs", files["ca.pem"],
                       "--api-key", "tls-key", "--max-connections", "40", "--head-timeout", "6") as running:
        yield running


def trusting(certificates: Path, *, identified: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    if identified:
        context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
    return context


def test_the_real_client_over_tls(tls_server: ServerProcess, certificates: Path) -> None:
    assert tls_server.url.startswith("https://127.0.0.1:")
    with httpx.Client(verify=trusting(certificates, identified=True)) as http, openai.OpenAI(
            base_url=f"{tls_server.url}/v1", api_key="tls-key", max_retries=0, http_client=http) as client:
        answer = client.completions.create(model="demo", prompt="hi", max_tokens=3, stream=True)
        assert "".join(chunk.choices[0].text for chunk in answer if chunk.choices)
        assert http.get(f"{tls_server.url}/v1/models").status_code == 401, "a certificate is not a key"


def test_without_a_client_certificate_nothing_answers(tls_server: ServerProcess, certificates: Path) -> None:
    context = trusting(certificates, identified=False)
    with pytest.raises((httpx.TransportError, ssl.SSLError)), httpx.Client(verify=context) as http:
        http.get(f"{tls_server.url}/health")


def test_the_servers_certificate_is_checked_and_plain_http_is_not_spoken(tls_server: ServerProcess) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{tls_server.url}/health")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{tls_server.url}/health".replace("https", "http"))


def test_old_protocols_are_not_spoken(tls_server: ServerProcess, certificates: Path) -> None:
    context = trusting(certificates, identified=True)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    port = int(tls_server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(
            plain, server_hostname="127.0.0.1") as spoken:
        assert spoken.version() == "TLSv1.2"
    answer = _hello_of_tls_1_0(port)
    assert answer[:1] == b"\x15" or answer == b"", "an alert, or nothing"


def _hello_of_tls_1_0(port: int) -> bytes:
    """A TLS 1.0 ClientHello by hand: client libraries no longer make one."""
    body = b"\x03\x01" + bytes(32) + b"\x00" + b"\x00\x04\xc0\x14\x00\x2f" + b"\x01\x00"
    hello = b"\x01" + len(body).to_bytes(3, "big") + body
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"\x16\x03\x01" + len(hello).to_bytes(2, "big") + hello)
        return connection.recv(100)


def test_handshakes_that_do_not_end_keep_nobody_out(tls_server: ServerProcess, certificates: Path) -> None:
    """More of them than there are places: the oldest goes, those who ask are answered, the rest ends in time."""
    address = ("127.0.0.1", int(tls_server.url.rpartition(":")[2]))
    with httpx.Client(verify=trusting(certificates, identified=True)) as http:
        silent = []
        for index in range(100):
            silent.append(socket.create_connection(address, timeout=10))
            silent[-1].sendall(b"\x16\x03\x01\x02\x00\x01" if index % 2 else b"")
            if index % 10 == 9:
                assert http.get(f"{tls_server.url}/health").status_code == 200
        assert all(connection.recv(1) == b"" for connection in silent)
        assert http.get(f"{tls_server.url}/health").status_code == 200
        for connection in silent:
            connection.close()


@pytest.mark.parametrize(("settings", "says"), [
    ({"ssl_keyfile": "x"}, "need ssl_certfile"), ({"ssl_ca_certs": "x"}, "need ssl_certfile"),
    ({"ssl_certfile": "none.pem"}, "there is no file none.pem"), ({"ssl_certfile": "ca.key"}, "cannot be used"),
    ({"ssl_certfile": "server.pem", "ssl_keyfile": "client.key"}, "cannot be used"),
    ({"ssl_certfile": "server.pem", "ssl_keyfile": "server.key", "ssl_ca_certs": "client.key"}, "cannot be used"),
])
def test_files_that_cannot_be_used_are_said_at_once(certificates: Path, monkeypatch: pytest.MonkeyPatch,
                                                    settings: dict[str, str], says: str) -> None:
    monkeypatch.chdir(certificates)
    with pytest.raises(ConfigError, match=says):
        tls_context(HttpSettings(**settings))
    assert tls_context(HttpSettings()) is None


# --- CORS

SITE = "https://app.example"


@pytest.fixture(scope="module")
def server_of_a_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("site") / "log.txt", "--api-key", "k", "--cors-origin", SITE,
                       key="k") as server:
        yield server


def test_a_named_site_may_call(server_of_a_site: ServerProcess) -> None:
    url = server_of_a_site.url
    asked = {"Origin": SITE, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = httpx.options(f"{url}/v1/completions", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == SITE
    refused = httpx.get(f"{url}/v1/models", headers={"Origin": SITE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, SITE)
    other = httpx.options(f"{url}/v1/completions", headers={**asked, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-credentials" not in preflight.headers


STAINLESS = [f"x-stainless-{name}" for name in ("arch", "lang", "os", "package-version", "retry-count", "runtime",
                                                "runtime-version", "timeout", "helper-method", "poll-helper")]


@pytest.mark.parametrize(("method", "path", "headers"), [
    ("POST", "/v1/chat/completions", ["authorization", "content-type", "openai-organization", "openai-project",
                                      "idempotency-key", "x-request-id", *STAINLESS]),
    ("POST", "/v1/messages", ["anthropic-beta", "anthropic-dangerous-direct-browser-access", "anthropic-version",
                              "content-type", "x-api-key", *STAINLESS]),
    ("DELETE", "/v1/responses/resp_1", ["authorization", *STAINLESS]), ("GET", "/v1/models", STAINLESS),
], ids=["openai", "anthropic", "delete", "get"])
def test_the_sdks_run_in_a_page_of_a_named_site(server_of_a_site: ServerProcess, method: str, path: str,
                                                headers: list[str]) -> None:
    """Their headers, which grow with every version (ollama#4388), and their methods."""
    asked = {"Origin": SITE, "Access-Control-Request-Method": method,
             "Access-Control-Request-Headers": ",".join(headers)}
    answer = httpx.options(f"{server_of_a_site.url}{path}", headers=asked)
    assert answer.status_code == 200, answer.text
    allowed = {name.strip() for name in answer.headers["access-control-allow-headers"].split(",")}
    assert allowed == set(headers) and method in answer.headers["access-control-allow-methods"]
    stranger = httpx.options(f"{server_of_a_site.url}{path}", headers={**asked, "Origin": "https://evil.example"})
    assert stranger.status_code == 400 and "access-control-allow-origin" not in stranger.headers
    shown = httpx.get(f"{server_of_a_site.url}/health", headers={"Origin": SITE}).headers
    assert "retry-after" in shown["access-control-expose-headers"]


def test_every_site_is_no_site() -> None:
    from serving.config import ServerConfig

    with pytest.raises(ConfigError, match="cors_origin"):
        ServerConfig(http=HttpSettings(cors_origin=("*",)))
