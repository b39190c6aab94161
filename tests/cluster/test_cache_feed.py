"""What a master knows of an instance's cache, through its gate, behind a network that takes out, repeats and exchanges
frames: it is right again within two seconds."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import time

import pytest

from serving.cluster.embedded import EmbeddedStore
from serving.cluster.instance_record import InstanceRecord
from serving.cluster.key_value_store import KeyValueStore
from tests.cluster.frame_network import FrameNetwork
from tests.cluster.members import Instance, Instances, Master
from xllm.client.remote import RemoteClient
from xllm.engine.commands import CacheChanges
from xllm.routing.global_index import GlobalIndex, TierChange, digest_keys

ALL = os.environ.get("INDEX_ALL") == "1"


class IndexingMaster(Master):
    """It keeps an index, as a cluster's master does."""

    index: GlobalIndex

    def _join(self, name: str, client: RemoteClient, record: InstanceRecord) -> None:
        super()._join(name, client, record)
        self.index.forget(name)
        client.on_cache_changes = lambda told: self.index.change(name, [
            TierChange(told.tier, digest_keys(told.stored), digest_keys(told.removed))])

    def _leave(self, name: str, reason: str) -> None:
        super()._leave(name, reason)
        self.index.leave(name)


class Told:
    """Random changes that an instance's engine tells."""

    def __init__(self, instance: Instance, seed: int):
        self._instance, self._rng = instance, random.Random(seed)
        self.tiers: list[set[bytes]] = [set(), set(), set()]

    def change(self) -> None:
        tier = self._rng.randrange(3)
        blocks = self.tiers[tier]
        removed = self._rng.sample(sorted(blocks), len(blocks) // 10)
        stored = [self._rng.randbytes(16) for _ in range(self._rng.randrange(1, 6))]
        blocks.difference_update(removed)
        blocks.update(stored)
        self._instance.engine.on_cache_changes(CacheChanges(tier, b"".join(stored), b"".join(removed)))

    def is_in(self, master: IndexingMaster) -> bool:
        return self._instance.name in master.index.names and all(
            set(master.index.keys_of(self._instance.name, tier).tolist()) == set(
                digest_keys(b"".join(blocks)).tolist()) for tier, blocks in enumerate(self.tiers))


async def test_frames_that_are_lost_repeated_or_exchanged_are_made_good(instances: Instances,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    async with KeyValueStore(EmbeddedStore()) as store:
        master = IndexingMaster(store)
        master.index = GlobalIndex(50_000)
        instance = await instances(store, "a:1")
        network, describe = await FrameNetwork(instance.gate.address).open(), instance.describe

        def behind_it() -> InstanceRecord | None:
            return (record := describe()) and dataclasses.replace(record, rpc_address=network.address)

        monkeypatch.setattr(instance.registration, "_describe", behind_it)
        told = Told(instance, 0)
        try:
            await asyncio.sleep(0.6)  # the record is written again
            await master.registry.start()
            await master.until(lambda: "a:1" in master.joined)
            reasons = {}
            for way in ("drop", "repeat", "exchange"):
                await master.until(lambda: told.is_in(master), 3.0)
                num_left = len(master.left)
                network.to_harm = [way]
                for _ in range(3):
                    told.change()
                    await asyncio.sleep(0.005)
                began_s = time.monotonic()
                await master.until(lambda num_left=num_left: len(master.left) > num_left and told.is_in(master), 2.0)
                reasons[way] = f"{master.left[-1][1]}; right after {time.monotonic() - began_s:.2f} s"
            assert network.harmed == {"drop": 1, "repeat": 1, "exchange": 1}
            twice = "a frame that it sent came changed, twice, or not in its turn"
            assert [reason for _, reason in master.left] == ["frames that it sent have not come", twice, twice]
            network.to_harm = ["", "drop"]  # of the next connection the greeting, behind a sign of life of this one
            instance.gate._drop_all("of this test")
            began_s = time.monotonic()
            await master.until(lambda: told.is_in(master) and network.harmed["drop"] == 2, 3.0)
            reasons["greeting"] = f"right after {time.monotonic() - began_s:.2f} s"
            print(reasons)
            network.rate = 0.05
            while sum(network.harmed.values()) < (150 if ALL else 8):
                told.change()
                await asyncio.sleep(0.005)
            network.rate = 0.0
            await master.until(lambda: told.is_in(master), 3.0)
            network.to_harm = ["drop"]  # the last one
            told.change()
            began_s = time.monotonic()
            await master.until(lambda: told.is_in(master), 2.0)
            print(f"{network.harmed}, {len(master.left)} connections lost; right {time.monotonic() - began_s:.2f} s "
                  "after the last change")
        finally:
            await master.registry.close()
            await network.close()
