"""What is taken out between a gate and its client, and what would be said last and was not."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.llm.conftest import SETTINGS
from tests.llm.gated import GatedClient, WatchedLocal, gated_client
from tests.llm.test_clients import idle, make_request, read
from xllm.client.gate_wire import GATE_REPORTS, decode_up
from xllm.config import EngineConfig
from xllm.engine.commands import Outputs, Submit
from xllm.engine.core import EngineCore
from xllm.errors import EngineDeadError


@pytest.fixture
async def client() -> AsyncIterator[GatedClient]:
    engine = WatchedLocal(EngineCore(EngineConfig.from_flat(**SETTINGS)))
    async with gated_client(engine) as connected:
        yield connected
    engine.shutdown()


@pytest.mark.parametrize("side", ["client", "gate"])
async def test_a_frame_that_was_taken_out(client: GatedClient, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """zmq's CURVE does not tell of it: the reader would wait for ever, or get an answer with a hole."""
    port = client._port if side == "client" else client.gate._port
    send, taken = port.send, []

    def lose_one(*parts: bytes) -> None:
        kind = type(GATE_REPORTS.decode(parts[-1][:-4]) if side == "gate" else decode_up(parts[-1]))
        if not taken and kind in (Outputs, Submit):
            taken.append(kind)
        else:
            send(*parts)

    monkeypatch.setattr(port, "send", lose_one)
    with pytest.raises(EngineDeadError, match="frames that it sent have not come"):
        await read(client.submit([make_request("a")]))
    assert len(taken) == 1
    monkeypatch.undo()
    await client.connect()
    assert len(await read(client.submit([make_request("b")]))) == 8
    await idle(client.engine)


async def test_what_ends_a_call_behind_its_last_tokens_is_told(client: GatedClient) -> None:
    """In the same turn of the event loop: the engine that had it, one of several, dies as its tokens come."""
    stream = client.submit([make_request("a", 400)])
    await stream.admitted()
    (session,) = client.gate._sessions.values()
    (call,) = session._calls

    def hit(request_id: str, num_tokens: int) -> None:
        call.stream.listeners.clear()
        call.stream.fail(EngineDeadError("it was hit"))

    call.stream.listeners.append(hit)
    with pytest.raises(EngineDeadError, match="it was hit"):
        await read(stream)
    assert client.gate.num_open == 0 and client.is_up
    await idle(client.engine)
