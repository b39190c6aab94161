"""`LLM` end to end on the bundled model: vLLM's shapes, order, choices, seeds, stops, chats and errors."""

from __future__ import annotations

import math
import os
import signal
import threading

import pytest

from tests.llm.conftest import SETTINGS
from xllm import LLM, RequestOutput, SamplingParams
from xllm.errors import ConfigError, EngineDeadError, ModelError, RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPTS = ["def add(a, b):\n    return", "import os\n", "class Stack:\n    def push(self, item):\n", "x"]


@pytest.fixture(autouse=True)
def _idle_afterwards(llm):
    """Whatever a test did, nothing of it may still run or hold memory."""
    yield
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [choice.text for output in outputs for choice in output.outputs]


def run(llm: LLM, prompts, params=GREEDY, **options) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False, **options)


def test_outputs_have_vllm_s_shape(llm):
    (output,) = run(llm, PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=2,
                                                   prompt_logprobs=1))
    tokenizer = llm.get_tokenizer()
    assert output.finished
    assert (output.prompt, output.prompt_token_ids) == (PROMPTS[0], tokenizer.encode(PROMPTS[0]))
    (choice,) = output.outputs
    assert (choice.index, choice.finish_reason, choice.stop_reason, len(choice.token_ids)) == (0, "length", None, 5)
    assert choice.text == tokenizer.decode(choice.token_ids, skip_special_tokens=True)
    assert [next(iter(p)) for p in choice.logprobs] == choice.token_ids
    assert all(p[t].rank == 1 for p, t in zip(choice.logprobs, choice.token_ids))
    assert math.isclose(choice.cumulative_logprob, sum(p[t].logprob for p, t in zip(choice.logprobs, choice.token_ids)))
    assert output.prompt_logprobs[0] is None
    assert [next(iter(p)) for p in output.prompt_logprobs[1:]] == output.prompt_token_ids[1:]
    assert output.metrics.arrival_time < output.metrics.first_token_time <= output.metrics.finished_time


def test_a_batch_comes_back_in_order_and_equals_one_by_one(llm):
    together = run(llm, PROMPTS)
    assert [o.prompt for o in together] == PROMPTS
    assert texts(together) == [t for prompt in PROMPTS for t in texts(run(llm, prompt))]


def test_forms_of_prompts_are_equal(llm):
    ids = llm.get_tokenizer().encode(PROMPTS[1])
    forms = [PROMPTS[1], {"prompt": PROMPTS[1]}, {"prompt_token_ids": ids}, ids]
    assert len(set(texts(run(llm, forms)))) == 1
    assert texts(run(llm, ids)) == texts(run(llm, PROMPTS[1]))


def test_a_repeated_prompt_is_cached(llm):
    prompt = "# a prompt that fills more than one block of the cache, surely\n" * 4
    first, second = run(llm, prompt)[0], run(llm, prompt)[0]
    assert second.num_cached_tokens > first.num_cached_tokens
    assert texts([first]) == texts([second])


def test_params_one_each(llm):
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (1, 2, 3, 4)]
    assert [len(o.outputs[0].token_ids) for o in run(llm, PROMPTS, params)] == [1, 2, 3, 4]


def test_default_params_give_at_most_16_tokens(llm):
    (output,) = llm.generate("def", use_tqdm=False)
    assert 1 <= len(output.outputs[0].token_ids) <= 16


def test_no_prompts_no_outputs(llm):
    assert run(llm, []) == []


def test_choices_differ_and_repeat_with_their_seed(llm):
    params = SamplingParams(n=3, seed=5, temperature=1.5, max_tokens=12)
    first, again = run(llm, PROMPTS[0], params), run(llm, PROMPTS[0], params)
    assert [c.index for c in first[0].outputs] == [0, 1, 2]
    assert texts(first) == texts(again)
    assert len(set(texts(first))) == 3
    alone = run(llm, PROMPTS[0], SamplingParams(seed=5, temperature=1.5, max_tokens=12))
    assert texts(alone)[0] == texts(first)[0]


def test_unseeded_requests_differ(llm):
    assert len(set(texts(run(llm, [PROMPTS[0]] * 4, SamplingParams(temperature=1.5, max_tokens=12))))) > 1


def test_stop_string_cuts_where_it_begins(llm):
    (whole,) = texts(run(llm, PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=24)))
    stop = whole[len(whole) // 2:][:3]
    at = whole.index(stop)
    (output,) = run(llm, PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=24, stop=stop))
    choice = output.outputs[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (whole[:at], "stop", stop)
    assert stop in llm.get_tokenizer().decode(choice.token_ids)
    included = SamplingParams(temperature=0.0, max_tokens=24, stop=stop, include_stop_str_in_output=True)
    assert texts(run(llm, PROMPTS[2], included)) == [whole[: at + len(stop)]]


def test_a_stop_string_frees_the_engine(llm):
    (whole,) = texts(run(llm, PROMPTS[2]))
    before = llm.stats().generation_tokens_total
    run(llm, PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True, stop=whole[2:5]))
    assert llm.stats().generation_tokens_total - before < 50


def test_stop_token_ends_and_is_hidden(llm):
    (whole,) = run(llm, PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    ids = whole.outputs[0].token_ids
    stop = ids[5]
    (output,) = run(llm, PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=[stop]))
    choice = output.outputs[0]
    kept = ids[: ids.index(stop) + 1]
    assert (choice.token_ids, choice.finish_reason, choice.stop_reason) == (kept, "stop", stop)
    assert choice.text == llm.get_tokenizer().decode(kept[:-1], skip_special_tokens=True)


def test_bad_words_do_not_appear(llm):
    (plain,) = run(llm, PROMPTS[0])
    word = llm.get_tokenizer().token_text(plain.outputs[0].token_ids[0])
    (banned,) = run(llm, PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=12, bad_words=[word]))
    assert banned.outputs[0].token_ids[0] != plain.outputs[0].token_ids[0]
    assert word not in banned.outputs[0].text


def test_chat_equals_its_rendered_prompt(llm):
    messages = [{"role": "user", "content": "Write a function."}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt == llm.get_tokenizer().render_chat(messages)
    assert texts([output]) == texts(run(llm, {"prompt_token_ids": output.prompt_token_ids}))
    assert texts(llm.chat([messages, messages], GREEDY, use_tqdm=False)) == texts([output]) * 2


@pytest.mark.parametrize(("prompts", "word"), [
    (["x", ""], r"prompts\[1\]: the prompt is empty"),
    (["x", "x", [10**6]], r"prompts\[2\]: prompt: token id 1000000"),
    ([{"prompt": "x"}, {"prompt_token_ids": [1] * 512}], r"prompts\[1\]: the prompt has 512 tokens"),
    (7, "prompts must be"),
], ids=["empty", "vocabulary", "long", "type"])
def test_one_wrong_prompt_stops_the_batch_before_it_runs(llm, prompts, word):
    before = llm.stats()
    with pytest.raises(RequestError, match=word):
        run(llm, prompts)
    assert llm.stats().num_steps == before.num_steps


def test_wrong_counts_and_chats(llm):
    with pytest.raises(RequestError, match="2 given for 1"):
        run(llm, "x", [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="3 given for 1"):
        run(llm, "x", priority=[1, 2, 3])
    for wrong in (2**31 + 1, -(2**40), 1.0, True):
        with pytest.raises(RequestError, match=r"prompts\[1\]: priority must be") as caught:
            run(llm, ["x", "y"], priority=[0, wrong])  # type: ignore[list-item]
        assert caught.value.field == "priority"
    with pytest.raises(RequestError, match=r"messages\[1\]: .*role"):
        llm.chat([[{"role": "user", "content": "x"}], [{"content": "x"}]], GREEDY, use_tqdm=False)


def test_wrong_settings_and_folders(tmp_path):
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(max_modl_len=5)
    with pytest.raises(ModelError):
        LLM(str(tmp_path), **SETTINGS)


@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.03), ("fp8", 0.15), ("w8a8", 0.06)])
def test_quantised_weights_judge_a_text_nearly_alike(llm, quantization, most):
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    with LLM(**SETTINGS, quantization=quantization) as quantised:
        results = [[next(iter(p.values())).logprob for output in run(engine, PROMPTS, params)
                    for p in output.prompt_logprobs[1:]] for engine in (llm, quantised)]
    error = sum(abs(a - b) for a, b in zip(*results)) / len(results[0])
    assert most / 100 < error < most


def test_without_tokenizer_and_after_shutdown(llm):
    prompt = llm.get_tokenizer().encode(PROMPTS[0])
    (expected,) = run(llm, prompt)
    with LLM(skip_tokenizer_init=True, **SETTINGS) as blind:
        (output,) = run(blind, prompt)
        assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", expected.outputs[0].token_ids)
        for call in (lambda: run(blind, "text"), blind.get_tokenizer, lambda: blind.chat([{"role": "user"}])):
            with pytest.raises(RequestError, match="skip_tokenizer_init"):
                call()
    with pytest.raises(EngineDeadError, match="shut down"):
        run(blind, prompt)
    blind.shutdown()


def test_a_failing_engine_says_why(monkeypatch):
    with LLM(**SETTINGS) as failing:
        def run_out(plan):
            raise MemoryError("no room for logits")
        monkeypatch.setattr(failing._core.link.worker.runner, "start", run_out)
        with pytest.raises(EngineDeadError, match="MemoryError: no room for logits"):
            run(failing, "x")
        with pytest.raises(EngineDeadError, match="no room for logits"):
            run(failing, "x")


def test_a_full_queue_refuses_the_batch_and_leaves_nothing():
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    with LLM(**SETTINGS, max_waiting_requests=2) as small:
        with pytest.raises(RequestError, match=r"prompts\[2\]: the queue is full"):
            run(small, PROMPTS, params)
        assert small.stats().generation_tokens_total == small.stats().num_waiting == 0
        assert len(run(small, PROMPTS[:2])) == 2


def test_ctrl_c_ends_the_batch_and_leaves_the_engine_usable(llm):
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    expected, before = texts(run(llm, PROMPTS)), llm.stats().generation_tokens_total
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(llm, PROMPTS, params)
    timer.join()
    assert 0 < llm.stats().generation_tokens_total - before < 4 * 400
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert texts(run(llm, PROMPTS)) == expected


def test_progress_is_shown_on_demand(llm, capsys):
    llm.generate(["x", "y"], GREEDY)
    assert "2/2" in capsys.readouterr().err
