"""What a client asks of a gate about KV from other instances: what it gets, and what senseless frames cost."""

from __future__ import annotations

import copy
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TypeVar

import pytest

from tests.llm.conftest import SETTINGS
from tests.llm.gated import KEYS, GatedClient, RawPeer, WatchedLocal, gated_client
from tests.llm.test_clients import idle, make_request, read
from tests.llm.test_disaggregation import CONFIG, LONG, num_reserved
from tests.llm.test_remote import until
from xllm.client.gate_wire import GATE_REPORTS, encode_up
from xllm.client.remote import RemoteClient
from xllm.config import EngineConfig
from xllm.engine.commands import Abort, Depart, Expect, Expected, Submit, Unexpect
from xllm.engine.core import EngineCore
from xllm.errors import RequestError
from xllm.kv_layout import FieldLayout, KVLayout, LayerRun
from xllm.kv_offer import NOTHING_MISSING, KVOffer, RankWindow
from xllm.request import FinishReason, Request

T = TypeVar("T")
RUN = LayerRun(num_layers=2, layer_bytes=64, fields=(FieldLayout(
    offset=0, head_stride=4, position_stride=4, number_stride=4, width=1, item_bytes=4, num_heads=1, total_heads=1),))
WINDOW = RankWindow(addresses=("tcp://127.0.0.1:9/1",), block_bytes=128,
                    layout=KVLayout(format="fp32.1", block_size=16, runs=(RUN,)))
OFFER = KVOffer(number=1, key=b"k" * 16, first_block=0, slots=(1, 2), lease_s=30.0, windows=(WINDOW,))


@pytest.fixture
async def client() -> AsyncIterator[GatedClient]:
    """Of an engine that sends KV and takes it."""
    engine = WatchedLocal(EngineCore(CONFIG))
    async with gated_client(engine) as connected:
        yield connected
    engine.shutdown()


@pytest.fixture
async def plain() -> AsyncIterator[GatedClient]:
    """Of an engine without enable_disagg_pd."""
    engine = WatchedLocal(EngineCore(EngineConfig.from_flat(**SETTINGS)))
    async with gated_client(engine) as connected:
        yield connected
    engine.shutdown()


def ask(name: str, max_tokens: int = 8, **fields) -> Request:
    """Its prompt is long enough for KV to be sent."""
    return replace(make_request(name, max_tokens), **{"prompt_token_ids": LONG, **fields})


def reserved(client: GatedClient) -> int:
    return num_reserved(client.engine._core)


async def test_an_offer_and_its_end(client: GatedClient) -> None:
    found = await client.expect(ask("a"), 60.0)
    assert found.offer is not None and found.landing == found.offer.number and not found.reason
    assert len(found.offer.slots) == len(LONG) // 16 and found.offer.block_size == 16 and reserved(client)
    client.unexpect(found.landing)
    await until(lambda: not reserved(client))
    short = await client.expect(ask("b", prompt_token_ids=LONG[:15]), 60.0)
    assert (short.offer, short.reason) == (None, NOTHING_MISSING)
    large = await client.expect(ask("c", prompt_token_ids=LONG * 100), 60.0)
    assert large.offer is None and large.reason.startswith("there is no room for")


async def test_an_instance_without_disaggregation_says_so(plain: GatedClient) -> None:
    found = await plain.expect(make_request("a"), 60.0)
    assert (found.offer, found.reason) == (None, "this engine takes no KV: it runs without enable_disagg_pd")
    with pytest.raises(RequestError, match="this engine sends no KV: it runs without enable_disagg_pd") as caught:
        await plain.submit([replace(make_request("b"), offer=OFFER)]).admitted()
    assert caught.value.field == "offer"
    stream = plain.submit([make_request("c", 60)])
    plain.depart("c", OFFER)  # it stays
    plain.unexpect(1)
    deltas = await read(stream)
    assert deltas[-1].finish_reason is FinishReason.LENGTH and sum(len(delta.token_ids) for delta in deltas) == 60
    assert len(await read(plain.submit([replace(make_request("d"), landing=1)]))) == 8


async def test_a_draining_instance_expects_nothing_and_still_gives_room_back(client: GatedClient) -> None:
    found = await client.expect(ask("a"), 60.0)
    client.gate.drain()
    refused = await client.expect(ask("b"), 60.0)
    assert (refused.offer, refused.reason) == (None, "it is shutting down")
    client.unexpect(found.landing)
    await until(lambda: not reserved(client))


async def test_room_that_a_client_asked_for_who_is_gone(client: GatedClient) -> None:
    """Only its own room: that of others is not its affair, nor may it use that."""
    found = await client.expect(ask("x"), 60.0)
    assert found.offer is not None and reserved(client)
    other = RemoteClient(client.address, KEYS)
    await other.connect()
    other.unexpect(found.landing)
    await read(other.submit([replace(make_request("y"), landing=found.landing)]))
    assert reserved(client)
    other.close()
    await until(lambda: len(client.gate._sessions) == 1)
    assert reserved(client)
    client.close()
    await until(lambda: not reserved(client))


async def test_a_request_that_is_refused_frees_its_room(client: GatedClient) -> None:
    for name, wrong in (("a", {"prompt_token_ids": (*LONG, 10**6)}), ("b", {"tenant_weight": 1e9})):
        found = await client.expect(ask(name), 60.0)
        assert found.offer is not None
        with pytest.raises(RequestError):
            await client.submit([replace(make_request(name), landing=found.landing, **wrong)]).admitted()
        await until(lambda: not reserved(client))


async def test_questions_that_make_no_sense_are_answered(client: GatedClient) -> None:
    peer = RawPeer(client.address)
    await peer.greet()
    asked = [(ask("a"), lease_s, "lease_s must be in") for lease_s in (0.0, -1.0, float("nan"), float("inf"), 1e9)]
    asked += [(ask("a", **fields), 1.0, why) for fields, why in (
        ({"tenant_weight": 1e9}, "tenant_weight must be in"), ({"arrival_s": float("nan")}, "arrival_s must be finite"),
        ({"lora": "nobody"}, "nobody"), ({"generated_token_ids": (2**40,)}, "generated_token_ids must be in"),
        ({"generated_token_ids": (-1,)}, "generated_token_ids must be in"),
        ({"prompt_token_ids": (10**6,) * 40}, "prompt: token ids must be in"))]
    for number, (request, lease_s, why) in enumerate(asked):
        peer.send(encode_up(Expect(number, request, lease_s)))
        answer = Expected(-1)
        while answer.number != number:
            report = GATE_REPORTS.decode((await peer.read())[:-4])
            answer = report if isinstance(report, Expected) else answer
        assert answer.offer is None and why in answer.reason, (why, answer)
    peer.close()
    assert not reserved(client) and len(await read(client.submit([make_request("own")]))) == 8


def forged(value: T, **fields: object) -> T:
    """What another program may send, and this one does not make."""
    made = copy.copy(value)
    for name, found in fields.items():
        object.__setattr__(made, name, found)
    return made


def of_blocks(size: int) -> RankWindow:
    return forged(WINDOW, layout=replace(WINDOW.layout, block_size=size))


BAD_OFFERS = {"no window": {"windows": ()}, "number": {"number": -1}, "first block": {"first_block": -1},
              "slot": {"slots": (-1,)}, "large slot": {"slots": (2**40,)}, "no key": {"key": b""},
              "no size": {"windows": (of_blocks(0),)}, "two sizes": {"windows": (of_blocks(16), of_blocks(32))},
              "no bytes": {"windows": (forged(WINDOW, block_bytes=-1),)}}


@pytest.mark.parametrize("wrong", BAD_OFFERS)
async def test_an_offer_that_makes_no_sense_costs_its_sender_alone(client: GatedClient, wrong: str) -> None:
    offer = forged(OFFER, **BAD_OFFERS[wrong])
    for command in (Depart("a", offer), Submit([replace(make_request("a"), offer=offer)])):
        peer = RawPeer(client.address)
        await peer.greet()
        peer.send(encode_up(Submit([make_request("a", 300)])))
        peer.send(encode_up(command))
        assert "cannot be read" in await peer.farewell()
        peer.close()
    await idle(client.engine)
    assert len(await read(client.submit([make_request("own")]))) == 8


@pytest.mark.parametrize("layout", [replace(WINDOW.layout, format="junk.7"), WINDOW.layout,
                                    replace(WINDOW.layout, runs=()), replace(WINDOW.layout, rank=7)],
                         ids=["format", "layers", "no layers", "rank"])
async def test_kv_that_is_wanted_nowhere_or_as_nobody_has_it_stays(client: GatedClient, layout: KVLayout) -> None:
    offer = replace(OFFER, windows=(replace(WINDOW, layout=layout),))
    request = ask("a", 30)
    for stream in (client.submit([replace(request, offer=offer)]), client.submit([replace(request, request_id="b")])):
        client.depart("b", offer)
        deltas = await read(stream)
        assert deltas[-1].finish_reason is FinishReason.LENGTH
        assert sum(len(delta.token_ids) for delta in deltas) == 30


async def test_mutated_frames(client: GatedClient) -> None:
    """Whatever they say, the engine lives, others are served, and no room stays taken."""
    draw = random.Random(5)
    frames = [encode_up(command) for command in (
        Expect(1, ask("a"), 30.0), Unexpect(1), Depart("a", OFFER), Abort(["a"]),
        Submit([replace(make_request("a", 3), landing=1)]), Submit([replace(make_request("a", 3), offer=OFFER)]))]
    for _ in range(12):
        peers = [RawPeer(client.address) for _ in range(10)]
        for peer in peers:
            await peer.greet()
            for _ in range(3):
                frame = bytearray(draw.choice(frames))
                for _ in range(draw.randint(0, 3)):
                    frame[draw.randrange(len(frame))] = draw.randrange(256)
                peer.send(bytes(frame))
        assert len(await read(client.submit([make_request("own")]))) == 8
        for peer in peers:
            peer.close()
    assert client.is_up
    await until(lambda: len(client.gate._sessions) == 1)
    await idle(client.engine)
    await until(lambda: not reserved(client))
