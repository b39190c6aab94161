"""`python -m tests.real.openai_server [VLLM]`: `xllm master` over a real `vllm serve` on the CPU, with an instance of
ours beside it. VLLM: the command, if there is one; else vLLM is installed for the run."""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
import time
from pathlib import Path

from tests.real.foreign import Foreign
from tests.real.vllm_process import VllmProcess
from tests.serving.server_process import ServerProcess, wait_for
from tests.serving.test_master import Master, free_ports, text_of

KEY = "the-key-of-vllm"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
    "additionalProperties": False}}}


class VllmServer(VllmProcess):
    """With KV events, and a key."""

    def __init__(self, command: Path, folder: Path):
        events, replay = free_ports(2)
        self.events = [f"tcp://127.0.0.1:{one}" for one in (events, replay)]
        config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{events}",
                  "replay_endpoint": f"tcp://*:{replay}"}
        forms = {"backend": "xgrammar", "disable_any_whitespace": True}
        super().__init__(command, folder / "vllm.log", "--structured-outputs-config", json.dumps(forms),
                         "--kv-events-config", json.dumps(config), key=KEY)

    def num_running(self) -> float:
        return self.metric("vllm:num_requests_running")


def same_answers(master: Master, server: VllmServer) -> str:
    body = {"model": "demo", "prompt": "def quicksort(items):", "max_tokens": 40, "temperature": 0, "logprobs": 2,
            "return_token_ids": True}
    direct = server.http.post("/v1/completions", json=body).json()["choices"][0]
    through = master.http.post("/v1/completions", json=body).json()["choices"][0]
    for name in ("text", "token_ids", "finish_reason"):
        assert direct[name] == through[name], (name, direct, through)
    assert direct["logprobs"]["token_logprobs"] == through["logprobs"]["token_logprobs"]
    refused = master.http.post("/v1/completions", json={**body, "logprobs": 30})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "logprobs", refused.text
    return "a greedy answer and its log-probabilities are vLLM's, what vLLM refuses is a 400"


def forms_and_tools(master: Master) -> str:
    form = {"prompt": "answer: ", "max_tokens": 30, "structured_outputs": {"choice": ["yes", "no"]}}
    assert master.http.post("/v1/completions", json=form).json()["choices"][0]["text"] in ("yes", "no")
    chat = {"messages": [{"role": "user", "content": "What is the weather in Oslo?"}], "max_tokens": 60,
            "temperature": 0, "tools": [TOOL], "tool_choice": "required"}
    answer = master.http.post("/v1/chat/completions", json=chat).json()["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome"), answer
    return "a choice and a tool call have their forms"


def prefixes(master: Master, server: VllmServer) -> str:
    prompt = "".join(f"value_{number} = {number * 7}\n" for number in range(25))
    server.http.post("/v1/completions", json={"model": "demo", "prompt": prompt, "max_tokens": 2}).raise_for_status()
    wait_for(lambda: master.cluster()["members"][0]["cached_blocks"] >= 6, what="the events")
    answer = master.http.post("/v1/completions", json={"prompt": prompt + "# 1", "max_tokens": 2}).json()
    decision = master.cluster()["decisions"][0]
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert decision["reason"] == "prefix" and decision["cached_tokens"] == cached == 192, (decision, answer)
    return f"a prefix of {cached} tokens is found by vLLM's events, and vLLM found it, too"


def abort(master: Master, server: VllmServer) -> str:
    body = {"prompt": "a = 1", "max_tokens": 490, "temperature": 0, "ignore_eos": True, "stream": True}
    with master.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert server.num_running() == 1
    taken_s = wait_for(lambda: server.num_running() == 0, what="the abort")
    assert taken_s < 1.0
    return f"an abort reached vLLM within {taken_s:.2f} s"


def killed(master: Master, server: VllmServer, own: str, log: Path, secret: Path) -> str:
    """Beside an instance of ours, whose fingerprint is that of the model from then on."""
    body = {"prompt": "def quicksort(items):\n" * 8, "max_tokens": 200, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}}
    expected, _ = text_of(master, body)
    with ServerProcess(log, "--cluster-listen", own, "--cluster-secret-file", str(secret), "--dtype", "float32"):
        wait_for(lambda: [one["state"] for one in master.cluster()["members"]] == ["active"] * 2, what="our instance")

        killed_s = 0.0

        def kill() -> None:
            nonlocal killed_s
            assert master.place() == "vllm"
            server.kill()
            killed_s = time.monotonic()

        text, usage = text_of(master, body, 30, kill)
        assert usage["completion_tokens"] == 200 and master.metric("cluster_recoveries_total") == 1
        same = next((place for place, (one, other) in enumerate(zip(text, expected)) if one != other), None)
        later_s = time.monotonic() - killed_s
        return (f"vLLM was killed; the answer went on at our instance, and ended {later_s:.1f} s later: " + (
                "the same text" if same is None else f"the same text for {same} of {len(expected)} characters"))


def run(command: Path, folder: Path) -> None:
    for name, content in (("secret", secrets.token_hex(32)), ("key", KEY)):
        (folder / name).write_text(content)
        (folder / name).chmod(0o600)
    server = VllmServer(command, folder)
    (port,) = free_ports(1)
    own = f"127.0.0.1:{port}"
    events, replay = server.events
    master = Master(folder, [own], "--openai-server",
                    f"vllm={server.url},events={events},replay={replay},api-key-file={folder / 'key'}")
    try:
        wait_for(lambda: master.http.get("/health").status_code == 200, what="the master")
        for said in (same_answers(master, server), forms_and_tools(master), prefixes(master, server),
                     abort(master, server), killed(master, server, own, folder / "own.log", folder / "secret")):
            print(said, flush=True)
    finally:
        master.http.close()
        master.stop()
        if server.process.poll() is None:
            server.kill()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="xllm-real-") as name:
        run(Path(sys.argv[1]) if len(sys.argv) > 1 else Foreign(Path(name)).vllm_server(), Path(name))
