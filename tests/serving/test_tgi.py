"""TGI's forms with Hugging Face's own client: texts, details, streams, forms, what is refused, and who leaves."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient, TextGenerationInputGenerateParameters
from huggingface_hub.errors import GenerationError, HfHubHTTPError, ValidationError

from serving.api.tgi_input import TGIParameters
from tests.serving.server_process import ServerProcess, wait_for

PROMPT = "def read_file(path):"
DRAWN = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}


@pytest.fixture
def hub(server: ServerProcess) -> InferenceClient:
    return InferenceClient(model=f"{server.url}/generate", timeout=60)


def completion(server: ServerProcess, **wishes: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0, "return_token_ids": True,
                                                       **wishes})
    return answer.json()["choices"][0]


def post(server: ServerProcess, **parameters: Any) -> httpx.Response:
    return server.http.post("/generate", json={"inputs": PROMPT, "parameters": parameters})


def test_every_parameter_of_the_client_is_known() -> None:
    assert {field.name for field in dataclasses.fields(TextGenerationInputGenerateParameters)} == set(
        TGIParameters.model_fields)


def test_a_text_is_the_completion(server: ServerProcess, hub: InferenceClient) -> None:
    text = completion(server, max_tokens=20)["text"]
    assert hub.text_generation(PROMPT, max_new_tokens=20) == text
    assert hub.text_generation(PROMPT, max_new_tokens=20, return_full_text=True) == PROMPT + text
    assert "".join(hub.text_generation(PROMPT, max_new_tokens=20, stream=True)) == text
    assert hub.text_generation(PROMPT).startswith(text), "a hundred tokens, and none is drawn"


def test_details_are_those_of_a_completion(server: ServerProcess, hub: InferenceClient) -> None:
    plain = completion(server, max_tokens=8, logprobs=2, prompt_logprobs=0)
    answer = hub.text_generation(PROMPT, max_new_tokens=8, details=True, decoder_input_details=True, top_n_tokens=2)
    details = answer.details
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 8, None)
    assert [token.id for token in details.tokens] == plain["token_ids"]
    assert [token.logprob for token in details.tokens] == pytest.approx(plain["logprobs"]["token_logprobs"])
    assert "".join(token.text for token in details.tokens) == answer.generated_text == plain["text"]
    assert [token.id for token in details.prefill] == plain["prompt_token_ids"]
    assert "".join(token.text for token in details.prefill) == PROMPT and details.prefill[0].logprob is None
    for token, scored in zip(details.prefill[1:], plain["prompt_logprobs"][1:], strict=True):
        assert token.logprob == pytest.approx(scored[str(token.id)]["logprob"])
    assert [{top["text"] for top in tops} for tops in details.top_tokens] == [
        set(tops) for tops in plain["logprobs"]["top_logprobs"]]


def test_a_stream_holds_what_the_whole_answer_does(hub: InferenceClient) -> None:
    wish: dict[str, Any] = {"max_new_tokens": 12, "details": True, "top_n_tokens": 1}
    whole = hub.text_generation(PROMPT, **wish)
    *events, last = hub.text_generation(PROMPT, **wish, stream=True)
    assert [event.index for event in (*events, last)] == list(range(1, 13))
    assert [vars(event.token) for event in (*events, last)] == [vars(token) for token in whole.details.tokens]
    assert [[top.id for top in event.top_tokens] for event in (*events, last)] == [
        [top["id"] for top in tops] for tops in whole.details.top_tokens]
    assert {(event.generated_text, event.details) for event in events} == {(None, None)}
    assert last.generated_text == whole.generated_text
    assert (last.details.finish_reason, last.details.generated_tokens, last.details.input_length) == ("length", 12, 5)


def test_the_stream_has_tgis_framing(server: ServerProcess) -> None:
    """Its own clients read every line as JSON."""
    answer = server.http.post("/generate_stream", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 3}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.splitlines() if line]
    assert len(lines) == 3 and all(line.startswith("data: {") for line in lines)
    refused = server.http.post("/generate_stream", json={"inputs": PROMPT, "stream": False})
    assert refused.status_code == 422 and "stream" in refused.json()["error"]


def test_a_stop_string_is_part_of_the_text(server: ServerProcess, hub: InferenceClient) -> None:
    free = completion(server, max_tokens=30)["text"]
    stop = free[10:13]
    kept = free[: free.index(stop) + len(stop)]
    answer = hub.text_generation(PROMPT, max_new_tokens=30, stop=[stop, "never there"], details=True)
    assert answer.generated_text == kept and answer.details.finish_reason == "stop_sequence"
    streamed = list(hub.text_generation(PROMPT, max_new_tokens=30, stop=[stop], details=True, stream=True))
    assert "".join(event.token.text for event in streamed) == streamed[-1].generated_text == kept
    assert streamed[-1].details.finish_reason == "stop_sequence"
    assert [vars(event.token) for event in streamed] == [vars(token) for token in answer.details.tokens]


def test_seeds(hub: InferenceClient) -> None:
    first, second = (hub.text_generation(PROMPT, **DRAWN, seed=seed, details=True) for seed in (1, 2))
    assert first.generated_text != second.generated_text and first.details.seed == 1
    free = hub.text_generation(PROMPT, **DRAWN, details=True)
    again = hub.text_generation(PROMPT, **DRAWN, details=True, seed=free.details.seed)
    assert again == free, "the seed that was chosen is told"


def test_what_is_drawn_only_if_asked(hub: InferenceClient) -> None:
    greedy = hub.text_generation(PROMPT, max_new_tokens=12)
    assert hub.text_generation(PROMPT, max_new_tokens=12, temperature=1.0) == greedy
    for wish in ({"top_k": 1}, {"top_p": 1e-6}, {"do_sample": True, "temperature": 0.01}):
        assert hub.text_generation(PROMPT, max_new_tokens=12, **wish) == greedy, wish
    for wish in ({"frequency_penalty": 2.0}, {"repetition_penalty": 1.8}, {"do_sample": True, "temperature": 3.0}):
        assert hub.text_generation(PROMPT, max_new_tokens=12, **wish) != greedy, wish


def test_the_best_of_some(hub: InferenceClient) -> None:
    details = hub.text_generation(PROMPT, **DRAWN, best_of=4, details=True).details
    assert len(details.best_of_sequences) == 3 and details.seed is None
    means = [sum(token.logprob for token in one.tokens) / len(one.tokens) for one in (
        details, *details.best_of_sequences)]
    assert means[0] == max(means) and len(set(means)) > 1
    assert hub.text_generation(PROMPT, **DRAWN, best_of=2)


def test_truncate_keeps_the_end(server: ServerProcess, hub: InferenceClient) -> None:
    wish = {"max_new_tokens": 6, "details": True, "decoder_input_details": True}
    ids = completion(server, max_tokens=1)["prompt_token_ids"]
    cut = hub.text_generation(PROMPT, **wish, truncate=2)
    assert [token.id for token in cut.details.prefill] == ids[-2:]
    assert hub.text_generation(PROMPT, **wish, truncate=99) == hub.text_generation(PROMPT, **wish)


SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
          "additionalProperties": False}


@pytest.mark.parametrize("grammar", [
    {"type": "json", "value": SCHEMA}, {"type": "json", "value": json.dumps(SCHEMA)},
    {"type": "json_schema", "value": {"name": "place", "schema": SCHEMA}}], ids=["json", "text", "json_schema"])
def test_json_forms(hub: InferenceClient, grammar: dict[str, Any]) -> None:
    text = hub.text_generation(PROMPT, max_new_tokens=60, grammar=grammar)
    assert json.loads(text)["city"] in ("Oslo", "Rome")


def test_a_regex_ends_where_it_is_complete(hub: InferenceClient) -> None:
    answer = hub.text_generation(PROMPT, grammar={"type": "regex", "value": "[0-9]{3}-x"}, details=True)
    assert answer.generated_text[3:] == "-x" and answer.generated_text[:3].isdecimal()
    assert answer.details.finish_reason == "eos_token"
    last = answer.details.tokens[-1]
    assert last.special and last.text == "<|im_end|>"
    assert "".join(token.text for token in answer.details.tokens if not token.special) == answer.generated_text


@pytest.mark.parametrize(("parameters", "named"), [
    ({"typical_p": 0.5}, "typical_p"), ({"watermark": True}, "watermark"), ({"best_of": 2}, "best_of"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "best_of"), ({"best_of": 0}, "best_of"),
    ({"best_of": 129, "do_sample": True}, "best_of"), ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": 1000}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"), ({"top_p": 2.0}, "top_p"),
    ({"truncate": 0}, "truncate"), ({"stop": ["a"] * 65}, "stop"), ({"stop": [""]}, "stop"),
    ({"top_n_tokens": 65}, "top_n_tokens"), ({"adapter_id": "other"}, "other"), ({"seed": 2**64}, "seed"),
    ({"grammar": {"type": "regex", "value": "("}}, "grammar"), ({"grammar": {"type": "regex", "value": {}}}, "grammar"),
    ({"grammar": {"type": "json", "value": 3}}, "grammar"), ({"grammar": {"type": "xml", "value": ""}}, "grammar"),
    ({"grammar": {"type": "json_schema", "value": {"strict": True}}}, "grammar"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"), ({"details": 1}, "details"), ({"nothing": 1}, "nothing"),
])
def test_what_is_refused_is_named(server: ServerProcess, parameters: dict[str, Any], named: str) -> None:
    answer = post(server, **parameters)
    assert answer.status_code == 422, answer.text
    assert answer.json().keys() == {"error", "error_type"} and answer.json()["error_type"] == "validation"
    assert named in answer.json()["error"]


def test_what_asks_for_nothing_is_taken(server: ServerProcess) -> None:
    plain = post(server, max_new_tokens=4).json()
    assert post(server, max_new_tokens=4, typical_p=1.0, watermark=False, best_of=1, details=False).json() == plain


def test_the_client_knows_the_errors(server: ServerProcess, hub: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="max_new_tokens is 1000"):
        hub.text_generation(PROMPT, max_new_tokens=1000)
    for wish in ({"best_of": 2, "do_sample": True}, {"decoder_input_details": True, "details": True}):
        with pytest.raises(ValidationError, match="stream"):
            list(hub.text_generation(PROMPT, stream=True, **wish))
    with pytest.raises(ValidationError, match="inputs"):
        hub.text_generation("")
    with pytest.raises(ValidationError, match="inputs"):
        hub.text_generation("word " * 600)
    with pytest.raises(HfHubHTTPError, match="404"):
        InferenceClient(model=f"{server.url}/generates").text_generation(PROMPT)


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_on_the_way_is_a_failed_generation(hub: InferenceClient, stream: bool) -> None:
    wish: dict[str, Any] = {"repetition_penalty": 1e-38, "max_new_tokens": 40, "stream": stream, "details": True}
    with pytest.raises(GenerationError, match="repetition_penalty"):
        list(hub.text_generation(PROMPT, **wish))


def test_a_reader_that_leaves_ends_its_generation(server: ServerProcess) -> None:
    grammar = {"type": "regex", "value": "[a-z ]{3000}"}  # so that it does not end by itself
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 400, "grammar": grammar}}
    with httpx.Client(base_url=server.url, timeout=60) as client, client.stream(
            "POST", "/generate_stream", json=body) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    server.wait_idle()
    newest = server.http.get("/v1/stats").json()["requests"][0]
    assert (newest["finish_reason"], newest["kind"]) == ("abort", "generate")
    wait_for(lambda: server.gauge("xllm:num_requests_running") == 0, what="no request is running")


def test_info(server: ServerProcess) -> None:
    info = server.http.get("/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["max_input_tokens"]) == ("demo", 512, 511)
    assert post(server, stop=["a"] * info["max_stop_sequences"], max_new_tokens=1).status_code == 200
    assert post(server, best_of=info["max_best_of"], do_sample=True, max_new_tokens=1).status_code == 200
