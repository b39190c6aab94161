"""A remote client and an instance's gate: who is let in, and what a fault of either end costs the other one."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import get_args

import pytest
import zmq
import zmq.asyncio

from serving.cluster import engine_gate as gate_module
from serving.cluster.engine_gate import EngineGate
from serving.cluster.gate_session import ALLOWED
from tests.llm.conftest import SETTINGS
from tests.llm.gated import KEYS, MODEL, GatedClient, RawPeer, WatchedLocal, gate_of, gated_client
from tests.llm.test_clients import idle, make_request, read
from xllm.client import remote as remote_module
from xllm.client.cluster_keys import cluster_keys
from xllm.client.engine_client import EngineBusyError
from xllm.client.gate_wire import (
    HELLO,
    PROTOCOL,
    WELCOME,
    Alive,
    Condition,
    Hello,
    Welcome,
    encode_up,
    greeted,
    greeting,
)
from xllm.client.remote import RemoteClient
from xllm.config import EngineConfig
from xllm.engine.commands import Abort, Action, CacheChanges, Control, Shutdown, Submit
from xllm.engine.core import EngineCore
from xllm.errors import ConfigError, EngineDeadError
from xllm.request import Request
from xllm.stats import EngineStats

CONFIG = EngineConfig.from_flat(**SETTINGS, max_num_seqs=8)


@pytest.fixture
async def engine() -> AsyncIterator[WatchedLocal]:
    local = WatchedLocal(EngineCore(CONFIG))
    yield local
    local.shutdown()


@pytest.fixture
async def client(engine: WatchedLocal) -> AsyncIterator[GatedClient]:
    async with gated_client(engine) as connected:
        yield connected


async def until(condition, timeout_s: float = 5.0) -> float:
    """Wait for the condition; returns for how long."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < timeout_s
        await asyncio.sleep(0.01)
    return time.monotonic() - started_s


async def why_not(client: RemoteClient, **options: str) -> str:
    """Why it does not connect."""
    with pytest.raises(EngineDeadError) as caught:
        await client.connect(**options)
    assert str(caught.value) == client.dead_reason and not client.is_up
    with pytest.raises(EngineDeadError):
        client.submit([make_request("a")])
    return str(caught.value)


# --- who is let in


async def test_only_who_knows_the_secret_is_let_in(client: GatedClient) -> None:
    other = RemoteClient(client.address, cluster_keys(b"another secret, long enough"))
    assert "wrong cluster secret" in await why_not(other) and other.is_refused
    strangers = [RawPeer(client.address, None), RawPeer(client.address, cluster_keys(b"b" * 16))]
    half = zmq.asyncio.Context.instance().socket(zmq.DEALER)  # knows the instance's public key, not the client's secret
    public, secret = zmq.curve_keypair()
    half.curve_serverkey, half.curve_publickey, half.curve_secretkey = KEYS.instance_public, public, secret
    half.linger = 0
    half.connect(f"tcp://{client.address}")
    half.send(greeting(HELLO, Hello("half")))
    for stranger in strangers:
        stranger.send(greeting(HELLO, Hello("stranger")))
        with pytest.raises(asyncio.TimeoutError):
            await stranger.read(0.3)
        stranger.close()
    assert not await half.poll(300)
    half.close()
    with socket.create_connection(("127.0.0.1", client.gate.port)) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    assert len(await read(client.submit([make_request("a")]))) == 8, "whoever is in does not notice"
    assert client.gate._num_sessions == 1


@pytest.mark.parametrize("secret", [b"", b"  ", b"fifteen letters", b"  fifteen letters\n"])
def test_a_secret_that_can_be_guessed_is_refused(secret: bytes) -> None:
    with pytest.raises(ConfigError, match="16 bytes"):
        cluster_keys(secret)
    assert cluster_keys(b"sixteen letters!\n") == cluster_keys(b"sixteen letters!")
    assert "secret" not in repr(cluster_keys(b"sixteen letters!"))


async def test_two_protocols_say_so(client: GatedClient) -> None:
    peer = RawPeer(client.address)
    peer.send(b"H" + (PROTOCOL + 1).to_bytes(4, "big") + b"of the future")
    assert await peer.farewell() == f"speaks protocol {PROTOCOL}, this speaks {PROTOCOL + 1}"
    peer.close()
    gate = zmq.asyncio.Context.instance().socket(zmq.ROUTER)  # of the future
    gate.curve_server, gate.curve_secretkey, gate.linger = True, KEYS.instance_secret, 0
    port = gate.bind_to_random_port("tcp://127.0.0.1")
    late = RemoteClient(f"127.0.0.1:{port}", KEYS)
    connecting = asyncio.create_task(why_not(late))
    identity, _ = await gate.recv_multipart()
    await gate.send_multipart([identity, b"W" + (PROTOCOL + 1).to_bytes(4, "big") + b"of the future"])
    assert await connecting == f"speaks protocol {PROTOCOL + 1}, this speaks {PROTOCOL}"
    gate.close()


async def test_why_there_is_no_connection(engine: WatchedLocal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        assert await why_not(RemoteClient(address, KEYS)) == "no answer within 0.3 s"
    assert await why_not(RemoteClient(address, KEYS)) == "connection refused"
    for said, why in ((b"", "the connection was closed at once: no instance is behind what listens there"),
                      (b"220 ready\r\n", "what listens there is no instance of xLLM")):
        async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, said: bytes = said) -> None:
            writer.write(said)
            writer.close()

        async with await asyncio.start_server(meet, "127.0.0.1", 0) as other:
            stranger = RemoteClient(f"127.0.0.1:{other.sockets[0].getsockname()[1]}", KEYS)
            assert await why_not(stranger) == why and not stranger.is_refused
    assert "not known" in await why_not(RemoteClient("no.such.host.invalid:1", KEYS))
    with pytest.raises(ConfigError, match="HOST:PORT"):
        await RemoteClient("nowhere", KEYS).connect()
    async with gate_of(engine) as gate:
        gate._model = None  # it is still loading
        assert await why_not(RemoteClient(gate.address, KEYS)) == "its engine is not up: phase ready"
        gate.open(MODEL)
        client = RemoteClient(gate.address, KEYS)
        facts = await client.connect()
        assert (client.model, client.phase, client.is_up, facts) == (MODEL, "ready", True, engine.facts)
        assert await why_not(RemoteClient(gate.address, KEYS), incarnation="0") == \
            f"another incarnation answers: {client.incarnation}, not 0"
        monkeypatch.setattr(gate_module, "MAX_SESSIONS", 1)
        assert await why_not(RemoteClient(gate.address, KEYS)) == "has 1 clients already"
        client.close()
        await until(lambda: not gate._sessions)
        await client.connect(incarnation=client.incarnation)
        assert len(await read(client.submit([make_request("a")]))) == 8
        client.close()


# --- faults of a client


async def test_what_a_lost_client_had_is_aborted(client: GatedClient) -> None:
    """By its end: it says so, or the system does. What others have goes on."""
    engine, others = client.engine, client.submit([make_request("a", 300)])
    second, raw = RemoteClient(client.address, KEYS), RawPeer(client.address)
    await second.connect()
    await raw.greet()
    stream = second.submit([make_request("a", 400)])  # ids are each client's own
    raw.send(encode_up(Submit([make_request("a", 400)])))
    await stream.next()
    await until(lambda: len(engine.request_ids) == 3)
    raw.close()
    assert await until(lambda: len(engine.request_ids) == 2) < 1.0
    second.close()
    assert await until(lambda: len(engine.request_ids) == 1) < 1.0
    with pytest.raises(EngineDeadError, match="this client was closed"):
        await read(stream)
    assert sum(len(delta.token_ids) for delta in await read(others)) == 300
    await idle(engine)
    assert client.gate.num_dropped == {"left": 1, "lost": 1}


async def test_a_client_without_a_sign_of_life(client: GatedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped, or the network is cut: its connection stands."""
    monkeypatch.setattr(gate_module, "CLIENT_SILENCE_S", 1.0)
    peer = RawPeer(client.address)
    await peer.greet()
    peer.send(encode_up(Submit([make_request("a", 500)])))
    await until(lambda: len(client.engine.request_ids) == 1)
    await until(lambda: not client.engine.request_ids)
    assert "no sign of life for 1.5 s" in await peer.farewell()
    assert client.is_up and client.gate.num_dropped == {"silent": 1}
    peer.close()


async def test_a_client_that_does_not_read(client: GatedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives, and what it is sent waits for it: in no more memory than it may take."""
    monkeypatch.setattr(gate_module, "MAX_UNREAD_BYTES", 20_000)
    peer = RawPeer(client.address)
    await peer.greet()
    own = client.submit([make_request("own", 20)])
    peer.send(encode_up(Submit([make_request("a", 400)])))

    async def live() -> None:
        while True:
            peer.send(encode_up(Alive(1000, peer.num_sent_bytes)))
            await asyncio.sleep(0.1)

    living = asyncio.create_task(live())
    await until(lambda: client.gate.num_dropped["does not read"] == 1)
    assert "does not read what it is sent: 2" in await peer.farewell()
    living.cancel()
    assert sum(len(delta.token_ids) for delta in await read(own)) == 20
    await idle(client.engine)
    peer.close()


async def test_what_cannot_be_read_costs_its_sender_alone(client: GatedClient, caplog: pytest.LogCaptureFixture
                                                          ) -> None:
    good = encode_up(Submit([make_request("a")]))
    control = encode_up(Control(1, "state"))
    bad = [(b"",), (b"\xff",), (b"\xa0\x80",), (good[:-1],), (good[:20],), (good, good), (encode_up(Shutdown()),),
           (encode_up(Submit([])),), (control.replace(b"state", b"stale"),), (encode_up(Abort(["a"]))[:-1],),
           (b"\x00" + b"\x93" * 1000,), (b"\x01" + b"\x91" * 100_000,)]
    own = client.submit([make_request("own", 200)])
    for parts in bad:
        peer = RawPeer(client.address)
        await peer.greet()
        peer.send(*parts)
        assert "cannot be read" in await peer.farewell(), parts
        peer.send(good)  # it is not heard any more
        peer.close()
    peer = RawPeer(client.address)
    peer.send(greeting(HELLO, Hello("x"))[:-1])
    assert "cannot be read" in await peer.farewell()
    peer.close()
    assert sum(len(delta.token_ids) for delta in await read(own)) == 200
    assert client.gate.num_dropped == {"bad frame": len(bad)}
    assert sum("cannot be read" in record.message for record in caplog.records) == len(bad) + 1
    await idle(client.engine)


async def test_mutated_frames(client: GatedClient) -> None:
    """Whatever they say, requests end, the engine lives, and others are served."""
    draw = random.Random(18)
    frames = [encode_up(command) for command in (
        Submit([make_request("a", 3), make_request("b", 2, priority=3)]), Abort(["a"]), Control(7, "state"),
        Alive(5, 0))]
    peers = []
    for _ in range(150):
        frame = bytearray(draw.choice(frames))
        for _ in range(draw.randint(1, 4)):
            frame[draw.randrange(len(frame))] = draw.randrange(256)
        peer = RawPeer(client.address)
        peers.append(peer)
        await peer.greet()
        peer.send(bytes(frame))
        if len(peers) == 10:
            await asyncio.sleep(0.02)
            for peer in peers:
                peer.close()
            peers.clear()
    for peer in peers:
        peer.close()
    assert len(await read(client.submit([make_request("own")]))) == 8
    assert client.is_up
    await until(lambda: len(client.gate._sessions) == 1)
    await idle(client.engine)


# --- faults of an instance


async def test_silence_and_progress(client: GatedClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that hangs behind a gate that lives is seen; so is a gate that says nothing, however its socket is."""
    assert client.silent_for_s() < 1.0
    client.engine.silent_s = 7.0
    await until(lambda: client.silent_for_s() >= 7.0)
    assert client.is_up
    client._progress_s = 6.0
    await until(lambda: client.dead_reason is not None)
    assert client.dead_reason is not None and client.dead_reason.startswith("its engine has made no progress for 7")
    client.engine.silent_s = 0.0
    await client.connect()
    client._silence_s = 1.0
    stream = client.submit([make_request("a", 1)])
    await read(stream)
    monkeypatch.setattr(client.gate, "_post_all", lambda frame: None)
    await client.control("pause")
    stream = client.submit([make_request("b")])
    await stream.admitted()
    with pytest.raises(EngineDeadError, match="no sign of life for 1"):
        await read(stream)
    await client.engine.control("resume")


async def test_an_engine_that_dies_takes_its_incarnation_along(client: GatedClient) -> None:
    stream, first = client.submit([make_request("a", 400)]), client.incarnation
    lost: list[str] = []
    client.on_lost = lost.append
    await stream.next()
    client.engine._die("it was hit")
    with pytest.raises(EngineDeadError, match="its engine stopped: it was hit"):
        await read(stream)
    assert lost == [client.dead_reason] == ["its engine stopped: it was hit"]
    assert await why_not(client) == "its engine is not up: it was hit"
    client.engine.dead_reason = None  # as after a restart
    await client.connect()
    assert client.incarnation != first
    assert len(await read(client.submit([make_request("b")]))) == 8


async def test_draining(client: GatedClient) -> None:
    stream = client.submit([make_request("a", 100)])
    await stream.next()
    assert client.gate.num_open == 1
    client.gate.drain()
    await until(lambda: client.draining)
    assert not client.is_up
    with pytest.raises(EngineBusyError, match="it is shutting down"):
        await client.submit([make_request("b")]).admitted()
    await read(stream)
    assert client.gate.num_open == 0
    client.gate.close()
    await until(lambda: client.dead_reason == "the instance was shut down")


# --- what passes


async def test_times_are_on_the_clock_of_whoever_reads_them(engine: WatchedLocal, monkeypatch: pytest.MonkeyPatch
                                                            ) -> None:
    hour_s, clock = 3600.0, time.monotonic
    monkeypatch.setattr(gate_module, "time", SimpleNamespace(monotonic=lambda: clock() + hour_s, time=time.time))
    seen: list[Request] = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda requests: (seen.extend(requests), submit(requests))[1])
    async with gated_client(engine) as client:
        now_s = clock()
        stream = client.submit([make_request("a", 2, arrival_s=now_s, deadline_s=now_s + 5)])
        await read(stream)
        assert seen[0].arrival_s == pytest.approx(now_s + hour_s, abs=0.5)
        assert seen[0].deadline_s == pytest.approx(now_s + hour_s + 5, abs=0.5)
        assert stream.scheduled_s["a"] == pytest.approx(now_s - hour_s, abs=0.5), "the engine's own clock is ours here"


async def test_what_may_be_asked_of_the_engine_as_a_whole(client: GatedClient) -> None:
    assert set(ALLOWED) == set(get_args(Action)), "decide whether a client may do what is new"
    peer = client.gate._sessions.copy().popitem()[1]
    for folder, why in ((None, "--lora-folder is not set"), (client.gate._lora_folder, "--enable-lora")):
        peer._lora_folder = folder
        assert why in str((await client.control("load_adapter", name="x", folder="/nowhere")).error)
    peer._lora_folder = client.gate._lora_folder / "adapters"
    refused = await client.control("load_adapter", name="x", folder="/adapters/../etc")
    assert refused.error == "adapters are loaded from below --lora-folder only" and refused.is_state


async def test_weights_that_no_key_has(client: GatedClient) -> None:
    for weight in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(Exception, match="tenant_weight must be in"):
            await client.submit([make_request("a", tenant_weight=weight)]).admitted()


def test_a_welcome_is_whole() -> None:
    facts = EngineCore(CONFIG).facts
    welcome = Welcome("1f", 2.0, MODEL, facts, Condition(1.0, 0.5, EngineStats(num_running=3)), "DECODE")
    assert greeted(greeting(WELCOME, welcome), Welcome) == welcome


async def test_a_gate_that_does_not_tell_what_is_cached(engine: WatchedLocal) -> None:
    own, told = list[CacheChanges](), list[CacheChanges]()
    engine.on_cache_changes = own.append
    gate = EngineGate(engine, [engine], KEYS, tells_cache=False)
    gate.listen("127.0.0.1:0")
    gate.open(MODEL)
    client = RemoteClient(gate.address, KEYS)
    client.on_cache_changes = told.append
    await client.connect()
    engine.on_cache_changes(CacheChanges(tier=0, stored=bytes(16), removed=b""))
    await client.control("state")
    assert len(own) == 1 and not told
    client.close()
    gate.close()


async def test_a_gate_that_opens_in_the_turn_in_which_another_closes(engine: WatchedLocal) -> None:
    address = "127.0.0.1:0"
    for _ in range(4):  # the port and the descriptors are those of the last one
        async with gate_of(engine, address) as gate:
            client, address = RemoteClient(gate.address, KEYS), gate.address
            await client.connect()
            client.close()
