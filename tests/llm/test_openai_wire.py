"""What is sent to an OpenAI server, and what its chunks mean; their shapes are those of vLLM 0.32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.llm.cluster_sites import make_request
from xllm.client.openai_facts import ModelCard, read_card, read_facts, read_metrics
from xllm.client.openai_wire import DONE, ChunkReader, completion_body, data_lines, refusal
from xllm.errors import EngineDeadError, RequestError
from xllm.pooling import PoolingParams
from xllm.request import SAMPLING_FIELDS, FinishReason, OutputDelta, SamplingParams, TokenLogprobs
from xllm.structured.spec import StructuredOutput

# Of `SamplingParams`: what is sent as it is, or in another form; what is decided behind the tokens, by who asked;
# what is refused.
SENT = {"temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
        "max_tokens", "min_tokens", "stop_token_ids", "bad_words", "ignore_eos", "logprobs", "logit_bias",
        "allowed_token_ids", "structured"}
BEHIND_TOKENS = {"n", "stop", "include_stop_str_in_output", "skip_special_tokens", "detokenize", "bad_words_token_ids"}
REFUSED = {"prompt_logprobs"}


def test_every_parameter_is_sent_kept_or_refused() -> None:
    assert set(SAMPLING_FIELDS) == SENT | BEHIND_TOKENS | REFUSED


def test_all_that_can_be_said() -> None:
    sampling = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=20, min_p=0.1, presence_penalty=0.2, frequency_penalty=0.3,
        repetition_penalty=1.1, seed=7, max_tokens=9, min_tokens=3, stop=("END",), stop_token_ids=(5, 6),
        bad_words=("no",), bad_words_token_ids=((8,),), logprobs=2, logit_bias={4: -1.5}, allowed_token_ids=(4, 5, 6),
        structured=StructuredOutput(json={"type": "object"}))
    request = make_request("r/1", sampling, (1, 2, 3), eos_token_ids=(2, 6), priority=4, cache_salt="salt")
    assert completion_body(request, "demo", 512) == {
        "model": "demo", "prompt": [1, 2, 3], "stream": True, "stream_options": {"include_usage": True},
        "return_token_ids": True, "return_tokens_as_token_ids": True, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9,
        "top_k": 20, "min_p": 0.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "repetition_penalty": 1.1,
        "seed": 7, "min_tokens": 3, "stop_token_ids": [5, 6, 2], "bad_words": ["no"], "logprobs": 2,
        "logit_bias": {"4": -1.5}, "allowed_token_ids": [4, 5, 6], "structured_outputs": {"json": '{"type":"object"}'},
        "priority": 4, "cache_salt": "salt"}


def test_what_is_not_asked_for_is_left_out_but_for_what_the_server_has_defaults_for() -> None:
    body = completion_body(make_request("r", SamplingParams(max_tokens=None), (1, 2, 3)), "demo", 512)
    assert body["max_tokens"] == 509
    assert set(body) == {"model", "prompt", "stream", "stream_options", "return_token_ids",
                         "return_tokens_as_token_ids", "max_tokens", "temperature", "top_p", "top_k", "min_p",
                         "presence_penalty", "frequency_penalty", "repetition_penalty"}


def test_behind_tokens_of_another_instance() -> None:
    """They are the prompt, and count; a seed does not draw the first numbers again."""
    sampling = SamplingParams(max_tokens=9, min_tokens=4, seed=2**64 - 1, ignore_eos=True)
    request = make_request("r", sampling, (1, 2), generated_token_ids=(7, 8, 9), eos_token_ids=(2,))
    body = completion_body(request, "m", 99)
    assert body["prompt"] == [1, 2, 7, 8, 9] and (body["max_tokens"], body["min_tokens"]) == (6, 1)
    assert body["seed"] == 2 and body["ignore_eos"] is True and "stop_token_ids" not in body
    high = SamplingParams(seed=2**63)  # vLLM's seeds are signed
    assert completion_body(make_request("r", high), "m", 99)["seed"] == -(2**63)


@pytest.mark.parametrize(("field", "options"), [
    ("input", {"pooling": PoolingParams()}), ("model", {"lora": "a"}), ("offline", {"offline": True}),
    ("ttlt_slo_ms", {"deadline_s": 1.0}), ("prompt_logprobs", {"sampling": SamplingParams(prompt_logprobs=1)}),
    ("structured_outputs", {"sampling": SamplingParams(structured=StructuredOutput(regex="a", after="</think>"))}),
    ("presence_penalty", {"sampling": SamplingParams(presence_penalty=0.1), "generated_token_ids": (1,)}),
    ("frequency_penalty", {"sampling": SamplingParams(frequency_penalty=0.1), "generated_token_ids": (1,)}),
    ("bad_words", {"sampling": SamplingParams(bad_words=("a",), bad_words_token_ids=((1, 2),)),
                   "generated_token_ids": (1,)}),
    ("structured_outputs", {"sampling": SamplingParams(structured=StructuredOutput(regex="a+")),
                            "generated_token_ids": (1,)})])
def test_what_cannot_be_said(field: str, options: dict[str, Any]) -> None:
    found = refusal(make_request("r", **options))
    assert isinstance(found, RequestError) and found.field == field
    assert str(found).startswith(f"{field}: OpenAI servers")


def test_what_can_be_said_behind_other_tokens() -> None:
    sampling = SamplingParams(temperature=0.7, seed=3, repetition_penalty=1.2, stop=("x",), logprobs=2)
    assert refusal(make_request("r", sampling, generated_token_ids=(1, 2))) is None


# --- chunks


def chunk(token_ids: list[int] | None, finish_reason: str | None = None, stop_reason: Any = None,
          logprobs: Any = None) -> bytes:
    choice = {"index": 0, "text": "):\n", "logprobs": logprobs, "finish_reason": finish_reason,
              "stop_reason": stop_reason, "prompt_token_ids": [100, 200, 300], "token_ids": token_ids}
    return json.dumps({"id": "cmpl-a9de39b136956964", "object": "text_completion", "created": 1796073189,
                       "model": "demo", "choices": [choice]}).encode()


USAGE = json.dumps({"id": "cmpl-a9de39b136956964", "object": "text_completion", "created": 1796073189, "model": "demo",
                    "choices": [], "usage": {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3,
                                             "prompt_tokens_details": {"cached_tokens": 2}},
                    "system_fingerprint": "vllm-0.32.0"}).encode()


def read(reader: ChunkReader, *events: bytes) -> list[OutputDelta]:
    return [delta for event in events if (delta := reader.read(event)) is not None]


def test_an_answer() -> None:
    reader = ChunkReader(make_request("r", SamplingParams(stop_token_ids=(7,))), 4096)
    assert read(reader, chunk([310]), chunk([260, 261]), chunk([7], "stop", 7), USAGE, DONE) == [
        OutputDelta("r", [310]), OutputDelta("r", [260, 261]),
        OutputDelta("r", [7], finish_reason=FinishReason.STOP, stop_reason=7, num_cached_tokens=2)]
    assert reader.is_done


@pytest.mark.parametrize(("reason", "stop", "expected"), [
    ("stop", None, FinishReason.STOP), ("stop", 2, FinishReason.STOP), ("length", None, FinishReason.LENGTH)])
def test_ends(reason: str, stop: int | None, expected: FinishReason) -> None:
    """The end of a text, which is sent as a stop token, is not one that was asked for; without a usage the stream's end
    will do."""
    reader = ChunkReader(make_request("r", SamplingParams(), eos_token_ids=(2,)), 4096)
    (delta,) = read(reader, chunk([2], reason, stop), DONE)
    assert (delta.finish_reason, delta.stop_reason, delta.token_ids) == (expected, None, [2])


def test_log_probabilities() -> None:
    """The chosen token first, then the top ones, of which vLLM tells one more if the chosen one is not among them."""
    found = {"text_offset": [0], "token_logprobs": [-2.7], "tokens": ["token_id:310"],
             "top_logprobs": [{"token_id:310": -2.7, "token_id:305": -0.5, "token_id:4": -1.5}]}
    reader = ChunkReader(make_request("r", SamplingParams(logprobs=2)), 4096)
    assert read(reader, chunk([310], logprobs=found)) == [
        OutputDelta("r", [310], logprobs=[TokenLogprobs(310, -2.7, 3, (305, 4), (-0.5, -1.5))])]
    # Tokens go on when their log-probabilities have come, at the end at the latest.
    one = {"token_logprobs": [-1.0], "tokens": ["token_id:9"], "top_logprobs": [{"token_id:9": -1.0}]}
    assert read(reader, chunk([9])) == [] and not reader.is_done
    (delta,) = read(reader, chunk([], "length", logprobs=one), USAGE)
    assert delta.logprobs == [TokenLogprobs(9, -1.0, 1, (9,), (-1.0,))]


@pytest.mark.parametrize(("events", "reason"), [
    ([chunk(None)], "it sends no token ids: return_token_ids needs vLLM 0.10.2 or later"),
    ([chunk([4096])], "it sends token 4096, and the vocabulary of the master's tokenizer has 4096"),
    ([chunk([5]), DONE], "the answer ended before its end"),
    ([chunk([5], "abort"), USAGE], "it ended the answer: abort"),
    ([b"{"], "what it sends cannot be read"), ([b"[1]"], "what it sends cannot be read"),
    ([b'{"choices": [{"token_ids": [1], "logprobs": {"tokens": ["a"]}}]}'], "what it sends cannot be read"),
    ([b'{"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}'],
     "HTTP 500: EngineCore died")])
def test_answers_that_are_none(events: list[bytes], reason: str) -> None:
    reader = ChunkReader(make_request("r", SamplingParams(logprobs=1 if b"logprobs" in events[0][:60] else None)), 4096)
    with pytest.raises(EngineDeadError, match=reason):
        read(reader, *events)


def test_a_refusal_within_a_stream() -> None:
    """vLLM sends its HTTP 200 first."""
    said = {"message": "Requested sample logprobs of 30", "type": "BadRequestError", "param": "logprobs", "code": 400}
    with pytest.raises(RequestError, match="sample logprobs of 30") as refused:
        ChunkReader(make_request("r"), 4096).read(json.dumps({"error": said}).encode())
    assert refused.value.field == "logprobs"


def test_lines_end_at_line_feeds_alone() -> None:
    found: list[bytes] = []
    rest = data_lines(found.append, b"", 'data: {"text": "a\u2028b"}\n\n: comment\nda'.encode())
    assert data_lines(found.append, rest, b"ta: [DONE]\r\n") == b"" and found == ['{"text": "a\u2028b"}'.encode(), DONE]


# --- what is known of a server


METRICS = """# TYPE process_start_time_seconds gauge
process_start_time_seconds 1.79607306103e+09
vllm:num_requests_running{engine="0",model_name="demo"} 2.0
vllm:num_requests_running{engine="1",model_name="demo"} 1.0
vllm:num_requests_waiting{engine="0",model_name="demo"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="demo",reason="capacity"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="demo"} 0.0
vllm:prompt_tokens_total{engine="0",model_name="demo"} 30.0
vllm:prompt_tokens_created{engine="0",model_name="demo"} 1.79e+09
vllm:generation_tokens_total{engine="0",model_name="demo"} 12.0
vllm:iteration_tokens_total_count{engine="0",model_name="demo"} 3.0
vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="100",num_gpu_blocks_override="None"} 1.0
vllm:cache_config_info{block_size="32",engine="1",num_gpu_blocks="100",num_gpu_blocks_override="None"} 1.0
"""


def test_metrics() -> None:
    """Of all engines together; ours has them under two names, of which one counts."""
    found = read_metrics(METRICS + METRICS.replace("vllm:", "xllm:"))
    assert (found.block_size, found.num_blocks, found.started_unix_s) == (32, 200, 1796073061.03)
    stats = found.stats
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (3, 4, 3)
    assert (stats.kv_usage, stats.num_free_blocks, stats.prompt_tokens_total, stats.generation_tokens_total) == \
        (0.25, 150, 30, 12)
    nothing = read_metrics("no metrics")
    assert nothing.block_size is None and nothing.stats.num_running == 0 == nothing.started_unix_s


def test_the_model() -> None:
    cards = [{"id": "adapter", "root": "/a", "parent": "demo", "max_model_len": 512},
             {"id": "demo", "root": "org/demo", "parent": None, "max_model_len": 512},
             {"id": "alias", "root": "org/demo", "parent": None, "max_model_len": 512},
             {"id": "other", "root": "org/other", "parent": None, "max_model_len": 64}]
    assert read_card({"data": cards}) == ModelCard(("demo", "alias"), "org/demo", 512)
    for wrong in ({"data": cards[:1]}, {}, []):
        with pytest.raises(EngineDeadError, match="names no model"):
            read_card(wrong)
    with pytest.raises(EngineDeadError, match="does not say max_model_len of gpt"):
        read_card({"data": [{"id": "gpt"}]})


def test_facts_come_from_the_models_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {
        "vocab_size": 10, "hidden_size": 4, "eos_token_id": [3, 99]}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    facts = read_facts(ModelCard(("m",), "org/m", 64), read_metrics(METRICS), str(tmp_path))
    assert (facts.vocab_size, facts.eos_token_ids, facts.max_model_len, facts.num_blocks) == (10, (7, 3), 64, 200)
    assert facts.config.cache.block_size == 32 and facts.model_path == str(tmp_path)
    with pytest.raises(EngineDeadError, match="org/m, is no folder on this machine: --tokenizer-path"):
        read_facts(ModelCard(("m",), "org/m", 64), read_metrics(""), None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineDeadError, match="does not say vocab_size"):
        read_facts(ModelCard(("m",), str(tmp_path), 64), read_metrics(""), None)
