"""Parts of `xllm bench master`: its load against a real server, its instance without a model, and what it counts."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from serving.cluster.engine_gate import EngineGate
from serving.commands.bench.http_load import HttpLoad
from serving.commands.bench.master_bench import cpu_s
from serving.commands.bench.measured_master import CpuSampler
from serving.commands.bench.null_cluster import child_process, last_line
from serving.commands.bench.null_instance import NullCore, NullEngine, null_config, totals
from serving.commands.cli import main
from tests.llm.gated import KEYS, MODEL
from tests.serving.server_process import ServerProcess
from xllm import env
from xllm.client.remote import RemoteClient
from xllm.cost.cost_model import StepPrices
from xllm.engine.commands import CacheChanges
from xllm.errors import XllmError
from xllm.kv_offer import KVOffer
from xllm.request import FinishReason, OutputDelta, Request, SamplingParams
from xllm.token_ids import token_array


def chat(num_tokens: int, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": num_tokens, "ignore_eos": True,
            "stream": False, **more}


def test_the_load_reads_whole_answers_and_streams(server: ServerProcess) -> None:
    load = HttpLoad(server.url.removeprefix("http://"))
    streamed = chat(200, stream=True, stream_options={"include_usage": True})  # too long to be read at once
    answers = asyncio.run(load.ask([chat(3), chat(5), streamed, chat(1)], 2))
    assert sorted(answer.num_tokens for answer in answers) == [1, 3, 5, 200]
    assert len({answer.num_prompt_tokens for answer in answers}) == 1
    stream = next(answer for answer in answers if answer.num_tokens == 200)
    assert stream.num_writes > 1 and stream.first_s > 0
    with pytest.raises(XllmError, match="400"):
        asyncio.run(load.ask([chat(0)], 1))
    with pytest.raises(XllmError, match="does not answer"):
        asyncio.run(HttpLoad("127.0.0.1:9").ask([chat(1)], 1))


def test_completions_are_sent_when_they_are_due(server: ServerProcess) -> None:
    def body(num_tokens: int) -> dict[str, object]:
        return {"prompt": [5, 6, 7], "max_tokens": num_tokens, "ignore_eos": True, "stream": True,
                "stream_options": {"include_usage": True}}

    load, began_s = HttpLoad(server.url.removeprefix("http://")), time.monotonic()
    first, wrong, last = asyncio.run(load.ask_in_time("/v1/completions", [(0.0, body(9)), (0.1, body(-1)),
                                                                          (0.3, body(2))]))
    assert time.monotonic() - began_s > 0.3
    assert not isinstance(first, str) and (first.num_prompt_tokens, first.num_tokens) == (3, 9) and first.first_s > 0
    assert isinstance(wrong, str) and "400" in wrong
    assert not isinstance(last, str) and last.num_tokens == 2 and last.first_s < 0.3, "counted from when it was due"


def test_the_floor_answers_the_same_chats(tmp_path: Path) -> None:
    with child_process(["serving.commands.bench.bare_server", "1"], env.for_child(), tmp_path / "log") as server:
        load = HttpLoad(server.said(last_line).removeprefix("http://"))
        answers = asyncio.run(load.ask([chat(3), chat(20, stream=True, stream_options={"include_usage": True})], 1))
    assert [answer.num_tokens for answer in answers] == [3, 20]
    assert answers[1].first_s > 0 and server.process.returncode == 0


async def test_an_instance_without_a_model() -> None:
    core = NullCore(StepPrices(step=0.001, token=0.002, read=2e-5), null_config())
    engine = NullEngine(core)
    engine.bind()
    gate = EngineGate(engine, [engine], KEYS)
    gate.listen("127.0.0.1:0")
    gate.open(MODEL)
    client, stored = RemoteClient(gate.address, KEYS), list[CacheChanges]()
    client.on_cache_changes = stored.append
    await client.connect()
    stream = client.submit([Request(request_id="a", prompt_token_ids=token_array(range(5, 37)),
                                    sampling=SamplingParams(max_tokens=12, ignore_eos=True, seed=1))])
    began_s, tokens = time.monotonic(), list[int]()
    while deltas := await stream.next():
        tokens += [token for delta in deltas for token in delta.token_ids]
    took_s = time.monotonic() - began_s
    # 43 tokens, each over all before it: of the prompt 32 * 32 / 2, of the answer 32 to 42.
    least_s = 12 * 0.001 + 43 * 0.002 + 2e-5 * (512 + 407)
    assert len(tokens) == 12 and len(set(tokens)) > 6 and took_s > least_s
    assert sum(len(changes.stored) for changes in stored) >= 2 * 16, "two full blocks of the prompt, a digest each"
    engine.beat()
    assert [(num_tokens, num_seqs) for *_, num_tokens, num_seqs in engine.steps.recent] == [(32, 1), *[(1, 1)] * 11]
    found = totals(engine)
    assert (found["prompt_tokens_total"], found["generation_tokens_total"], found["computed_tokens"]) == (32, 12, 43)
    assert least_s < found["busy_s"] < took_s
    client.close()
    gate.close()
    engine.shutdown()


def test_kv_goes_from_one_instance_to_another_without_a_model() -> None:
    """Each step that fills blocks sends them, a layer at a time; what has landed is loaded before the step that reads
    it."""
    config = null_config(enable_disagg_pd=True, host_blocks_factor=1.0, num_kv_blocks=64, max_num_batched_tokens=32)
    sender, receiver = (NullCore(StepPrices(step=0.001, token=1e-5), config) for _ in range(2))
    try:
        prompt = token_array(range(5, 77))  # four full blocks and a half
        request = Request(request_id="a", prompt_token_ids=prompt,
                          sampling=SamplingParams(max_tokens=300, ignore_eos=True, seed=1))
        offer = receiver.expect(request, 30.0)
        assert isinstance(offer, KVOffer), offer
        told = run(sender, replace(request, offer=offer))
        assert told[-1].finish_reason is FinishReason.HANDED_OVER
        drawn = tuple(token for delta in told for token in delta.token_ids)
        rest = replace(request, generated_token_ids=drawn, landing=offer.number,
                       sampling=request.sampling.varied(max_tokens=len(drawn) + 5))
        told = run(receiver, rest)
        assert told[-1].finish_reason is FinishReason.LENGTH
        assert receiver.scheduler.counters.cached_tokens_by_tier_total["l3"] == 4 * 16
    finally:
        sender.shutdown()
        receiver.shutdown()


def run(core: NullCore, request: Request) -> list[OutputDelta]:
    """All that comes of a request."""
    core.add(request)
    told = list[OutputDelta]()
    while core.has_work():
        told += core.step()
    return told


def test_the_cpu_time_of_a_process() -> None:
    before, own = cpu_s(os.getpid()), time.process_time()
    assert before <= own
    sum(range(10**6))
    assert own < cpu_s(os.getpid()) <= time.process_time()


def burn(until_s: float) -> None:
    while time.process_time() < until_s:
        sum(range(1000))


def test_samples_fall_where_time_is_spent() -> None:
    sampler, before = CpuSampler(), signal.getsignal(signal.SIGPROF)
    sampler.start()
    try:
        burn(time.process_time() + 0.2)
    finally:
        sampler.stop()
        signal.signal(signal.SIGPROF, before)
    name = "tests/serving/test_bench_master.py:burn"
    assert sampler.num_samples > 5 and sampler.own[name] > 0.8 * sampler.num_samples
    assert sampler.own[name] <= sampler.total[name] <= sampler.num_samples


@pytest.mark.parametrize("wrong", ["--instances=0", "--step-ms=-1", "--open=1,x", "--open=0", "--rounds=0"])
def test_what_it_cannot_measure(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "master", wrong]) == 1
    assert wrong.partition("=")[0] in capsys.readouterr().err
