"""Users, passwords and certificates of etcd; what is wrong is named. And its package, which protobuf has outgrown."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.cluster import registration
from serving.cluster.etcd_link import open_etcd
from serving.cluster.etcd_settings import EtcdSettings
from serving.cluster.registration import start_store
from serving.cluster.store_errors import StoreError, StoreRefusedError, StoreUnreachableError
from tests.certificates import make_certificates
from tests.cluster.etcd_process import EtcdProcess
from tests.cluster.test_contract import following, told
from tests.cluster.test_store_faults import until_up
from tests.serving.server_process import ROOT
from xllm.errors import ConfigError


@pytest.fixture
def guarded(etcd: EtcdProcess) -> EtcdProcess:
    """With authentication: root, and `xllm`, who may use what is behind `XLLM/`."""
    etcd.flags = ("--auth-token", "simple", "--auth-token-ttl", "2")
    etcd.start()
    for words in (("user", "add", "root:top"), ("user", "grant-role", "root", "root"), ("user", "add", "xllm:sesame"),
                  ("role", "add", "cluster"), ("role", "grant-permission", "cluster", "--prefix=true", "readwrite",
                                               "XLLM/"), ("user", "grant-role", "xllm", "cluster"), ("auth", "enable")):
        etcd.ctl(*words)
    return etcd


async def test_users_and_passwords(guarded, shared_etcd):
    def settings(user: str | None, password: str | None, etcd: EtcdProcess = guarded) -> EtcdSettings:
        return EtcdSettings(addresses=(etcd.address,), user=user, password=password)

    where = rf"etcd at {guarded.address}: "
    for wrong, words in ((settings("xllm", "guess"), "user 'xllm': wrong user or password"),
                         (settings("nobody", "sesame"), "user 'nobody': wrong user or password"),
                         (settings(None, None), "it has authentication enabled, and no user and password were given")):
        with pytest.raises(StoreRefusedError, match=where + words) as caught:
            await open_etcd(wrong, namespace=b"XLLM/").start(wait_s=30)  # no use to wait for that
        assert "guess" not in str(caught.value)
    with pytest.raises(StoreRefusedError, match=where + "the user has no permission for these keys"):
        await open_etcd(settings("xllm", "sesame"), namespace=b"OTHER/").start()
    with pytest.raises(StoreRefusedError, match="user 'xllm': a user was given, but authentication is not enabled"):
        await open_etcd(settings("xllm", "sesame", shared_etcd)).start()
    async with open_etcd(settings("xllm", "sesame"), namespace=b"XLLM/") as store, store.watch(b"") as watch:
        lease = await store.grant(5)
        await store.put(b"a", b"1", lease)
        assert told(await following(watch)) == [(b"a", b"1")]
        guarded.kill()  # tokens do not survive it
        guarded.start()
        await until_up(store)
        await store.put(b"a", b"2", lease)
        assert told(await following(watch)) == [(b"a", b"2")] and lease.is_alive
        guarded.ctl("--user", "root:top", "user", "passwd", "xllm", "--interactive=false", text="changed\n")
        with pytest.raises(StoreRefusedError, match="user 'xllm': wrong user or password"):
            await store.put(b"a", b"3")
        assert "wrong user or password" in str(store.state)


async def test_an_instance_without_a_password_is_refused_at_once(guarded):
    begun_s = time.monotonic()
    with pytest.raises(StoreRefusedError, match="it has authentication enabled, and no user and password were given"):
        await start_store(open_etcd(guarded.settings))
    assert time.monotonic() - begun_s < 3.0


async def test_an_instance_waits_for_the_store_and_says_so(etcd, monkeypatch, caplog):
    monkeypatch.setattr(registration, "_TELL_S", 0.2)
    starting = asyncio.create_task(start_store(store := open_etcd(etcd.settings)))
    await asyncio.sleep(0.6)
    assert any(re.search(rf"etcd at {etcd.address}: .*; it is tried for \d\d s more", record.message)
               for record in caplog.records)
    etcd.start()
    await asyncio.wait_for(starting, 5)
    await store.close()
    etcd.kill()
    with pytest.raises(StoreUnreachableError):
        await start_store(open_etcd(etcd.settings), 0.1)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def tls_etcd(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdProcess]:
    """Lets in clients with a certificate of the authority only."""
    etcd = EtcdProcess(tmp_path_factory.mktemp("etcd"), "--cert-file", str(certificates / "server.pem"), "--key-file",
                       str(certificates / "server.key"), "--client-cert-auth", "--trusted-ca-file",
                       str(certificates / "ca.pem"), scheme="https")
    try:
        yield etcd.start()
    finally:
        etcd.kill()


async def test_certificates(tls_etcd, certificates, shared_etcd, tmp_path):
    ca, own = certificates / "ca.pem", {"cert": certificates / "client.pem", "key": certificates / "client.key"}
    async with open_etcd(EtcdSettings(addresses=(tls_etcd.url,), ca_cert=ca, **own)) as store:
        await store.put(b"a", b"1")
        assert (await store.get(b"a")).value == b"1"
    strangers = make_certificates(tmp_path)
    stranger = {"cert": strangers / "client.pem", "key": strangers / "client.key"}
    for settings in (EtcdSettings(addresses=(tls_etcd.url,), ca_cert=ca),  # without a certificate
                     EtcdSettings(addresses=(tls_etcd.url,), ca_cert=ca, **stranger),
                     EtcdSettings(addresses=(tls_etcd.url,), ca_cert=strangers / "ca.pem", **own),
                     EtcdSettings(addresses=(tls_etcd.url,), **own),  # the system's authorities do not know it
                     EtcdSettings(addresses=(shared_etcd.address,), ca_cert=ca, **own)):  # no TLS there
        with pytest.raises(StoreError, match=rf"etcd at {settings.targets[0]}: TLS failed: "):
            await open_etcd(settings).start()
    with pytest.raises(StoreError, match=rf"etcd at {tls_etcd.address}: no connection: .*is it https:// there"):
        await open_etcd(EtcdSettings(addresses=(tls_etcd.address,))).start()
    (tmp_path / "client.key").chmod(0o644)
    with pytest.raises(ConfigError, match=r"etcd's client key .*client.key has mode 0644"):
        open_etcd(EtcdSettings(addresses=(tls_etcd.url,), ca_cert=ca, **stranger))
    with pytest.raises(ConfigError, match=r"etcd's CA certificate .*none.pem cannot be read: No such file"):
        open_etcd(EtcdSettings(addresses=(tls_etcd.url,), ca_cert=tmp_path / "none.pem"))


@pytest.mark.parametrize(("settings", "words"), [
    ({"addresses": ()}, "needs an address"),
    ({"addresses": ("127.0.0.1:99999",)}, "'127.0.0.1:99999' is no address"),
    ({"addresses": ("ftp://host:1",)}, "is no address"),
    ({"addresses": ("http://user:secret@host:1",)}, "is no address"),
    ({"addresses": ("a:1",), "user": "x"}, "a user and a password are given together"),
    ({"addresses": ("a:1",), "cert": Path("x")}, "certificate and its key are given together"),
    ({"addresses": ("https://a:1", "http://b:1")}, "none may begin with http://"),
    ({"addresses": ("http://a:1",), "ca_cert": Path("x")}, "none may begin with http://"),
])
def test_settings_that_cannot_work(settings, words):
    with pytest.raises(ConfigError, match=words):
        EtcdSettings(**settings)


async def test_a_password_in_clear_text_is_warned_of(caplog):
    for address, is_warned in (("127.0.0.1:1", False), ("https://192.0.2.1:1", False), ("192.0.2.1:1", True)):
        await open_etcd(EtcdSettings(addresses=(address,), user="x", password="secret")).close()
        assert ("etcd at 192.0.2.1:1: the password goes over the network in clear text" in caplog.text) == is_warned
    assert "secret" not in caplog.text


def test_settings():
    several = EtcdSettings(addresses=("a", "b:1", "[::1]:2/"), user="x", password="secret")
    assert several.targets == ("a:2379", "b:1", "[::1]:2") and not several.has_tls and "secret" not in repr(several)
    assert several.exposes_password
    for safe in ("127.0.0.1:1", "localhost", "[::1]:2", "https://a:1"):
        assert not EtcdSettings(addresses=(safe,), user="x", password="y").exposes_password


def in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_packages_own_modules_are_replaced_and_what_is_missing_is_named():
    assert in_new_process("from serving.cluster.etcd_rpc import etcd_rpc; rpc = etcd_rpc(); "
                          "print(rpc.PutRequest(key=b'k').SerializeToString(), etcd_rpc() is rpc)"
                          ) == "b'\\n\\x01k' True\n"
    said = in_new_process("""
import sys
from serving.cluster.etcd_rpc import etcd_rpc
for module in ("grpc", "etcd3", "google.protobuf"):
    sys.modules[module] = None
    try:
        etcd_rpc()
    except ValueError as error:
        print(type(error).__name__, error)
    del sys.modules[module]
""").splitlines()
    words = "ConfigError etcd needs the extra 'etcd': pip install 'xllm-engine[etcd]' ("
    assert len(said) == 3 and all(line.startswith(words) for line in said), said
