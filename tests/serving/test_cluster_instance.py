"""A real `xllm serve` process as an instance of a cluster, and what its faults look like to a remote client."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from serving.commands.cluster_plan import advertised_host, cluster_plan, etcd_settings, namespace_of
from serving.config import ClusterSettings, ServerConfig
from serving.security.cluster_secret import own_secret, read_cluster_keys
from tests.llm.conftest import SETTINGS
from tests.llm.test_clients import make_request, read
from tests.serving.server_process import ROOT, ServerProcess
from xllm import LLM
from xllm.client.cluster_keys import cluster_keys
from xllm.client.engine_client import EngineBusyError
from xllm.client.remote import RemoteClient
from xllm.engine.commands import CacheChanges
from xllm.errors import ConfigError, EngineDeadError
from xllm.kv.block import DIGEST_BYTES
from xllm.request import Request, SamplingParams

SECRET = "the secret of a test's cluster"


async def connected(client: RemoteClient, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not client.is_up:
        try:
            await client.connect()
        except EngineDeadError:
            assert time.monotonic() < deadline_s, client.dead_reason
            await asyncio.sleep(0.1)


async def lost(client: RemoteClient, timeout_s: float = 6.0) -> str:
    """Why the client lost its instance; an open request ends with that reason."""
    stream = client.submit([make_request("long", 450)])
    with pytest.raises(EngineDeadError) as caught:
        await asyncio.wait_for(read(stream), timeout_s)
    assert str(caught.value) == client.dead_reason
    return str(caught.value)


async def stopped(client: RemoteClient, pid: int) -> str:
    """As `lost`, while a process is stopped."""
    os.kill(pid, signal.SIGSTOP)
    try:
        return await lost(client)
    finally:
        os.kill(pid, signal.SIGCONT)


def take_in(cached: set[bytes], changes: CacheChanges) -> None:
    for joined, note in ((changes.removed, cached.discard), (changes.stored, cached.add)):
        for at in range(0, len(joined), DIGEST_BYTES):
            note(joined[at:at + DIGEST_BYTES])


async def test_the_life_of_an_instance(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET + "\n")
    secret.chmod(0o600)
    with ServerProcess(tmp_path / "log.txt", "--cluster-listen", "127.0.0.1:0", "--cluster-secret-file", str(secret),
                       "--dtype", "float32") as server:
        found = re.search(r"answers the cluster at (\S+:\d+)", server.log)
        assert found is not None
        listening = [connection.laddr.ip for pid in (server.process.pid, server.engine_pid)
                     for connection in psutil.Process(pid).net_connections("inet")
                     if connection.status == psutil.CONN_LISTEN]
        assert listening == ["127.0.0.1", "127.0.0.1"], "HTTP and the gate"
        client = RemoteClient(found[1], cluster_keys(SECRET.encode()), name="a test", silence_s=2.0, progress_s=2.5)
        own, later = set[bytes](), set[bytes]()
        client.on_cache_changes = lambda changes: take_in(own, changes)
        await client.connect()
        assert client.model is not None and client.model.names == ("demo",) and client.facts is not None

        # It answers as an engine here does.
        sampling = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        prompt = list(range(5, 105))
        deltas = await read(client.submit([Request(request_id="a", prompt_token_ids=prompt, sampling=sampling)]))
        with LLM(**SETTINGS) as llm:
            (expected,) = llm.generate([prompt], sampling, use_tqdm=False)
        assert [t for delta in deltas for t in delta.token_ids] == expected.outputs[0].token_ids
        second = RemoteClient(found[1], cluster_keys(SECRET.encode()))
        second.on_cache_changes = lambda changes: take_in(later, changes)
        await second.connect()
        for one in (client, second):
            await one.control("state")
        assert own == later and len(own) == 7, "who comes later is told what there is; 119 tokens fill 7 blocks"
        await second.control("reset_prefix_cache")
        await client.control("state")
        assert own == later == set()
        await asyncio.sleep(1.0)
        assert client.stats.num_steps >= 20 and client.silent_for_s() < 2.5
        assert sum(client.steps.time_s.counts) >= 20
        second.close()

        # Its engine's process is stopped behind a front that lives; then the front.
        incarnation = client.incarnation
        assert re.fullmatch(r"its engine has made no progress for \d\.\d s", await stopped(client, server.engine_pid))
        await asyncio.sleep(0.5)  # it goes on
        await client.connect(incarnation=incarnation)
        assert re.fullmatch(r"no sign of life for \d\.\d s", await stopped(client, server.process.pid))
        await connected(client)
        assert client.incarnation == incarnation

        # Its engine is killed: another one is started, which is another incarnation.
        asyncio.get_running_loop().call_later(0.1, os.kill, server.engine_pid, signal.SIGKILL)
        assert "its engine stopped: the engine process was killed by signal 9" in await lost(client)
        own.clear()
        await connected(client)
        assert client.incarnation != incarnation
        assert len(await read(client.submit([make_request("b")]))) == 8

        # It is told to end: what is open goes on, nothing more is taken.
        stream = client.submit([make_request("c", 300)])
        await stream.next()
        server.process.send_signal(signal.SIGTERM)
        while not client.draining:
            await asyncio.sleep(0.02)
        with pytest.raises(EngineBusyError, match="shutting down"):
            await client.submit([make_request("d")]).admitted()
        assert (await read(stream))[-1].finish_reason == "length"
        while client.dead_reason is None:
            await asyncio.sleep(0.02)
        assert client.dead_reason == "the instance was shut down"
        assert await asyncio.to_thread(server.process.wait, 15) == 0
        with pytest.raises(EngineDeadError, match="connection refused"):
            await client.connect()
        assert SECRET not in server.log
        client.close()


async def test_an_instance_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_CLUSTER_SECRET", SECRET)
    with ServerProcess(tmp_path / "log.txt", "--cluster-listen", "127.0.0.1:0") as server:
        found = re.search(r"answers the cluster at (\S+:\d+)", server.log)
        assert found is not None
        assert "XLLM_CLUSTER_SECRET" not in psutil.Process(server.engine_pid).environ()
        client = RemoteClient(found[1], cluster_keys(SECRET.encode()))
        await client.connect()
        started_s = time.monotonic()
        asyncio.get_running_loop().call_later(0.1, server.process.kill)
        assert await lost(client) == "the connection was lost"
        assert time.monotonic() - started_s < 1.0


@pytest.mark.parametrize(("flags", "why"), [
    (("serve", "--cluster-listen", "0.0.0.0:0"), "cluster_listen needs the cluster's secret"),
    (("serve", "--cluster-listen", "127.0.0.1:0", "--cluster-secret-file", "/dev/null"), "16 bytes at least"),
    (("master", "--instances", "127.0.0.1:1,10.0.0.1:1"), "not all on this machine needs the cluster's secret"),
], ids=str)
def test_no_port_without_a_secret(flags: tuple[str, ...], why: str) -> None:
    """It fails closed; on the loopback alone a user's own secret will do."""
    done = subprocess.run([sys.executable, "-m", "serving.commands.cli", *flags, "--port", "0"], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and why in done.stderr


@pytest.mark.parametrize(("settings", "why"), [
    ({"cluster_secret_file": "/dev/null"}, "cluster_secret_file needs cluster_listen or etcd_addr"),
    *(({name: "x"}, f"{name} needs etcd_addr") for name in (
        "etcd_namespace", "etcd_user", "etcd_password_file", "etcd_ca_cert", "etcd_cert", "etcd_key", "instance_name")),
    ({"enable_service_routing": True}, "enable_service_routing needs etcd_addr"),
    ({"instance_role": "MIX"}, "instance_role MIX is for instances that register: it needs etcd_addr"),
    ({"instance_role": "ENCODE", "etcd_addr": "a:1"}, "instance_role ENCODE: .* not built yet"),
    ({"etcd_addr": "a:1", "etcd_cert": "x"}, "etcd_cert and etcd_key go together"),
    ({"instance_role": "BOTH", "etcd_addr": "a:1"},
     "instance_role must be one of DEFAULT, PREFILL, DECODE, MIX, got 'BOTH'"),
    *(({"cluster_listen": text}, "HOST:PORT") for text in ("9000", ":9000", "a:", "a:b", "a:65536", "::1:1", "[]:1")),
])
def test_settings_that_make_no_sense(settings: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        ServerConfig(cluster=ClusterSettings(**settings))
    ServerConfig(cluster=ClusterSettings(cluster_listen="[::1]:0"))


def test_the_file_of_the_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_cluster_keys(str(file))
    file.write_text(SECRET)
    for mode, warns in ((0o600, 0), (0o644, 1)):
        caplog.clear()
        file.chmod(mode)
        assert read_cluster_keys(str(file)) == cluster_keys(SECRET.encode())
        assert len(caplog.records) == warns
    file.chmod(file.stat().st_mode | stat.S_IWOTH)
    with pytest.raises(ConfigError, match="every user can change it"):
        read_cluster_keys(str(file))
    monkeypatch.delenv("XLLM_CLUSTER_SECRET", raising=False)
    with pytest.raises(ConfigError, match="needs the cluster's secret"):
        read_cluster_keys(None)
    monkeypatch.setenv("XLLM_CLUSTER_SECRET", "")
    with pytest.raises(ConfigError, match="16 bytes"):
        read_cluster_keys(None)
    with pytest.raises(ConfigError, match="16 bytes"):
        read_cluster_keys(None, is_local=True)


def test_the_secret_of_this_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLLM_CLUSTER_SECRET", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    # Whichever process is first makes it, the others read that one.
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: own_secret(), range(32)))
    folder = tmp_path / "config" / "xllm"
    file = folder / "cluster.secret"
    assert found == {file.read_bytes()} and len(file.read_bytes().strip()) == 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["cluster.secret"]
    assert read_cluster_keys(None, is_local=True) == cluster_keys(file.read_bytes())
    for path, mode, why in ((file, 0o644, "others can read or write it"), (file, 0o602, "others can read or write it"),
                            (folder, 0o777, "every user can plant files in it")):
        before = path.stat().st_mode
        path.chmod(mode)
        with pytest.raises(ConfigError, match=why):
            own_secret()
        path.chmod(before)
    if os.geteuid() == 0:
        os.chown(file, 4711, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(ConfigError, match=r"belongs to user \d+"):
        own_secret()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CONFIG_HOME", "/proc/nowhere")
    with pytest.raises(ConfigError, match=r"this user's own secret .* cannot be made"):
        own_secret()


def test_what_the_flags_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_CLUSTER_SECRET", SECRET)
    for name in ("ETCD_USERNAME", "ETCD_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    assert cluster_plan(ClusterSettings()) is None
    plan = cluster_plan(ClusterSettings(etcd_addr="localhost:1, [::1]:2", etcd_namespace="prod/", instance_role="MIX",
                                        enable_cache_upload=False, instance_name="a"))
    assert plan is not None and plan.etcd is not None and plan.etcd.targets == ("localhost:1", "[::1]:2")
    assert (plan.listen, plan.namespace, plan.role, plan.tells_cache, plan.name) == ("127.0.0.1:0", b"/prod/", 3, False,
                                                                                    "a")
    for text, namespace in (("", b""), ("/", b""), ("/a/b/", b"/a/b/"), ("a", b"/a/")):
        assert namespace_of(text) == namespace
    unused = cluster_plan(ClusterSettings(etcd_addr="10.0.0.9:1", enable_service_routing=False,
                                          cluster_listen="0.0.0.0:0"))
    assert unused is not None and unused.etcd is None
    with pytest.raises(ConfigError, match=r"etcd_addr 10\.0\.0\.9:1 is not on this machine's loopback: say by "
                                          "--cluster-listen HOST:PORT"):
        cluster_plan(ClusterSettings(etcd_addr="10.0.0.9:1"))
    with pytest.raises(ConfigError, match="instance_name: a name has"):
        cluster_plan(ClusterSettings(etcd_addr="localhost:1", instance_name=" a"))
    password = tmp_path / "password"
    password.write_text("sesame\n")
    password.chmod(0o600)
    given = ClusterSettings(etcd_addr="localhost:1", etcd_user="me", etcd_password_file=str(password))
    assert (etcd_settings(given).user, etcd_settings(given).password) == ("me", "sesame")
    monkeypatch.setenv("ETCD_USERNAME", "you")
    with pytest.raises(ConfigError, match="there is no password"):
        etcd_settings(ClusterSettings(etcd_addr="localhost:1"))
    monkeypatch.setenv("ETCD_PASSWORD", "open")
    found = etcd_settings(ClusterSettings(etcd_addr="localhost:1"))
    assert (found.user, found.password) == ("you", "open") and "open" not in repr(found)
    for host, advertised in (("10.0.0.1", "10.0.0.1"), ("a.example", "a.example"), ("0.0.0.0", "127.0.0.1"),
                             ("::1", "[::1]"), ("::", "127.0.0.1")):
        assert advertised_host(host, "127.0.0.1:2379") == advertised
