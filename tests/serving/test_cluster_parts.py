"""What an instance tells a cluster about itself: which KV blocks it has, and which model."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from serving.cluster import cached_blocks
from serving.cluster.cached_blocks import CachedBlocks
from serving.cluster.model_fingerprint import model_fingerprint
from xllm.config import EngineConfig, ModelSettings
from xllm.engine.commands import CacheChanges
from xllm.engine.facts import EngineFacts
from xllm.kv.block import DIGEST_BYTES, TIERS


def digests(joined: bytes) -> list[bytes]:
    return [joined[at:at + DIGEST_BYTES] for at in range(0, len(joined), DIGEST_BYTES)]


@pytest.mark.parametrize("num_engines", [1, 3])
def test_what_is_told_adds_up(num_engines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a client comes, the snapshot and the changes after it make what the engines have."""
    monkeypatch.setattr(cached_blocks, "DIGESTS_A_SLICE", 5)
    draw = random.Random(num_engines)
    names = [number.to_bytes(DIGEST_BYTES, "big") for number in range(40)]
    held = [[set[bytes]() for _ in TIERS] for _ in range(num_engines)]
    told, clients = CachedBlocks(num_engines), list[list[set[bytes]]]()

    def hear(client: list[set[bytes]], changes: CacheChanges) -> None:
        tier, stored, removed = client[changes.tier], digests(changes.stored), digests(changes.removed)
        assert tier.isdisjoint(stored) and tier.issuperset(removed)
        tier.difference_update(removed)
        tier.update(stored)

    for step in range(400):
        number, tier = draw.randrange(num_engines), draw.randrange(len(TIERS))
        if step % 40 == 0:
            clients.append([set() for _ in TIERS])
            for changes in told.snapshot():
                assert len(digests(changes.stored)) <= 5
                hear(clients[-1], changes)
        if draw.random() < 0.02:
            held[number] = [set() for _ in TIERS]
            found = told.forget(number)
        else:
            own = held[number][tier]
            removed = draw.sample(sorted(own), draw.randint(0, min(3, len(own))))
            stored = draw.sample(sorted(set(names) - own), min(3, 40 - len(own)))
            held[number][tier] = own - set(removed) | set(stored)
            found = [told.change(number, CacheChanges(tier, b"".join(stored), b"".join(removed)))]
        expected = [set[bytes]().union(*(tiers[tier] for tiers in held)) for tier in range(len(TIERS))]
        for client in clients:
            for changes in found:
                hear(client, changes)
            assert client == expected
        assert len(told) == len(set[bytes]().union(*expected))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "tokenizer.json").write_text("{}")
    (made / "model.safetensors").write_bytes(random.Random(0).randbytes(3 << 20))
    return made


def facts_of(folder: Path) -> EngineFacts:
    config = EngineConfig.from_flat(max_model_len=64)
    return EngineFacts(config=config, model_path=str(folder), vocab_size=8, hidden_size=8, eos_token_ids=(1,),
                       num_blocks=4)


def test_a_copy_of_a_model_is_that_model(folder: Path, tmp_path: Path) -> None:
    model = ModelSettings()
    first = model_fingerprint(model, facts_of(folder))
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    os.utime(copy / "model.safetensors", (1, 1))
    assert model_fingerprint(ModelSettings(model=str(copy)), facts_of(copy)) == first
    assert model_fingerprint(model, replace(facts_of(copy), num_blocks=9)) == first, "memory may differ"


def test_another_model_is_seen(folder: Path) -> None:
    model, facts = ModelSettings(), facts_of(folder)
    found = {model_fingerprint(model, facts)}
    for other in (replace(model, quantization="int8"), replace(model, hf_overrides='{"a": 1}')):
        found.add(model_fingerprint(other, facts))
    found.add(model_fingerprint(model, replace(facts, eos_token_ids=(2,))))
    weights = folder / "model.safetensors"
    for change in (lambda: (folder / "tokenizer.json").write_text("{ }"),
                   lambda: weights.write_bytes(random.Random(1).randbytes(3 << 20)),  # another training of the same
                   lambda: weights.write_bytes(weights.read_bytes() + b"x")):
        change()
        found.add(model_fingerprint(model, facts))
    assert len(found) == 7
