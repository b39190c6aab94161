"""`AsyncLLM` on the bundled model: streams, aborts, cancelled consumers, refusals, and the engine's death."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import xllm.bundled
from tests.adapters import write_adapter
from tests.llm.conftest import SETTINGS
from xllm import LLM, AsyncLLM, EngineConfig, PoolingParams, SamplingParams
from xllm.client.assemble import Completion
from xllm.client.local import CommandQueue
from xllm.engine.commands import CommandReply, Outputs, Refused, Shutdown, Submit
from xllm.engine.loop import EngineLoop
from xllm.errors import ConfigError, EngineDeadError, RequestError
from xllm.outputs import RequestOutput
from xllm.request import FinishReason, Request

BUNDLED = Path(xllm.bundled.__file__).parent
PROMPT = "def add(a, b):\n    return"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


@pytest.fixture
async def engine() -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(**SETTINGS, max_num_seqs=8, max_waiting_requests=16) as loaded:
        yield loaded


async def collect(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


async def idle(engine: AsyncLLM) -> None:
    """Wait until the engine has nothing left to do; fails after five seconds."""
    for _ in range(500):
        stats = engine.stats()
        if stats.num_running + stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still busy: {engine.stats()}")


async def test_streams_equal_llm(engine, llm):
    (expected,) = llm.generate(PROMPT, GREEDY, use_tqdm=False)
    cumulative = await collect(engine.generate(PROMPT, GREEDY, "a"))
    deltas = await collect(engine.generate(PROMPT, GREEDY, "a", output_kind="delta"))
    final = await collect(engine.generate(PROMPT, GREEDY, output_kind="final"))
    text, ids = expected.outputs[0].text, expected.outputs[0].token_ids
    assert [o.outputs[0].text for o in (cumulative[-1], final[-1])] == [text, text]
    assert "".join(o.outputs[0].text for o in deltas) == text
    assert [t for o in deltas for t in o.outputs[0].token_ids] == cumulative[-1].outputs[0].token_ids == ids
    for outputs in (cumulative, deltas, final):
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    assert len(final) == 1
    assert len(cumulative) > 1  # a slow reader gets several tokens at once
    for before, after in itertools.pairwise(cumulative):
        assert after.outputs[0].text.startswith(before.outputs[0].text)


async def test_chat_and_embed_equal_llm(engine, llm):
    messages = [{"role": "user", "content": "Write a loop."}]
    (expected,) = llm.chat(messages, GREEDY, use_tqdm=False)
    deltas = await collect(engine.chat(messages, GREEDY, "a", output_kind="delta"))
    assert "".join(o.outputs[0].text for o in deltas) == expected.outputs[0].text
    assert deltas[-1].prompt == expected.prompt and deltas[-1].request_id == "a"
    (vector,) = llm.embed(PROMPT)
    assert (await engine.embed(PROMPT)).embedding == vector.embedding
    with pytest.raises(RequestError, match=r"messages.0"):
        await collect(engine.chat([{"role": "user", "content": "x", "mood": "bad"}]))
    with pytest.raises(RequestError, match="dimensions"):
        await engine.embed(PROMPT, PoolingParams(dimensions=2**19))
    async for _ in engine.chat(messages, LONG):
        break
    await idle(engine)


def test_what_llm_can_async_llm_can():
    def public(kind):
        return {name for name in vars(kind) if not name.startswith("_") and callable(getattr(kind, name))}

    assert public(LLM) < public(AsyncLLM)
    for name in ("__init__", "generate", "chat", "embed", "load_adapter"):
        ours, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (AsyncLLM, LLM))
        assert theirs.keys() - ours.keys() <= {"prompts", "use_tqdm"}
    first, second = (next(iter(inspect.signature(kind).parameters)) for kind in (LLM, AsyncLLM))
    assert first == second == "model"


async def test_adapters_come_and_go(tmp_path):
    write_adapter(tmp_path / "sql", 1)
    async with AsyncLLM(str(BUNDLED), **SETTINGS, enable_lora=True) as engine:
        plain = (await collect(engine.generate(PROMPT, GREEDY)))[-1].outputs[0].token_ids
        await engine.load_adapter("sql", tmp_path / "sql")
        with pytest.raises(RequestError):
            await engine.load_adapter("sql", tmp_path / "sql")
        adapted = (await collect(engine.generate(PROMPT, GREEDY, lora="sql")))[-1].outputs[0].token_ids
        assert adapted != plain
        await engine.unload_adapter("sql")
        with pytest.raises(RequestError, match="sql"):
            await engine.unload_adapter("sql")


async def test_many_at_once_equal_llm(engine, llm):
    prompts = [f"x{n} = {n}\n" for n in range(12)]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY, use_tqdm=False)]
    streams = [collect(engine.generate(p, GREEDY, str(n))) for n, p in enumerate(prompts)]
    assert [outputs[-1].outputs[0].token_ids for outputs in await asyncio.gather(*streams)] == expected
    await idle(engine)


async def test_choices_and_stop_strings(engine):
    params = SamplingParams(n=3, seed=1, temperature=1.5, max_tokens=40, stop=["e"])
    last = (await collect(engine.generate(PROMPT, params)))[-1]
    assert [c.index for c in last.outputs] == [0, 1, 2]
    assert not any("e" in c.text for c in last.outputs)
    assert all(c.stop_reason == "e" for c in last.outputs if c.finish_reason == "stop" and c.stop_reason)
    await idle(engine)


async def test_a_stop_string_frees_the_engine(engine):
    (whole,) = await collect(engine.generate(PROMPT, GREEDY, output_kind="final"))
    stop = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True, stop=[whole.outputs[0].text[2:5]])
    (output,) = await collect(engine.generate(PROMPT, stop, output_kind="final"))
    assert output.outputs[0].stop_reason == stop.stop[0]
    await idle(engine)
    assert engine.stats().generation_tokens_total < 100


async def test_abort_gives_a_last_output(engine):
    reasons = []
    async for output in engine.generate(PROMPT, LONG, "long"):
        engine.abort("long")
        engine.abort("unknown")
        reasons.append(output.outputs[0].finish_reason)
    assert reasons[-1] == "abort"
    assert 1 < len(reasons) < 100
    await idle(engine)


@pytest.mark.parametrize("way", ["close", "cancel", "break"])
async def test_a_consumer_that_leaves_aborts_its_request(engine, way):
    stream = engine.generate(PROMPT, LONG, "left")
    if way == "cancel":
        task = asyncio.create_task(collect(stream))
        while engine.stats().generation_tokens_total < 3:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif way == "break":
        async for _ in stream:
            break
        await stream.aclose()
    else:
        await anext(stream)
        await stream.aclose()
    await idle(engine)
    assert engine.stats().generation_tokens_total < 300
    assert (await collect(engine.generate(PROMPT, GREEDY, "left")))[-1].finished  # the id is free again


async def test_refused_requests_harm_nobody(engine):
    running = asyncio.create_task(collect(engine.generate(PROMPT, GREEDY, "same")))
    await asyncio.sleep(0)
    too_many = SamplingParams(n=100, max_tokens=400, ignore_eos=True)
    for prompt, params, request_id, word in [
        ("", GREEDY, "e", "empty"), (PROMPT, GREEDY, "same", "in use"),
        (PROMPT, too_many, "full", "queue is full"), ([10**7], GREEDY, "v", "vocabulary"),
    ]:
        with pytest.raises(RequestError, match=word):
            await collect(engine.generate(prompt, params, request_id))
    assert (await running)[-1].finished
    await idle(engine)
    assert engine.stats().generation_tokens_total < 100


async def test_long_prompts_are_tokenised_off_the_loop(engine):
    with pytest.raises(RequestError, match="at most 511"):
        await collect(engine.generate("word " * 10_000, GREEDY))


async def test_idle_engine_wakes_at_once_and_sleeps_when_idle(engine):
    await collect(engine.generate(PROMPT, GREEDY))
    await idle(engine)
    steps, cpu_s = engine.stats().num_steps, time.process_time()
    await asyncio.sleep(0.3)
    assert engine.stats().num_steps == steps
    assert time.process_time() - cpu_s < 0.1
    start = time.perf_counter()
    await collect(engine.generate(PROMPT, SamplingParams(max_tokens=1)))
    assert time.perf_counter() - start < 1.0


async def test_death_reaches_every_open_iterator(engine, monkeypatch, caplog):
    tasks = [asyncio.create_task(collect(engine.generate(PROMPT, LONG))) for _ in range(3)]
    while engine.stats().generation_tokens_total < 6:
        await asyncio.sleep(0.005)

    def fail(plan):
        raise MemoryError("no room for logits")

    monkeypatch.setattr(engine._core.link.worker.runner, "start", fail)
    for result in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10):
        assert isinstance(result, EngineDeadError)
        assert "no room for logits" in str(result)
    with pytest.raises(EngineDeadError, match="no room for logits"):
        await collect(engine.generate(PROMPT, GREEDY))
    assert "the engine failed" in caplog.text


async def test_shutdown_ends_open_iterators(engine):
    task = asyncio.create_task(collect(engine.generate(PROMPT, LONG)))
    while engine.stats().generation_tokens_total < 3:
        await asyncio.sleep(0.005)
    engine.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        await asyncio.wait_for(task, 10)


async def test_a_bug_in_reading_outputs_hangs_nobody(engine, monkeypatch):
    caught = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: caught.append(context["exception"]))
    monkeypatch.setattr(engine._engine, "_deliver", lambda delta: 1 / 0)
    with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
        await asyncio.wait_for(collect(engine.generate(PROMPT, GREEDY)), 10)
    assert caught


async def test_a_bug_in_making_text_harms_its_own_request_only(engine, monkeypatch):
    feed = Completion.feed
    monkeypatch.setattr(Completion, "feed", lambda completion, delta, now_s: feed(completion, delta, now_s)
                        if completion.request.sampling.max_tokens != 7 else 1 / 0)
    sound = asyncio.create_task(collect(engine.generate(PROMPT, GREEDY)))
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(collect(engine.generate(PROMPT, SamplingParams(max_tokens=7))), 10)
    assert (await asyncio.wait_for(sound, 10))[-1].outputs[0].finish_reason is not None
    await idle(engine)


def test_another_event_loop_takes_over_a_closed_one():
    engine = AsyncLLM(**SETTINGS)
    try:
        stream = engine.generate(PROMPT, LONG, "lost")
        old_loop = asyncio.new_event_loop()
        old_loop.run_until_complete(anext(stream))
        old_loop.close()  # the stream is neither finished nor closed

        async def again() -> list[RequestOutput]:
            await idle(engine)
            outputs = await collect(engine.generate(PROMPT, GREEDY, "lost"))
            await idle(engine)
            return outputs

        assert asyncio.run(again())[-1].finished
        assert engine.stats().generation_tokens_total < 200
        assert engine._engine.request_ids == ()
    finally:
        engine.shutdown()


def test_a_refused_choice_takes_the_others_with_it():
    with LLM(**SETTINGS, max_waiting_requests=2) as llm:
        commands, answers = CommandQueue(), []

        def report(answer: CommandReply) -> None:
            answers.append(answer)
            if isinstance(answer, Outputs):
                commands.put(Shutdown())

        commands.put(Submit([Request(request_id=str(n), prompt_token_ids=[5], sampling=LONG) for n in range(4)]))
        EngineLoop(llm._core, commands, report).run()
        refused, outputs = answers
        assert isinstance(refused, Refused)
        assert (refused.request_id, refused.field) == ("0", None) and "queue is full" in refused.error
        assert [(d.request_id, d.finish_reason) for d in outputs.deltas] == [(n, FinishReason.ABORT) for n in "01"]
        assert llm.stats().generation_tokens_total == 0


def test_settings():
    with pytest.raises(ConfigError, match="not both"):
        AsyncLLM(config=EngineConfig(), device="cpu")
    with pytest.raises(ConfigError, match="not both"):
        AsyncLLM("a-folder", config=EngineConfig())
    with pytest.raises(ConfigError, match="config="):
        AsyncLLM(EngineConfig())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown"):
        AsyncLLM(devize="cpu")
