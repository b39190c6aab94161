"""Texts, stop strings, log-probabilities and forms of a sentencepiece model, whose decoder drops a text's first blank:
all ways to ask give what the answer adds to its prompt (transformers#22710, vllm#2123, vllm#19368, vllm#44319)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.sentencepiece_model import write_checkpoint
from tests.serving.server_process import ServerProcess
from xllm import LLM, AsyncLLM, SamplingParams, StructuredOutput
from xllm.text.tokenizer import Tokenizer, load_tokenizer

SMILE = ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
CHAINS = [
    ["▁Hello", "▁world", "▁is", "▁good"],
    ["▁def", "▁▁▁▁", "return", "▁x"],
    ["▁smile", *SMILE, "▁yes", "!"],
    ["▁part", "▁one", "<sep>", "▁two"],
    ["]", "▁Sure", "▁thing"],
]
GREEDY = {"model": "pieces", "temperature": 0, "max_tokens": 12}
TEXTS = {"Hello": " world is good", "def": "    return x", "smile": "😀 yes!", "part": " one two"}
ENGINE = {"device": "cpu", "dtype": "float32", "num_kv_blocks": 64, "max_model_len": 128, "num_threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("pieces"), CHAINS)


@pytest.fixture(scope="module")
def pieces(folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(folder / "log.txt", str(folder), "--served-model-name", "pieces") as server:
        yield server
        server.wait_idle()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def complete(server: ServerProcess, prompt: Any, **wish: Any) -> dict[str, Any]:
    """The one choice."""
    response = server.http.post("/v1/completions", json={**GREEDY, "prompt": prompt, **wish})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def chunks(server: ServerProcess, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with server.http.stream("POST", path, json={**GREEDY, **body, "stream": True}) as response:
        assert response.status_code == 200
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


@pytest.mark.parametrize(("prompt", "text"), TEXTS.items(), ids=TEXTS)
def test_an_answer_continues_its_prompt(pieces, tokenizer, prompt, text):
    ids = tokenizer.encode(prompt)
    for given, echoed in ((prompt, prompt), (ids, tokenizer.decode(ids))):
        assert complete(pieces, given)["text"] == text
        assert complete(pieces, given, echo=True)["text"] == echoed + text
        for echo in (False, True):
            streamed = chunks(pieces, "/v1/completions", {"prompt": given, "echo": echo})
            assert "".join(chunk["text"] for chunk in streamed) == (echoed if echo else "") + text
    both = pieces.http.post("/v1/completions", json={**GREEDY, "prompt": [prompt, "Hello"], "n": 2}).json()["choices"]
    assert [choice["text"] for choice in both] == [text, text, TEXTS["Hello"], TEXTS["Hello"]]


@pytest.mark.parametrize(("prompt", "stop", "text"), [
    ("Hello", " world", ""), ("Hello", "o w", TEXTS["Hello"]), ("Hello", "lo", TEXTS["Hello"]), ("def", "    r", ""),
    ("part", "<sep>", " one"), ("part", "ne<sep> t", " o"), ("part", "e t", " on"), ("part", "<", TEXTS["part"]),
    ("smile", "😀", ""), ("Hello", "good</s>", " world is ")])
def test_stop_strings(pieces, prompt, stop, text):
    choice = complete(pieces, prompt, stop=stop)
    assert choice["text"] == text
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None if text == TEXTS[prompt] else stop)
    assert "".join(c["text"] for c in chunks(pieces, "/v1/completions", {"prompt": prompt, "stop": stop})) == text
    if text != TEXTS[prompt]:
        assert complete(pieces, prompt, stop=stop, include_stop_str_in_output=True)["text"] == text + stop


def test_legacy_logprobs(pieces):
    whole = complete(pieces, "Hello", logprobs=2)
    logprobs = whole["logprobs"]
    assert logprobs["tokens"] == [" world", " is", " good", "</s>"]
    assert logprobs["text_offset"] == [0, 6, 9, 14]
    streamed = chunks(pieces, "/v1/completions", {"prompt": "Hello", "logprobs": 2})
    for name in ("tokens", "text_offset"):
        assert [value for chunk in streamed for value in chunk["logprobs"][name]] == logprobs[name]
    echoed = {"prompt": "Hello", "logprobs": 2, "echo": True}
    whole, streamed = complete(pieces, **echoed), chunks(pieces, "/v1/completions", echoed)
    for name in whole["logprobs"]:
        assert [value for chunk in streamed for value in chunk["logprobs"][name]] == whole["logprobs"][name]
    named = complete(pieces, "Hello", logprobs=2, return_tokens_as_token_ids=True)["logprobs"]
    assert all(name.startswith("token_id:") for name in named["tokens"])
    assert named["text_offset"] == logprobs["text_offset"]


def test_parts_of_characters_and_hidden_tokens_keep_the_offsets(pieces):
    smile = complete(pieces, "smile", logprobs=1)["logprobs"]
    assert smile["tokens"] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80", " yes", "!", "</s>"]
    assert smile["text_offset"] == [0, 0, 0, 0, 1, 5, 6]
    part = complete(pieces, "part", logprobs=1)["logprobs"]
    assert (part["tokens"], part["text_offset"]) == ([" one", "<sep>", " two", "</s>"], [0, 4, 4, 8])
    shown = complete(pieces, "part", logprobs=1, skip_special_tokens=False)
    assert shown["logprobs"]["text_offset"] == [0, 4, 9, 13] and shown["text"] == " one<sep> two"
    cut = complete(pieces, "Hello", logprobs=1, stop="s g")
    assert (cut["text"], cut["logprobs"]["text_offset"]) == (" world i", [0, 6, 8])


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(("prompt", "stop"), [
    ("Hello", "s g"), ("Hello", " is good"), ("Hello", "good</s>"), ("Hello", "world is bad"),
    ("Hello", ["d is b", "s go"]), ("part", "one<sep> t"), ("part", "e<sep> t"), ("part", "ne t"), ("smile", "😀 y"),
    ("smile", "yes!?"), ("def", "  r")])
def test_a_stream_sends_the_offsets_of_the_whole(pieces, prompt, stop, echo):
    """Also where text is held back, whether a stop string comes of it or not."""
    body = {"prompt": prompt, "logprobs": 1, "stop": stop, "echo": echo}
    whole, streamed = complete(pieces, **body), chunks(pieces, "/v1/completions", body)
    shown = 0
    for chunk in streamed:
        shown += len(chunk["text"])
        assert all(offset <= shown for offset in chunk["logprobs"]["text_offset"])
    for name, values in whole["logprobs"].items():
        assert [value for chunk in streamed for value in chunk["logprobs"][name]] == values
    assert whole["logprobs"]["text_offset"] == sorted(whole["logprobs"]["text_offset"])
    assert len(whole["text"]) == shown


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
def test_echoed_logprobs(pieces, tokenizer, as_ids):
    prompt = tokenizer.encode("smile") if as_ids else "smile"
    choice = complete(pieces, prompt, echo=True, logprobs=1)
    logprobs, text = choice["logprobs"], choice["text"]
    bos = len("<s>") if as_ids else 0  # a prompt of token ids is echoed with its special tokens
    assert text == ("<s> smile" if as_ids else "smile") + TEXTS["smile"]
    assert logprobs["tokens"][:2] == ["<s>", " smile" if as_ids else "smile"]
    assert logprobs["text_offset"][:2] == [0, bos]
    for token, offset in list(zip(logprobs["tokens"], logprobs["text_offset"]))[1:-1]:
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    assert logprobs["text_offset"][-1] == len(text)


def test_echo_of_a_prompt_that_ends_within_a_character(pieces, tokenizer):
    ids = [*tokenizer.encode("smile"), *map(tokenizer.backend.token_to_id, SMILE[:2])]
    whole = complete(pieces, ids, echo=True, logprobs=1)
    assert whole["text"] == "<s> smile😀 yes!"
    assert whole["logprobs"]["text_offset"] == [0, 3, 9, 9, 9, 9, 10, 14, 15]
    assert complete(pieces, ids)["text"] == "😀 yes!"
    streamed = chunks(pieces, "/v1/completions", {"prompt": ids, "echo": True})
    assert "".join(chunk["text"] for chunk in streamed) == whole["text"]
    assert complete(pieces, ids, echo=True, max_tokens=0)["text"] == "<s> smile\ufffd\ufffd"


@pytest.mark.parametrize("asked", [1, 5, 20, 64])
def test_no_candidate_is_lost(pieces, asked):
    for prompt in TEXTS:
        for top in complete(pieces, prompt, logprobs=asked)["logprobs"]["top_logprobs"]:
            assert len(top) == asked, prompt
    body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": asked}
    answer = pieces.http.post("/v1/chat/completions", json={**GREEDY, **body}).json()["choices"][0]
    for entry in answer["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == asked


def test_chats(pieces, tokenizer):
    """The rule is the same behind a template's text: the blank of `▁Sure` is part of the answer."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 1,
            "return_token_ids": True}
    answer = pieces.http.post("/v1/chat/completions", json={**GREEDY, **body}).json()
    choice = answer["choices"][0]
    prompt = answer["prompt_token_ids"]
    whole = tokenizer.decode(prompt + choice["token_ids"], skip_special_tokens=True)
    assert choice["message"]["content"] == " Sure thing" == whole[len(tokenizer.decode(prompt, True)):]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [" Sure", " thing", "</s>"]
    assert [bytes(entry["bytes"]) for entry in content] == [b" Sure", b" thing", b"</s>"]
    streamed = chunks(pieces, "/v1/chat/completions", body)
    assert "".join(chunk["delta"].get("content") or "" for chunk in streamed) == " Sure thing"
    assert [e["token"] for c in streamed if c.get("logprobs") for e in c["logprobs"]["content"]] == [
        " Sure", " thing", "</s>"]
    messages = pieces.http.post("/v1/messages", json={"model": "pieces", "messages": body["messages"],
                                                      "max_tokens": 9, "temperature": 0}).json()
    responses = pieces.http.post("/v1/responses", json={"model": "pieces", "input": "Hi", "temperature": 0}).json()
    assert messages["content"][0]["text"] == responses["output"][0]["content"][0]["text"] == " Sure thing"


@pytest.mark.parametrize("prompt", ["Hello", [1], [1, 1]], ids=["text", "bos", "hidden-tokens"])
@pytest.mark.parametrize(("form", "texts"), [
    ({"choice": [" world"]}, [" world"]), ({"choice": ["world"]}, ["world"]), ({"choice": ["  world"]}, ["  world"]),
    ({"regex": " world| good"}, [" world", " good"]), ({"regex": "world|is"}, ["world", "is"]),
    ({"grammar": 'start: " is"'}, [" is"])], ids=str)
def test_what_is_returned_is_of_its_form(pieces, prompt, form, texts):
    text = complete(pieces, prompt, structured_outputs=form)["text"]
    assert text in texts
    streamed = chunks(pieces, "/v1/completions", {"prompt": prompt, "structured_outputs": form})
    assert "".join(chunk["text"] for chunk in streamed) == text


def test_bad_words_are_banned_glued_to_others_too(pieces):
    for word in ("return", " return"):
        assert "return" not in complete(pieces, "def", bad_words=[word])["text"]
    assert "world" not in complete(pieces, "Hello", bad_words=["world"])["text"]


def test_prompts_token_by_token(pieces, tokenizer):
    ids = tokenizer.encode("Hello world")
    answer = pieces.http.post("/tokenize", json={"prompt": "Hello world", "return_token_strs": True}).json()
    assert (answer["tokens"], answer["token_strs"]) == (ids, ["<s>", " Hello", " world"])
    whole = pieces.http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert "".join(answer["token_strs"]) == whole == "<s> Hello world"
    scored = complete(pieces, ids, prompt_logprobs=0)["prompt_logprobs"]
    assert scored[0] is None
    assert [entry[str(i)]["decoded_token"] for i, entry in zip(ids[1:], scored[1:])] == ["Hello", " world"]
    sampled = pieces.http.post("/v1/sample", json={"model": "pieces", "prompt": "Hello world is", "selector": {
        "type": "literal", "value": "world"}, "logprobs": 3})
    assert sampled.status_code == 200, sampled.text
    assert sampled.json()["choices"][0]["text"] == " world"


def test_the_python_api_says_the_same(folder):
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=1, prompt_logprobs=0)
    with LLM(str(folder), **ENGINE) as llm:
        for output, text in zip(llm.generate(list(TEXTS), params, use_tqdm=False), TEXTS.values(), strict=True):
            (choice,) = output.outputs
            assert choice.text == text
            assert output.prompt_logprobs[1][output.prompt_token_ids[1]].decoded_token == output.prompt
            said = [entry[i].decoded_token for i, entry in zip(choice.token_ids, choice.logprobs)]
            if text.isascii():
                assert "".join(t for t in said if not t.startswith("<")) == text
        stop = SamplingParams(temperature=0, max_tokens=12, stop=["one<sep>", " world"])
        cut = llm.generate(["part", "Hello"], stop, use_tqdm=False)
        assert [(o.outputs[0].text, o.outputs[0].stop_reason) for o in cut] == [(" ", "one<sep>"), ("", " world")]
        form = SamplingParams(temperature=0, structured=StructuredOutput(choice=[" good"]))
        assert [o.outputs[0].text for o in llm.generate(["Hello", [1]], form, use_tqdm=False)] == [" good", " good"]
        assert llm.chat([{"role": "user", "content": "Hi"}], params, use_tqdm=False)[0].outputs[0].text == " Sure thing"


def test_async_deltas_say_the_same(folder):
    async def ask() -> str:
        async with AsyncLLM(model=str(folder), **ENGINE) as llm:
            params = SamplingParams(temperature=0, max_tokens=12)
            return "".join([output.outputs[0].text async for output in llm.generate("def", params,
                                                                                    output_kind="delta")])

    assert asyncio.run(ask()) == TEXTS["def"]
