"""What every `EngineClient` promises, held against each of them: an engine in this process, in its own, behind a gate,
and as an instance of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.llm.conftest import SETTINGS
from tests.llm.gated import GatedClient, WatchedLocal, gated_client
from xllm import LLM
from xllm.client import process as process_client
from xllm.client.cluster import ClusterClient
from xllm.client.engine_client import EngineBusyError, EngineClient, RequestTimeoutError, Stream
from xllm.client.local import LocalClient
from xllm.client.process import ProcessClient
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.errors import EngineDeadError, RequestError
from xllm.request import FinishReason, OutputDelta, Request, SamplingParams
from xllm.routing import recovery

CONFIG = EngineConfig.from_flat(**SETTINGS, max_num_seqs=4, max_waiting_requests=4)
PROMPT = (5, 6, 7)


@pytest.fixture(params=["local", "process", "remote", "cluster"])
async def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EngineClient]:
    if request.param == "local":
        local = LocalClient(EngineCore(CONFIG))
        yield local
        local.shutdown()
    elif request.param == "remote":
        local = WatchedLocal(EngineCore(CONFIG))
        async with gated_client(local) as remote:
            yield remote
        local.shutdown()
    elif request.param == "cluster":
        monkeypatch.setattr(recovery, "MAX_WAIT_S", 0.0)
        local = WatchedLocal(EngineCore(CONFIG))
        async with gated_client(local) as remote:
            cluster = ClusterClient()
            cluster.join("only", remote)
            yield cluster
            await cluster.close()
        local.shutdown()
    else:
        process = ProcessClient(CONFIG)
        await process.start()
        yield process
        await process.shutdown()


def make_request(name: str, max_tokens: int = 8, **fields) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=1)
    return Request(request_id=name, prompt_token_ids=PROMPT, sampling=sampling, **fields)


async def read(stream: Stream) -> list[OutputDelta]:
    found = []
    while deltas := await asyncio.wait_for(stream.next(), 20):
        found += deltas
    return found


async def idle(client: EngineClient) -> None:
    for _ in range(500):
        if (await client.control("state")).state.num_open == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("still busy")


async def test_what_a_call_gets(client: EngineClient, llm) -> None:
    assert client.facts is not None
    assert (client.facts.vocab_size, client.facts.max_model_len) == (llm.facts.vocab_size, 512)
    assert (client.facts.num_blocks, client.adapters, client.sleep_level, client.dead_reason) == (256, (), 0, None)
    stream = client.submit([make_request("a"), make_request("b", 3)])
    news: dict[str, int] = {"a": 0, "b": 0}
    stream.listeners.append(lambda name, num_tokens: news.update({name: news[name] + num_tokens}))
    assert set(client.request_ids) == {"a", "b"}
    await stream.admitted()
    deltas = await read(stream)
    (expected,) = llm.generate([list(PROMPT)], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
                               use_tqdm=False)
    for name, num_tokens in (("a", 8), ("b", 3)):
        mine = [delta for delta in deltas if delta.request_id == name]
        assert [t for delta in mine for t in delta.token_ids] == expected.outputs[0].token_ids[:num_tokens]
        assert [entry.token_id for delta in mine for entry in delta.logprobs or ()] == \
            expected.outputs[0].token_ids[:num_tokens]
        assert [delta.finish_reason for delta in mine] == [None] * (len(mine) - 1) + [FinishReason.LENGTH]
    assert news == {"a": 8, "b": 3}
    assert set(stream.scheduled_s) == {"a", "b"}
    assert client.request_ids == ()


async def test_all_of_a_call_or_nothing(client: EngineClient) -> None:
    running = client.submit([make_request("x", 200)])
    with pytest.raises(RequestError, match="in use"):
        client.submit([make_request("x")])
    stream = client.submit([make_request("a"), make_request("b", lora="nobody")])
    with pytest.raises(RequestError, match="no adapter") as caught:
        await stream.admitted()
    assert caught.value.field == "lora"
    with pytest.raises(RequestError, match="no adapter"):
        await stream.next()
    with pytest.raises(EngineBusyError, match="queue is full"):
        await client.submit([make_request(str(n), 200) for n in range(10)]).admitted()
    assert client.request_ids == ("x",)
    running.close()
    await idle(client)


async def test_the_ways_to_an_early_end(client: EngineClient) -> None:
    aborted, closed = client.submit([make_request("a", 400)]), client.submit([make_request("b", 400)])
    late = client.submit([make_request("c", 400)])
    await aborted.next()
    client.abort(["a", "unknown"])
    assert (await read(aborted))[-1].finish_reason is FinishReason.ABORT
    while not closed._deltas:  # it may have begun later than the other
        await asyncio.sleep(0.001)
    closed.close()
    assert {delta.finish_reason for delta in await read(closed)} == {None}, "what had come, and no end"
    await late.admitted()
    late.expires_s = asyncio.get_running_loop().time()
    with pytest.raises(RequestTimeoutError):
        await read(late)
    late.fail(EngineBusyError("to make room"))
    with pytest.raises(EngineBusyError, match="to make room"):
        await read(late)
    assert client.request_ids == ()
    await idle(client)


async def test_control(client: EngineClient) -> None:
    assert (await client.control("pause", mode="keep")).state.paused == "keep"
    stream = client.submit([make_request("a")])
    await stream.admitted()
    assert (await client.control("state")).state.num_open == 1
    refused = await client.control("unload_adapter", name="nobody")
    assert (refused.field, refused.is_state) == ("lora_name", False)
    refused = await client.control("load_adapter", name="new", folder="/nowhere")
    assert refused.error is not None and "--enable-lora" in refused.error and refused.is_state
    assert (await client.control("resume")).state.paused is None
    assert sum(len(delta.token_ids) for delta in await read(stream)) == 8
    await client.control("sleep", level=1)
    assert client.sleep_level == 1
    assert (await client.control("wakeup")).error is None
    assert client.sleep_level == 0


async def test_its_end_reaches_everybody(client: EngineClient) -> None:
    stream = client.submit([make_request("a", 400)])
    await stream.next()
    if isinstance(client, LocalClient):
        await asyncio.to_thread(client.shutdown)
    elif isinstance(client, ProcessClient):
        client.end_process("it was shut down")
    elif isinstance(client, GatedClient):
        await asyncio.to_thread(client.engine.shutdown)
    elif isinstance(client, ClusterClient):
        (remote,) = client.members.up.values()
        assert isinstance(remote, GatedClient)
        await asyncio.to_thread(remote.engine.shutdown)
    with pytest.raises(EngineDeadError, match="it was shut down"):
        await read(stream)
    with pytest.raises(EngineDeadError, match="it was shut down"):
        client.submit([make_request("b")])
    with pytest.raises(EngineDeadError, match="it was shut down"):
        await client.control("state")
    why = client.restarting_after if isinstance(client, ClusterClient) else client.dead_reason  # others may join
    assert why is not None and "it was shut down" in why


async def test_the_end_of_a_process_waits_for_its_kv_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storing it may take longer than all else that the process does at its end."""
    flat = {**SETTINGS, "host_cache_size": "8MiB", "disk_cache_size": "64MiB", "disk_cache_dir": str(tmp_path)}
    monkeypatch.setattr(process_client, "SHUTDOWN_TIMEOUT_S", 0.3)
    with monkeypatch.context() as slow:
        slow.setenv("XLLM_FAILPOINTS", "tier.flush=1200ms")  # in the process: more than that for its only path
        client = ProcessClient(EngineConfig.from_flat(**flat))
        await client.start()
    await read(client.submit([make_request("a", 60)]))
    running = client._process
    assert running is not None
    await client.shutdown()
    assert running.returncode == 0, "it was killed before it had ended"
    with LLM(**flat) as again:
        assert again.stats().kv_tiers["disk"].num_used == 3, "every full block of 62 tokens"
