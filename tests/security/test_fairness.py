"""A caller beside another one's flood, with the fair policy, on a real server: first token and tokens per second.

Times are compared with those of the same run without the flood.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.server_process import ServerProcess, wait_for

ALICE, MALLORY, OPS = "sk-alice", "sk-mallory", "sk-ops"
FAIRNESS_ALL = os.environ.get("FAIRNESS_ALL") == "1"  # the bounds themselves, which want a machine of their own
FLOODS: dict[str, dict[str, Any]] = {
    "decode": {"prompt": [[9, 8, 7], [9, 8, 6]], "n": 128, "max_tokens": 480, "ignore_eos": True},
    "prefill": {"prompt": [[5 + (i * 37 + j * 11) % 200 for j in range(480)] for i in range(200)], "max_tokens": 1},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = Path(tmp_path_factory.mktemp("fair"))
    (folder / "keys").write_text(f"alice {ALICE}\nmallory {MALLORY}\nops {OPS} admin\n")
    with ServerProcess(folder / "log.txt", "--api-key-file", str(folder / "keys"), "--scheduling-policy", "fair",
                       "--num-kv-blocks", "2048", "--no-enable-prefix-caching", key=OPS) as server:
        yield server
        server.wait_idle()


def head(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def stream(server: ServerProcess, num_tokens: int, start: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and when each came."""
    body = {"prompt": [7 + (start * 13 + j * 7) % 90 for j in range(20)], "max_tokens": num_tokens, "ignore_eos": True,
            "stream": True, "return_token_ids": True}
    began_s, times = time.monotonic(), list[float]()
    with httpx.stream("POST", f"{server.url}/v1/completions", headers=head(ALICE), json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times += [time.monotonic()] * len(json.loads(line[6:])["choices"][0]["token_ids"])
    assert len(times) == num_tokens
    return times[0] - began_s, times


def measure(server: ServerProcess, num_streams: int, num_tokens: int = 80) -> tuple[float, float]:
    """The longest time to a first token, and tokens per second from the first of all to the last."""
    with ThreadPoolExecutor(num_streams) as pool:
        found = list(pool.map(lambda start: stream(server, num_tokens, start), range(num_streams)))
    moments = sorted(moment for _, times in found for moment in times)
    return max(ttft for ttft, _ in found), len(moments) / (moments[-1] - moments[0])


@contextmanager
def flooded(server: ServerProcess, kind: str) -> Iterator[None]:
    """mallory sends as much as two calls at a time can, until the end."""
    over = threading.Event()

    def send() -> None:
        content = json.dumps(FLOODS[kind])
        with httpx.Client(base_url=server.url, timeout=120, headers=head(MALLORY)) as client:
            while not over.is_set():
                client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})

    senders = [threading.Thread(target=send) for _ in range(2)]
    for sender in senders:
        sender.start()
    wait_for(lambda: server.gauge("xllm:num_requests_running") > 3, what="the flood")
    time.sleep(1.0)
    try:
        yield
    finally:
        over.set()
        while any(sender.is_alive() for sender in senders):
            server.http.post("/abort", json={"abort_all": True})
            time.sleep(0.1)
        server.wait_idle()


@pytest.mark.parametrize("kind", FLOODS)
@pytest.mark.parametrize("num_streams", [1, 16] if FAIRNESS_ALL else [1])
def test_a_caller_beside_a_flood(shared: ServerProcess, kind: str, num_streams: int) -> None:
    """Its share is half of what it has alone; it keeps at least 0.4 of that, and its first token within a second."""
    shared.wait_idle()
    measure(shared, num_streams)
    _, alone = measure(shared, num_streams)
    with flooded(shared, kind):
        found = [measure(shared, num_streams) for _ in range(3)]
    print(json.dumps({"flood": kind, "streams": num_streams, "alone": round(alone), "beside": [
        {"ttft_s": round(ttft, 3), "tokens_per_s": round(rate)} for ttft, rate in found]}))
    assert min(ttft for ttft, _ in found) <= (1.0 if FAIRNESS_ALL else 5.0)
    assert max(rate for _, rate in found) >= (0.4 if FAIRNESS_ALL else 0.1) * alone / 2
