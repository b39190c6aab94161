"""`xllm generate`, `xllm chat` and `xllm doctor` as a user runs them."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from serving.commands import doctor, terminal
from serving.commands.doctor_groups import model_findings
from tests.serving.server_process import ROOT, ServerProcess, wait_for
from xllm import AsyncLLM, SamplingParams, bundled


def run(*args: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "serving.commands.cli", *args], cwd=ROOT, input=text,
                          capture_output=True, text=True, timeout=90, check=False, env={**os.environ, **environment})


def test_generate_prints_what_the_server_answers(server: ServerProcess) -> None:
    result = run("generate", "--prompt", "import os", "--prompt", "def main():", "--max-tokens", "8", "--temperature",
                 "0", "--stats", "--max-model-len", "128", "--num-kv-blocks", "64")
    assert result.returncode == 0, result.stderr
    answers = server.http.post("/v1/completions", json={"prompt": ["import os", "def main():"], "max_tokens": 8,
                                                        "temperature": 0}).json()["choices"]
    expected = f"--- 1: import os\n{answers[0]['text']}\n--- 2: def main():\n{answers[1]['text']}\n"
    assert result.stdout == expected
    assert "2 prompts, 16 tokens" in result.stderr


def test_chat_with_a_server(server: ServerProcess) -> None:
    result = run("chat", "--url", server.url, "--temperature", "0", "--max-tokens", "6",
                 text="Hello\n\n/clear\nHello\n")
    assert result.returncode == 0, result.stderr
    answer = server.http.post("/v1/chat/completions", json={
        "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 6}).json()
    assert result.stdout == 2 * (answer["choices"][0]["message"]["content"] + "\n")


def test_chat_in_this_process_equals_the_server(server: ServerProcess) -> None:
    flags = ("--temperature", "0", "--max-tokens", "6", "--system", "Be brief.")
    local = run("chat", "--max-model-len", "128", "--num-kv-blocks", "64", *flags, text="Hello\nAnd now?\n/exit\n")
    remote = run("chat", "--url", server.url, *flags, text="Hello\nAnd now?\n/exit\n")
    assert local.returncode == 0, local.stderr
    assert local.stdout == remote.stdout


def test_a_refused_message_does_not_stay_in_the_conversation(server: ServerProcess) -> None:
    flags = ("chat", "--url", server.url, "--temperature", "0", "--max-tokens", "6")
    refused = run(*flags, text="word " * 2000 + "\nHello\n")
    assert refused.returncode == 0, refused.stderr
    error, answer = refused.stdout.split("\n", 1)
    assert error.startswith("[messages")
    assert answer == run(*flags, text="Hello\n").stdout


def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on() -> None:
    loop = asyncio.new_event_loop()
    llm = AsyncLLM(device="cpu", num_kv_blocks=64, max_model_len=512, num_threads=1)
    try:
        ask = terminal._local(llm, SamplingParams(max_tokens=400, ignore_eos=True), loop)
        answer = ask([{"role": "user", "content": "Hello"}])
        loop.call_soon(loop.call_soon, _interrupt)  # when the answer has been asked for, before it is there
        with pytest.raises(KeyboardInterrupt):
            next(answer)
        again = ask([{"role": "user", "content": "And now?"}])
        assert isinstance(next(again), str)
        wait_for(lambda: llm.stats().num_running <= 1, what="the end of the interrupted answer")
        again.close()
    finally:
        llm.shutdown()
        loop.close()


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1:9"])
def test_chat_with_a_wrong_url_is_one_clear_line(url: str) -> None:
    result = run("chat", "--url", url, text="Hello\n")
    assert result.returncode == 1
    assert url in result.stderr
    assert "Traceback" not in result.stderr


def test_chat_without_a_server_is_one_clear_line() -> None:
    result = run("chat", "--url", "http://127.0.0.1:9", text="Hello\n")
    assert result.returncode == 1
    assert "no answer from http://127.0.0.1:9" in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor() -> None:
    """With the two ranks that it starts, and what it knows of a model's heads: 4, of which 2 are for KV."""
    result = run("doctor", str(Path(bundled.__file__).parent))
    assert result.returncode == 0, result.stdout
    lines = {line[8:30].strip(): line for line in result.stdout.splitlines()}
    assert re.match(r"ok +cpu group +2 ranks by gloo over lo\S*: 16 KiB take \d+ us; ", lines["cpu group"])
    assert re.search(r"bundled: 1, 2, 4 \(tensor_parallel_size 3 does not", lines["tensor_parallel_size"])
    assert "the CPU path works" in result.stdout
    used = next(line for line in result.stdout.splitlines() if "device auto" in line)
    assert ("cuda: " if torch.cuda.is_available() else "cpu: no accelerator was found") in used
    assert all(line.split()[0] in ("ok", "missing", "hint") for line in result.stdout.splitlines()[:-1])


def test_doctor_says_why_a_gpu_with_a_driver_is_not_used(tmp_path: Path) -> None:
    found = doctor._cuda(tmp_path)  # the folder stands for the driver's
    assert found.what == "cuda backend" and not found.needed
    if torch.cuda.is_available():
        assert found.state == doctor.OK and "device: " in found.detail
    else:
        assert found.state == doctor.MISSING and found.detail.startswith("the cuda backend needs ")


def test_doctor_says_what_is_used_and_why() -> None:
    missing = doctor.Finding(doctor.MISSING, "cuda backend", "the cuda backend needs a CUDA build of torch")
    found = doctor._choice([missing])
    if torch.cuda.is_available():
        assert found.detail.startswith("cuda: ") and "--device cpu" in found.detail
    else:
        assert found.state == doctor.HINT
        assert found.detail == f"cpu, for another device is not usable: {missing.detail}"


def test_doctor_fetches_no_model() -> None:
    (found,) = model_findings("some/model")
    assert (found.state, found.what) == (doctor.MISSING, "model") and "no folder here" in found.detail


def test_doctor_compiles_without_a_model() -> None:
    result = run("doctor", "some/model", "--compile")
    assert result.returncode == 1 and "--compile has nothing to do with a model" in result.stderr


def test_doctor_has_nothing_to_say_of_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._cuda(tmp_path / "driver").state == doctor.HINT
