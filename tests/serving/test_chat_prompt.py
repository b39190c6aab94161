"""`chat_prompt`: short chats are rendered at once, and a template that is slow never stops the event loop for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from serving.api.chat_prompt import chat_prompt
from serving.api.state import ServerState
from serving.api.text_work import BRIEF_S, SLOW_S, TextWork
from serving.api.tools import ToolWish
from serving.api.types import ChatBody
from serving.commands.bench.null_instance import NullCore, NullEngine, null_config
from serving.config import ServerConfig
from xllm.cost.cost_model import StepPrices
from xllm.errors import RequestError
from xllm.text.tokenizer import Tokenizer, load_tokenizer

QUICK = "{% for m in messages %}{{ m.content }}{% endfor %}"
SLOW = ("{% for m in messages %}{% for i in range(400) %}{% for j in range(400) %}{% endfor %}{% endfor %}"
        "{{ m.content }}{% endfor %}")
REFUSING = "{{ raise_exception('not so') }}"
MUCH = "{% for m in messages %}{{ m.content * 20000 }}{% endfor %}"
BODY = ChatBody.model_validate({"messages": [{"role": "user", "content": "Hello"}]})


@pytest.fixture(scope="module")
def engine() -> Iterator[NullEngine]:
    engine = NullEngine(NullCore(StepPrices(step=0.001, token=0.0), null_config()))
    yield engine
    engine.shutdown()


def state_of(engine: NullEngine, template: str) -> ServerState:
    assert engine.facts is not None
    state = ServerState(engine, ServerConfig(), model_name="demo")  # type: ignore[arg-type]
    state.tokenizer = Tokenizer(load_tokenizer(engine.facts.model_path).backend, {}, {"default": template})  # type: ignore[arg-type]
    return state


async def prompt(state: ServerState) -> tuple[str, float]:
    """The prompt's text, and the longest that the event loop stood still, in seconds."""
    longest_s, going = 0.0, True

    async def watch() -> None:
        nonlocal longest_s
        before_s = time.monotonic()
        while going:
            await asyncio.sleep(0)
            now_s = time.monotonic()
            longest_s, before_s = max(longest_s, now_s - before_s), now_s

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    try:
        token_ids, tail = await chat_prompt(state, BODY, BODY.messages, ToolWish())
    finally:
        going = False
        await watching
    assert state.tokenizer is not None and state.tokenizer.decode(token_ids).endswith(tail)
    return state.tokenizer.decode(token_ids), longest_s


async def test_a_short_chat_needs_no_thread(engine: NullEngine) -> None:
    state = state_of(engine, QUICK)
    await prompt(state)
    assert (await prompt(state))[0] == "Hello" and state.text_work.may_be_brief()
    assert not state.text_work._long._threads


async def test_a_slow_template_is_left_to_threads(engine: NullEngine) -> None:
    state = state_of(engine, SLOW)
    assert (await prompt(state))[0] == "Hello"
    assert not state.text_work.may_be_brief() and state.text_work._long._threads
    text, still_s = await prompt(state)
    assert text == "Hello" and still_s < 5 * BRIEF_S, "threads take turns of 5 ms"


async def test_what_a_template_refuses_is_refused_at_once(engine: NullEngine) -> None:
    state = state_of(engine, REFUSING)
    with pytest.raises(RequestError, match="not so"):
        await prompt(state)
    assert not state.text_work._long._threads


async def test_much_of_little_is_tokenised_in_a_thread(engine: NullEngine) -> None:
    state = state_of(engine, MUCH)
    assert (await prompt(state))[0] == "Hello" * 20000
    assert state.text_work._long._threads and not state.text_work.may_be_brief()


async def test_one_slow_moment_is_soon_forgiven() -> None:
    """A template that is always slow is tried ever more seldom; one that was not to blame, again after a second."""
    now_s = 0.0
    work = TextWork(lambda: now_s)

    def tried_again_after_s() -> float:
        nonlocal now_s
        began_s = now_s
        work.note_slow()
        while not work.may_be_brief():
            now_s += 0.5
        return now_s - began_s

    assert [tried_again_after_s() for _ in range(8)] == [1, 2, 4, 8, 16, 32, SLOW_S, SLOW_S]
    work.note_brief()
    assert tried_again_after_s() == 1
