"""`xllm serve --device npu`, asked by the openai client. Its processes inherit the device from their environment."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.npu.engines import IS_REAL
from tests.serving.server_process import ServerProcess
from xllm import LLM, SamplingParams

PROMPTS = ["def f(a, b):\n    return", "import os\nimport sys\n\n\ndef read", "class Stack:\n    def", "x = [1, 2, 3"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log: Path = tmp_path_factory.mktemp("server") / "log"
    with ServerProcess(log, "--device", "npu", "--dtype", "float16", "--num-kv-blocks", "40", "--max-num-seqs", "8",
                       "--speculative-method", "ngram") as made:  # fmt: skip
        yield made


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0, timeout=120)


def model_of(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_completions_are_the_cpu_s(client: openai.OpenAI) -> None:
    with LLM(dtype="float16", max_model_len=512, num_threads=1) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    expected = [output.outputs[0].text for output in outputs]

    def ask(prompt: str) -> str:
        done = client.completions.create(model=model_of(client), prompt=prompt, temperature=0, max_tokens=12)
        return done.choices[0].text

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(ask, PROMPTS))
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    assert same == len(PROMPTS) or (IS_REAL and same > 0)


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Write a function that adds two numbers."}]
    options = {"model": model_of(client), "messages": messages, "temperature": 0.7, "seed": 3, "max_tokens": 16}
    whole = client.chat.completions.create(**options)
    parts = [event.choices[0] for event in client.chat.completions.create(**options, stream=True) if event.choices]
    assert "".join(part.delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[-1].finish_reason == whole.choices[0].finish_reason
    assert whole.usage is not None and whole.usage.completion_tokens > 0


def test_what_it_ran_on(server: ServerProcess, client: openai.OpenAI) -> None:
    client.completions.create(model=model_of(client), prompt=PROMPTS[0], max_tokens=8)
    metrics = server.http.get("/metrics").text
    replays = [line for line in metrics.splitlines() if line.startswith("xllm:graph_replays") and "decode" in line]
    assert replays and any(float(line.split()[-1]) > 0 for line in replays)
    assert not [line for line in metrics.splitlines() if 'reason="capture_failed"' in line]
    assert server.http.get("/health").status_code == 200
    server.wait_idle()  # block 0 does not count


def test_a_request_that_is_too_long_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=model_of(client), prompt=[5] * 600, max_tokens=4)
