"""Adapters come and go, the engine is paused, put to sleep and woken, and requests are aborted, all at once and at
random; behind it the server is idle and answers as if nothing had been. `make nightly` runs it for longer."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from tests.adapters import write_adapter
from tests.serving.server_process import ServerProcess

ADMIN = {"Authorization": "Bearer an-admin-key-of-some-length"}
SECONDS = float(os.environ.get("RACES_S", "6"))
FIRST_SEED, NUM_SEEDS = int(os.environ.get("RACES_SEED", "0")), 2 if os.environ.get("HOSTILE_ALL") == "1" else 1
NUM_THREADS = 8
NAMES = ("one", "two", "three")
BODY = {"prompt": "def add(a, b):\n", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
# What may come of each: 404 where the adapter is not loaded, 409 where the engine's state does not allow it, 422 and
# 499 where somebody aborted the request, 503 where the engine takes none.
ACCEPTED = {"request": {200, 404, 409, 422, 499, 503}, "adapter": {200, 400, 409}, "engine": {200, 409}}


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("races")
    for seed, name in enumerate(NAMES):
        write_adapter(root / "loras" / name, seed)
    with ServerProcess(root / "log.txt", "--enable-lora", "--lora-folder", str(root / "loras"), "--max-loras", "2",
                       "--admin-api-key", ADMIN["Authorization"].removeprefix("Bearer ")) as server:
        yield server


class Racer:
    """One thread's calls. Each is remembered with its status."""

    def __init__(self, server: ServerProcess, seed: int, until_s: float):
        self.rng, self.until_s = random.Random(seed), until_s
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.wrong: list[str] = []
        self._http = httpx.Client(base_url=server.url, timeout=60)

    def run(self) -> None:
        kinds = (self.complete, self.stream, self.leave, self.adapter, self.engine, self.abort)
        with self._http:
            while time.monotonic() < self.until_s:
                self.rng.choices(kinds, (4, 4, 4, 3, 3, 1))[0]()

    def body(self) -> dict[str, object]:
        return {**BODY, "model": self.rng.choice(("demo", *NAMES)), "n": self.rng.choice((1, 1, 4)),
                "max_tokens": self.rng.randint(1, 40)}

    def note(self, kind: str, answer: httpx.Response) -> None:
        self.statuses[kind, answer.status_code] += 1
        if answer.status_code not in ACCEPTED[kind]:
            self.wrong.append(f"{answer.request.url}: {answer.status_code}: {answer.read().decode()[:300]}")

    def complete(self) -> None:
        self.note("request", self._http.post("/v1/completions", json=self.body()))

    def stream(self, events: int = 10**6) -> None:
        with self._http.stream("POST", "/v1/completions", json={**self.body(), "stream": True}) as answer:
            self.note("request", answer)
            for number, line in enumerate(answer.iter_lines()):
                if '"error"' in line and '"code":500' in line:
                    self.wrong.append(line)
                if number >= events:
                    return

    def leave(self) -> None:
        """Hang up in the middle."""
        self.stream(self.rng.randint(0, 6))

    def adapter(self) -> None:
        name = self.rng.choice(NAMES)
        if self.rng.random() < 0.6:
            body, path = {"lora_name": name, "lora_path": name}, "/v1/load_lora_adapter"
        else:
            body, path = {"lora_name": name}, "/v1/unload_lora_adapter"
        self.note("adapter", self._http.post(path, json=body, headers=ADMIN))

    def engine(self) -> None:
        """Hold it or put it to sleep for a moment, together with whoever else does."""
        if self.rng.random() < 0.5:
            path, body, back = "/pause", {"mode": self.rng.choice(("keep", "abort"))}, "/resume"
        else:
            path, body, back = "/sleep", {"level": self.rng.choice((1, 2))}, "/wakeup"
        self.note("engine", self._http.post(path, json=body, headers=ADMIN))
        time.sleep(self.rng.random() * 0.1)
        self.note("engine", self._http.post(back, headers=ADMIN))

    def abort(self) -> None:
        self.note("engine", self._http.post("/abort", json={"abort_all": True}, headers=ADMIN))


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + NUM_SEEDS))
def test_everything_at_once(raced: ServerProcess, seed: int) -> None:
    quiet = answers(raced)
    racers = [Racer(raced, seed * NUM_THREADS + index, time.monotonic() + SECONDS) for index in range(NUM_THREADS)]
    threads = [threading.Thread(target=racer.run) for racer in racers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):  # nobody waits for ever on what another one held
        time.sleep(0.3)
        for path in ("/wakeup", "/resume"):
            raced.http.post(path, headers=ADMIN)
    for thread in threads:
        thread.join()
    assert not [wrong for racer in racers for wrong in racer.wrong]
    statuses = sum((racer.statuses for racer in racers), Counter())
    assert statuses["request", 200] > 10 and statuses["adapter", 200] and statuses["engine", 200] > 10, statuses
    assert raced.http.post("/wakeup", headers=ADMIN).status_code == 200
    assert raced.http.post("/resume", headers=ADMIN).status_code == 200
    for name in NAMES:
        raced.http.post("/v1/unload_lora_adapter", json={"lora_name": name}, headers=ADMIN)
    raced.wait_idle()
    assert answers(raced) == quiet
    assert "Traceback" not in raced.log


def answers(server: ServerProcess) -> list[str]:
    """The texts of the model and of two adapters, which are loaded for it."""
    texts = []
    for name in ("demo", *NAMES[:2]):
        if name != "demo":
            body = {"lora_name": name, "lora_path": name}
            assert server.http.post("/v1/load_lora_adapter", json=body, headers=ADMIN).status_code == 200
        answer = server.http.post("/v1/completions", json={**BODY, "model": name})
        assert answer.status_code == 200, answer.text
        texts.append(answer.json()["choices"][0]["text"])
    for name in NAMES[:2]:
        assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": name}, headers=ADMIN).is_success
    return texts
