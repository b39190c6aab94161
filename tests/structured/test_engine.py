"""A structured output together with everything else that a request may ask for."""

from __future__ import annotations

import asyncio
import json
import re
import threading

import pytest

from xllm import LLM, AsyncLLM, SamplingParams, StructuredOutput
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.errors import RequestError
from xllm.request import FinishReason, Request

S = StructuredOutput
PROMPT = "def f(x):\n"
ARRAY = S(json={"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 12, "maxItems": 12})
SETTINGS = {"device": "cpu", "dtype": "float32", "num_kv_blocks": 256, "max_model_len": 256, "num_threads": 1}


def one(llm: LLM, spec: StructuredOutput | None, prompt: str = PROMPT, **sampling):
    params = SamplingParams(structured=spec, **{"temperature": 0, "max_tokens": 64, **sampling})
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]


def test_min_tokens_forbids_an_early_end(llm):
    short, long = one(llm, S(regex="[a-f]+")), one(llm, S(regex="(ab)+"), min_tokens=30)
    assert re.fullmatch("[a-f]+", short.text) or short.finish_reason == "length"
    assert len(long.token_ids) >= 30


def test_a_complete_form_is_padded_with_end_tokens_up_to_min_tokens(llm):
    output = one(llm, S(choice=["ab"]), min_tokens=9)
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("ab", "stop", 9)
    assert set(output.token_ids[2:]) == {2}


def test_max_tokens_cuts_it_off(llm):
    output = one(llm, ARRAY, max_tokens=5)
    assert (output.finish_reason, len(output.token_ids)) == ("length", 5)


def test_stop_strings_and_tokens_end_it_early(llm):
    whole = one(llm, ARRAY)
    assert whole.finish_reason == "stop" and json.loads(whole.text)
    cut = one(llm, ARRAY, stop=[whole.text[7]])
    assert cut.stop_reason == whole.text[7] and whole.text.startswith(cut.text)
    by_id = one(llm, ARRAY, stop_token_ids=[whole.token_ids[4]])
    assert by_id.stop_reason == whole.token_ids[4]


def test_logit_bias_and_allowed_tokens_choose_inside_the_form(llm):
    tokenizer = llm.get_tokenizer()
    choice = S(choice=["x", "q"])
    for text in "xq":
        (token_id,) = tokenizer.encode(text)
        assert one(llm, choice, logit_bias={token_id: 100.0}).text == text
        assert one(llm, choice, allowed_token_ids=[token_id, 2]).text == text
        assert one(llm, choice, bad_words=[{"x": "q", "q": "x"}[text]]).text == text


def test_where_only_the_end_is_left_it_ends(llm):
    (token_id,) = llm.get_tokenizer().encode("q")
    output = one(llm, S(regex="x?"), allowed_token_ids=[token_id])
    assert (output.text, output.finish_reason, output.token_ids) == ("", "stop", [2])


def test_where_nothing_is_left_it_fails_with_the_reason(llm):
    (token_id,) = llm.get_tokenizer().encode("q")
    good = SamplingParams(structured=ARRAY, temperature=0, max_tokens=64)
    bad = SamplingParams(structured=S(regex="xy"), allowed_token_ids=[token_id], temperature=0)
    outputs = [o.outputs[0] for o in llm.generate([PROMPT] * 3, [good, bad, good], use_tqdm=False)]
    assert outputs[1].finish_reason == "error" and "no token is left" in outputs[1].error
    assert outputs[0].text == outputs[2].text == one(llm, ARRAY).text


def test_logprobs_are_the_model_s_own(llm):
    output = one(llm, S(choice=["yes", "no"]), logprobs=2)
    assert len(output.logprobs) == len(output.token_ids)
    free = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=1, logprobs=2), use_tqdm=False)[0].outputs[0]
    assert set(output.logprobs[0]) >= set(free.logprobs[0]) - set(free.token_ids)


def test_several_choices_differ(llm):
    params = SamplingParams(structured=S(regex="[a-z]{8}"), temperature=1.5, seed=3, n=4, max_tokens=20)
    texts = [output.text for output in llm.generate([PROMPT], params, use_tqdm=False)[0].outputs]
    assert all(re.fullmatch("[a-z]{8}", text) for text in texts)
    assert len(set(texts)) == 4


@pytest.mark.parametrize("graph_mode", ["off", "checked"])
def test_rows_without_a_form_are_left_alone(llm, graph_mode):
    plain = SamplingParams(temperature=0, max_tokens=24)
    expected = llm.generate([PROMPT], plain, use_tqdm=False)[0].outputs[0].token_ids
    bound = SamplingParams(structured=ARRAY, temperature=0, max_tokens=64)
    with LLM(**SETTINGS, graph_mode=graph_mode) as mixed:
        outputs = mixed.generate([PROMPT] * 5, [plain, bound, plain, bound, plain], use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs[::2]] == [expected] * 3
    assert {o.outputs[0].text for o in outputs[1::2]} == {one(llm, ARRAY).text}


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in-turn"])
def test_drafts_are_checked_against_the_form(llm, overlap):
    with LLM(**SETTINGS, speculative_method="ngram", num_speculative_tokens=4, async_scheduling=overlap) as drafting:
        for sampling in ({}, {"temperature": 0.9, "seed": 5}, {"repetition_penalty": 1.1}):
            for spec in (ARRAY, S(regex=r"(ab|cd){20}"), S(grammar='start: "(" start ")" | "x"'), None):
                assert one(drafting, spec, **sampling).token_ids == one(llm, spec, **sampling).token_ids
        stats = drafting.stats()
    assert 0 < stats.spec_accepted_tokens_total < stats.spec_draft_tokens_total


def test_a_bad_form_is_refused_before_the_engine_sees_it(llm):
    with pytest.raises(RequestError) as caught:
        one(llm, S(regex="(a"))
    assert caught.value.field == "regex"
    assert one(llm, S(regex="ab")).text == "ab"


def test_without_a_tokenizer_it_is_refused():
    with LLM(**SETTINGS, skip_tokenizer_init=True) as bare, pytest.raises(RequestError, match="tokenizer"):
        bare.generate([[5, 6]], SamplingParams(structured=ARRAY, detokenize=False), use_tqdm=False)


async def test_streamed_deltas_make_up_the_whole(llm):
    engine = AsyncLLM(**SETTINGS)
    try:
        async def stream(spec: StructuredOutput) -> str:
            params = SamplingParams(structured=spec, temperature=0, max_tokens=64)
            return "".join([o.outputs[0].text async for o in engine.generate(PROMPT, params, output_kind="delta")])

        texts = await asyncio.gather(*[stream(spec) for spec in [ARRAY, S(choice=["yes", "no"])] * 3])
        assert texts == [one(llm, ARRAY).text, one(llm, S(choice=["yes", "no"])).text] * 3
        with pytest.raises(RequestError):
            await stream(S(json={"type": "nothing"}))
    finally:
        engine.shutdown()


class Blocked:
    """A core whose vocabulary is not built before `go` is set."""

    def __init__(self):
        self.core = EngineCore(EngineConfig.from_flat(**SETTINGS))
        self.go = threading.Event()
        store = self.core.link.worker.grammars
        make = store._source
        store._source = lambda: self.go.wait(60) and make()

    def add(self, request_id: str, spec: StructuredOutput | None) -> None:
        self.core.add(Request(request_id=request_id, prompt_token_ids=[5, 6, 7], eos_token_ids=(2,),
                              sampling=SamplingParams(structured=spec, temperature=0, max_tokens=64)))

    def run(self, until) -> dict[str, tuple[FinishReason, str | None]]:
        ended = {}
        while not until(ended):
            for delta in self.core.step():
                if delta.finish_reason is not None:
                    assert delta.request_id not in ended
                    ended[delta.request_id] = delta.finish_reason, delta.error
        return ended


@pytest.fixture
def blocked():
    made = Blocked()
    yield made
    made.go.set()
    made.core.shutdown()


def test_no_step_waits_for_a_grammar_that_is_being_built(blocked):
    blocked.add("slow", ARRAY)
    blocked.add("plain", None)
    blocked.add("gone", ARRAY)
    assert blocked.run(lambda ended: "plain" in ended) == {"plain": (FinishReason.LENGTH, None)}
    blocked.core.abort("gone")
    assert blocked.run(lambda ended: "gone" in ended) == {"gone": (FinishReason.ABORT, None)}
    assert blocked.core.has_work()
    blocked.go.set()
    assert blocked.run(lambda ended: "slow" in ended) == {"slow": (FinishReason.STOP, None)}
    blocked.run(lambda ended: not blocked.core.has_work())
    blocked.add("again", ARRAY)
    assert blocked.core.scheduler.has_requests, "what is built does not wait"
    blocked.run(lambda ended: "again" in ended)


def test_a_grammar_that_nobody_checked_ends_its_request_only(blocked):
    blocked.go.set()
    blocked.add("bad", S(grammar="start: nowhere"))
    blocked.add("good", ARRAY)
    ended = blocked.run(lambda ended: len(ended) == 2)
    assert ended["good"] == (FinishReason.STOP, None)
    assert ended["bad"][0] is FinishReason.ERROR and "unknown name" in ended["bad"][1]
    with pytest.raises(RequestError, match="unknown name"):
        blocked.add("again", S(grammar="start: nowhere"))
