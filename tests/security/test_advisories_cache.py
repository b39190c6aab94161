"""Published attacks on what callers share: the prefix cache, the queue, and the engine's state."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.scheduler.harness import Simulation
from tests.security.advisories import advisory
from tests.security.wire import ALICE, BOB, ROOT_KEY, bearer
from tests.serving.server_process import ROOT, ServerProcess, wait_for
from xllm.kv.block import block_digests

SECRET = "def transfer_all_the_money(account, amount):\n    total = account.balance - amount\n" * 4
TIERS = ("--num-kv-blocks", "36", "--max-num-seqs", "2", "--host-cache-size", "8MiB", "--disk-cache-size", "64MiB")


def cached(server: ServerProcess, key: str, prompt: str = SECRET, **extra: Any) -> dict[str, Any]:
    """Where the cached tokens of a call were, and how many."""
    answer = httpx.post(f"{server.url}/v1/completions", headers=bearer(key), timeout=60,
                        json={"prompt": prompt, "max_tokens": 1, "temperature": 0, **extra})
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]


@pytest.fixture(scope="module")
def tiered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A device that holds one prompt and little more, with host memory and disk below it, for two callers."""
    folder = Path(tmp_path_factory.mktemp("tiered"))
    (folder / "keys").write_text(f"alice {ALICE}\nbob {BOB}\n")
    with ServerProcess(folder / "log.txt", "--api-key-file", str(folder / "keys"), *TIERS, "--disk-cache-dir",
                       str(folder / "disk"), key=ALICE) as running:
        yield running


@advisory("CVE-2025-46570", "vllm-RFC-16016")
def test_a_callers_cache_is_its_own(keyed: ServerProcess, advisory_id: str) -> None:
    """What one caller has asked is no faster for another, whatever salt that one sends along."""
    assert cached(keyed, ALICE)["cached_tokens"] == 0
    assert cached(keyed, ALICE)["cached_tokens"] > 32
    for salt in (None, "alice", "5:alice:-", "key-alice", "-", "5:alice:"):
        extra = {} if salt is None else {"cache_salt": salt}
        assert cached(keyed, BOB, **extra)["cached_tokens"] == 0, salt
    assert cached(keyed, ROOT_KEY)["cached_tokens"] == 0
    assert cached(keyed, BOB)["cached_tokens"] > 32, "its own it does find"
    assert cached(keyed, ALICE, cache_salt="user-1")["cached_tokens"] == 0
    assert cached(keyed, ALICE, cache_salt="user-1")["cached_tokens"] > 32


@advisory("CVE-2025-46570")
def test_on_every_tier(tiered: ServerProcess, advisory_id: str) -> None:
    """Pushed down to host memory and to disk by other prompts, a caller's blocks are still nobody else's."""
    cached(tiered, ALICE)
    for number in range(6):
        cached(tiered, BOB, f"class Filler{number}:\n    value = {number}\n" * 20)
    found = cached(tiered, ALICE)
    assert found["cached_tokens"] > 32
    assert found["cached_tokens_by_tier"]["l3"] + found["cached_tokens_by_tier"]["l4"] > 0, "it had left the device"
    for number in range(6):
        cached(tiered, BOB, f"class Other{number}:\n    value = {number}\n" * 20)
    assert cached(tiered, BOB)["cached_tokens"] == 0
    assert cached(tiered, ALICE)["cached_tokens"] > 32


@advisory("CVE-2025-25183")
def test_block_digests_do_not_collide_and_do_not_change(advisory_id: str) -> None:
    """Python's hash(None) was constant there. These are BLAKE2b of tokens, length and salt: the same in every process,
    different for whatever differs."""
    tokens = np.arange(64, dtype=np.int32)
    seen: dict[bytes, tuple[Any, ...]] = {}
    for salt, size, start in itertools.product(["", "0", "None", "a", "a:", "\0", "é"], [4, 8, 16], [0, 1, 2]):
        for i, digest in enumerate(block_digests(tokens[start:], size, salt)):
            assert len(digest) == 16
            assert digest not in seen, (seen.get(digest), salt, size, start, i)
            seen[digest] = (salt, size, start, i)
    code = ("import numpy as np; from xllm.kv.block import block_digests; "
            "print(block_digests(np.arange(64, dtype=np.int32), 16, 'a')[-1].hex())")
    for hash_seed in ("0", "1"):
        shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                               env={"PYTHONHASHSEED": hash_seed, "PATH": "/usr/bin"}).stdout.strip()
        assert shown == block_digests(tokens, 16, "a")[-1].hex()


def hit_rate_under_flood(**settings: Any) -> float:
    """One caller asks the same prefix again and again; between two of its turns another sends prompts that it never
    repeats, together one and a half times the whole cache."""
    simulation = Simulation(num_blocks=64, max_num_seqs=4, **settings)
    prefix, hits, num_turns = [(7 * i) % 50 for i in range(60)], 0, 40
    rng = np.random.default_rng(0)
    for turn in range(num_turns):
        simulation.add(f"victim{turn}", [*prefix, turn], max_tokens=1, cache_salt="victim", tenant="victim")
        simulation.run()
        hits += simulation.finished[f"victim{turn}"].num_cached_tokens
        for i in range(6):
            simulation.add(f"flood{turn}-{i}", rng.integers(0, 50, 70).tolist(), max_tokens=1, cache_salt="flood",
                           tenant="flood")
        simulation.run()
    return hits / (num_turns * len(prefix))


@advisory("KV-cache-flood")
def test_a_flood_does_not_evict_what_others_use(advisory_id: str) -> None:
    """The default eviction policy keeps a prefix that is used; plain LRU would have lost it every time."""
    assert hit_rate_under_flood() >= 0.9
    assert hit_rate_under_flood(eviction_policy="lru") == 0.0


@advisory("KV-cache-flood")
def test_a_flood_of_requests_does_not_hold_the_queue(keyed: ServerProcess, advisory_id: str) -> None:
    """Two hundred waiting requests of one caller: another's is served long before them (policy `fair`)."""
    flood = httpx.Client(base_url=keyed.url, headers=bearer(BOB), timeout=60)
    body = {"prompt": [f"def f{i}(x):" for i in range(200)], "max_tokens": 60, "ignore_eos": True, "stream": True}
    with flood, flood.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        wait_for(lambda: keyed.gauge("xllm:num_requests_waiting") > 100, what="a queue")
        mine = keyed.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        assert mine.status_code == 200
        assert keyed.gauge("xllm:num_requests_waiting") > 50, "the flood still waits"
    keyed.wait_idle()


@pytest.fixture(scope="module")
def speculating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("spec") / "log.txt", "--speculative-method", "ngram",
                       "--num-speculative-tokens", "4") as running:
        yield running


@advisory("CVE-2026-44223")
def test_parameters_and_speculation_in_pairs(speculating: ServerProcess, advisory_id: str) -> None:
    """Penalties with drafts crashed the engine for good: each that looks back at the output, with every other
    parameter and with each other, twice the same answer, and no end."""
    looking_back: list[dict[str, Any]] = [
        {"presence_penalty": 1.5}, {"frequency_penalty": -1.5}, {"repetition_penalty": 1.3}, {"bad_words": ["return"]}]
    others: list[dict[str, Any]] = [
        {"logit_bias": {"5": 50}}, {"allowed_token_ids": list(range(3, 400))}, {"min_tokens": 5}, {"logprobs": 3},
        {"prompt_logprobs": 2}, {"stop": ["("]}, {"n": 3}, {"top_k": 3, "temperature": 1.0}, {"min_p": 0.2}]
    base = {"prompt": "a = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1,", "max_tokens": 8, "temperature": 0, "seed": 1}
    for pair in [*itertools.product(looking_back, others), *itertools.combinations(looking_back, 2)]:
        body = {**base, **pair[0], **pair[1]}
        texts = set()
        for _ in range(2):
            answer = speculating.http.post("/v1/completions", json=body)
            assert answer.status_code == 200, (pair, answer.text)
            texts.add(str([choice["text"] for choice in answer.json()["choices"]]))
        assert len(texts) == 1, pair
    assert speculating.health().status_code == 200
    assert speculating.gauge("xllm:spec_decode_num_draft_tokens_total") > 0
