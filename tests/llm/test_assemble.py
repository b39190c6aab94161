"""Deltas to pieces and answers; made-up deltas, the real tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

import xllm
from xllm.answer import Answer
from xllm.client.assemble import Assembly, Piece
from xllm.inputs import InputProcessor
from xllm.request import FinishReason, OutputDelta, SamplingParams, TokenLogprobs
from xllm.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path(xllm.__file__).parent / "bundled")


class Bench:
    """One prompt, the assembly of its completions and the answer that is made of them."""

    def __init__(self, tokenizer: Tokenizer | None, **params):
        inputs = InputProcessor(tokenizer, vocab_size=4096, max_model_len=2048, eos_token_ids=(0,))
        source = inputs.process("r", [5, 6], SamplingParams(**params))
        self.ids = [r.request_id for r in source.requests]
        self.aborted: list[str] = []
        self.assembly = Assembly(source.requests, tokenizer, self.aborted.append)
        self.answer = Answer(source, self.assembly.completions, tokenizer)

    def feed(self, token_ids: list[int], choice: int = 0, **fields) -> Piece:
        (piece,) = self.assembly.feed([OutputDelta(self.ids[choice], list(token_ids), **fields)])
        assert piece.index == choice
        return piece


def test_deltas_and_cumulative_outputs_say_the_same(tokenizer):
    bench = Bench(tokenizer)
    ids = tokenizer.encode("def naïve(): return 1")
    texts, taken = [], []
    for token_id in ids:
        piece = bench.feed([token_id])
        (new,) = bench.answer.take_delta().outputs
        texts.append(new.text)
        assert (piece.text, piece.token_ids, piece.is_first) == (new.text, new.token_ids, token_id is ids[0])
        taken += new.token_ids
        assert bench.answer.output().outputs[0].text == "".join(texts)
    bench.feed([], finish_reason=FinishReason.LENGTH)
    last = bench.answer.take_delta()
    texts.append(last.outputs[0].text)
    assert (last.finished, last.outputs[0].finish_reason) == (True, "length")
    assert ("".join(texts), taken) == ("def naïve(): return 1", ids)
    assert bench.assembly.finished and bench.assembly.open_ids == ()
    assert bench.aborted == []


def test_stop_string_ends_the_request_and_asks_for_an_abort(tokenizer):
    bench = Bench(tokenizer, stop=["return"], logprobs=0)
    ids = tokenizer.encode("x = 1 return 2 return 3")
    logprobs = [TokenLogprobs(i, -1.0, 1) for i in ids]
    piece = bench.feed(ids, logprobs=logprobs)
    assert (piece.text, piece.finish_reason, piece.stop_reason) == ("x = 1 ", "stop", "return")
    assert bench.aborted == bench.ids
    output = bench.answer.output()
    (completion,) = output.outputs
    assert output.finished
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("x = 1 ", "stop", "return")
    assert len(completion.logprobs) == len(completion.token_ids) == output.metrics.num_generation_tokens < len(ids)
    assert completion.cumulative_logprob == -len(completion.token_ids)
    assert piece.logprobs == logprobs[: len(piece.token_ids)]
    late = OutputDelta(bench.ids[0], [], finish_reason=FinishReason.ABORT)
    assert bench.assembly.feed([late]) == []
    assert output == bench.answer.output()


def test_stop_string_in_the_last_delta_needs_no_abort(tokenizer):
    bench = Bench(tokenizer, stop=["b"])
    bench.feed(tokenizer.encode("a b"), finish_reason=FinishReason.LENGTH)
    assert bench.aborted == []
    assert bench.answer.output().outputs[0].stop_reason == "b"


def test_eos_counts_but_does_not_show(tokenizer):
    for skip in (True, False):
        bench = Bench(tokenizer, skip_special_tokens=skip)
        ids = [*tokenizer.encode("ok"), *tokenizer.eos_token_ids]
        bench.feed(ids, finish_reason=FinishReason.STOP)
        (completion,) = bench.answer.output().outputs
        assert (completion.text, completion.token_ids, completion.stop_reason) == ("ok", ids, None)


def test_choices_finish_on_their_own(tokenizer):
    bench = Bench(tokenizer, n=2)
    bench.feed(tokenizer.encode("one"), choice=1, finish_reason=FinishReason.STOP, stop_reason=9)
    first = bench.answer.take_delta()
    assert [o.index for o in first.outputs] == [1]
    assert not first.finished
    bench.feed(tokenizer.encode("two"), choice=0)
    assert [o.index for o in bench.answer.take_delta().outputs] == [0]
    bench.feed([], choice=0, finish_reason=FinishReason.ERROR, error="not finite")
    last = bench.answer.output()
    assert last.finished
    assert [(o.finish_reason, o.stop_reason, o.error) for o in last.outputs] == [("error", None, "not finite"),
                                                                                ("stop", 9, None)]


def test_what_is_open_and_what_is_of_others(tokenizer):
    bench = Bench(tokenizer, n=2)
    bench.feed([5], choice=1, finish_reason=FinishReason.LENGTH)
    assert bench.assembly.open_ids == (bench.ids[0],)
    assert bench.assembly.feed([OutputDelta("another", [5]), OutputDelta(bench.ids[1], [5])]) == []


def test_logprobs_have_the_chosen_token_first(tokenizer):
    bench = Bench(tokenizer, logprobs=2, prompt_logprobs=1)
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    bench.feed([a], logprobs=[TokenLogprobs(a, -3.0, 7, (b, c), (-0.5, -1.0))],
               prompt_logprobs=[None, TokenLogprobs(b, -0.25, 1, (b,), (-0.25,))])
    output = bench.answer.output()
    (entry,) = output.outputs[0].logprobs
    assert [(i, p.logprob, p.rank, p.decoded_token) for i, p in entry.items()] == [
        (a, -3.0, 7, "a"), (b, -0.5, 1, "b"), (c, -1.0, 2, "c")]
    assert output.prompt_logprobs[0] is None
    assert list(output.prompt_logprobs[1]) == [b]
    assert output.outputs[0].cumulative_logprob == -3.0


def test_without_a_tokenizer_there_are_ids_only():
    bench = Bench(None, logprobs=0)
    logprobs = [TokenLogprobs(5, -1.0, 1), TokenLogprobs(6, -1.0, 1)]
    bench.feed([5, 6], finish_reason=FinishReason.LENGTH, logprobs=logprobs)
    (completion,) = bench.answer.output().outputs
    assert (completion.text, completion.token_ids) == ("", [5, 6])
    assert completion.logprobs[0][5].decoded_token is None


def test_times_and_counts(tokenizer):
    bench = Bench(tokenizer)
    bench.feed([], num_preemptions=1, num_cached_tokens=16)
    metrics = bench.answer.output().metrics
    assert (metrics.first_token_time, metrics.finished_time) == (None, None)
    bench.feed([5])
    bench.feed([6], finish_reason=FinishReason.LENGTH)
    output = bench.answer.output()
    metrics = output.metrics
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.last_token_time <= metrics.finished_time
    assert (metrics.num_generation_tokens, metrics.num_preemptions, output.num_cached_tokens) == (2, 1, 16)
