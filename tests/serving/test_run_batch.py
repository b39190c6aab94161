"""A batch file through a real server: answers by id, errors by line, and a run that was killed goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.serving.server_process import ROOT, ServerProcess


def line(name: str, url: str = "/v1/completions", **body: object) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})


def command(source: Path, output: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "serving.commands.cli", "run-batch", "-i", str(source), "-o", str(output), *flags]


def run(source: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(source, output, *flags), cwd=ROOT, capture_output=True, text=True, timeout=120)


def answers(output: Path) -> dict[str, dict]:
    found = [json.loads(text) for text in output.read_text(encoding="utf-8").splitlines()]
    assert len({entry["custom_id"] for entry in found}) == len(found)
    return {entry["custom_id"]: entry for entry in found}


def test_answers_and_errors(server: ServerProcess, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    greedy = {"max_tokens": 8, "temperature": 0}
    source.write_text("\n".join([
        line("a", prompt="def f(", **greedy),
        line("b", "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], **greedy),
        line("c", "/v1/embeddings", input="x"), "", line("d", prompt="", max_tokens=3), "{broken", "[1]",
        line("e", "/metrics"), line("f", prompt="x", stream=True), json.dumps({"url": "/v1/completions", "body": {}}),
        json.dumps({"custom_id": "g", "method": "GET", "url": "/v1/completions", "body": {}}),
    ]))
    done = run(source, output, "--url", server.url, "--api-key", server.key)
    assert done.returncode == 1 and "10 requests answered, 7 of them with an error" in done.stdout, done.stderr
    assert "requests: 100%" in done.stderr
    found = answers(output)
    direct = server.http.post("/v1/completions", json={"prompt": "def f(", **greedy}).json()
    assert found["a"]["response"]["body"]["choices"][0]["text"] == direct["choices"][0]["text"]
    assert found["a"]["error"] is None and found["a"]["response"]["status_code"] == 200
    assert found["b"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert len(found["c"]["response"]["body"]["data"][0]["embedding"]) > 8
    assert found["d"]["response"]["status_code"] == 400 and found["d"]["error"]["code"] == "400"
    for name in ("line-6", "line-7", "e", "f", "line-10", "g"):
        assert found[name]["response"] is None and found[name]["error"]["message"]


def test_a_run_that_was_killed_goes_on(server: ServerProcess, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(f"r{i}", prompt=f"x = {i}", max_tokens=40, ignore_eos=True) for i in range(40)))
    flags = ("--url", server.url, "--concurrency", "2")
    first = subprocess.Popen(command(source, output, *flags), cwd=ROOT, stderr=subprocess.DEVNULL)
    started_s = time.monotonic()
    while not (output.exists() and output.read_bytes().count(b"\n") >= 5):
        assert time.monotonic() - started_s < 60
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with output.open("ab") as file:
        file.write(b'{"id": "cut o')
    before = set(output.read_bytes().splitlines()[:-1])
    assert len(before) < 40
    done = run(source, output, *flags)
    assert done.returncode == 0, done.stderr
    assert len(answers(output)) == 40
    assert before <= set(output.read_bytes().splitlines()), "what was there is not asked again"
    again = run(source, output, *flags)
    assert again.returncode == 0 and "0 requests answered" in again.stdout
    assert "40 were there already" in again.stdout


def test_with_a_server_of_its_own(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a", prompt="x", max_tokens=2))
    done = run(source, output, "--", "--max-model-len", "64", "--num-kv-blocks", "32", "--served-model-name", "mine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert answers(output)["a"]["response"]["body"]["model"] == "mine"


@pytest.mark.parametrize(("flags", "message"), [
    (("--", "--max-model-len", "-3"), "max_model_len"),
    (("--url", "http://127.0.0.1:9", "--", "demo"), "takes no flags"),
    (("--concurrency", "0"), "concurrency"),
])
def test_what_is_wrong_is_said(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(line("a", prompt="x"))
    done = run(source, tmp_path / "out.jsonl", *flags)
    assert done.returncode == 1 and message in done.stderr, done.stderr


def test_files_that_are_no_batch(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    missing = run(source, output)
    assert missing.returncode == 1 and "no file" in missing.stderr
    source.write_text(line("a", prompt="x") + "\n" + line("a", prompt="y"))
    twice = run(source, output)
    assert twice.returncode == 1 and "twice" in twice.stderr
    output.write_text("a diary\n")
    foreign = run(source, output)
    assert foreign.returncode == 1 and "no output of run-batch" in foreign.stderr
    assert output.read_text() == "a diary\n"
