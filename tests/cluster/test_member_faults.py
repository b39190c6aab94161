"""What becomes of a cluster's members when etcd fails, and who leads; and a real `xllm serve` as a member."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from serving.cluster.embedded import EmbeddedStore
from serving.cluster.etcd_link import open_etcd
from serving.cluster.instance_link import MemberState
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.master_seat import LEADER_KEY, LOAD, MasterSeat
from serving.security.cluster_secret import read_cluster_keys
from tests.cluster.members import Instances, master_of
from tests.llm.test_clients import make_request, read
from tests.serving.server_process import ServerProcess
from xllm.stats import EngineStats


async def test_members_outlive_faults_of_etcd(etcd, instances: Instances):
    etcd.start()
    async with open_etcd(etcd.settings) as of_instance, open_etcd(etcd.settings) as of_master, \
            master_of(of_master) as master:
        a = await instances(of_instance, "a:1")
        await master.sees("a:1", MemberState.ACTIVE)
        client = master.joined["a:1"]

        async def is_used() -> None:
            assert len(await read(client.submit([make_request("r")]))) == 8
            assert master.joined == {"a:1": client} and not master.left

        etcd.pause()  # for longer than its lease lasts
        await master.until(lambda: not a.has_lease)
        await is_used()
        etcd.go_on()
        await master.until(lambda: a.has_lease and a.registration.is_registered)
        await master.sees("a:1", MemberState.ACTIVE)
        await is_used()

        etcd.kill()
        etcd.wipe()
        await is_used()
        etcd.start()
        await master.until(lambda: of_master.state.is_up and of_instance.state.is_up)
        await master.until(lambda: master.state("a:1") is MemberState.ACTIVE and a.has_lease)
        await is_used()
        async with open_etcd(etcd.settings) as third, master_of(third) as later:
            await later.sees("a:1", MemberState.ACTIVE)
            assert later.joined["a:1"].incarnation == client.incarnation


async def test_nothing_is_left_behind(instances: Instances):
    def held() -> tuple[int, int, int]:
        return len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks()), threading.active_count()

    async with KeyValueStore(EmbeddedStore()) as store:
        async with master_of(store):  # zmq's own threads and descriptors stay with the process
            await instances(store, "a:1")
        await asyncio.sleep(0.3)
        before = held()
        for _ in range(3):
            async with master_of(store) as master:
                await master.sees("a:1", MemberState.ACTIVE)
                await store.put(b"XLLM:DEFAULT:b:1", b"no record")
            await asyncio.sleep(0.3)
        assert all(now <= then for now, then in zip(held(), before)), (held(), before)


@pytest.mark.parametrize("site", ["etcd", "embedded"], indirect=True)
async def test_one_master_leads_and_writes_loads(site):
    loads = {"a:1": EngineStats(num_waiting=3, kv_usage=0.25), "b:1": EngineStats()}
    async with site.open() as one, site.open() as two:
        seats = [MasterSeat(one, "10.0.0.1:9", lambda: loads, load_s=0.05),
                 MasterSeat(two, "10.0.0.2:9", lambda: loads, load_s=0.05)]
        for seat in seats:
            seat.start()

        async def until(condition) -> None:
            until_s = time.monotonic() + 5
            while not await condition():
                assert time.monotonic() < until_s
                await asyncio.sleep(0.02)

        async def is_written() -> bool:
            item = await one.get(LOAD + b"a:1")
            return item is not None and json.loads(item.value) == {"waiting_requests_num": 3,
                                                                   "gpu_cache_usage_perc": 0.25}

        async def both_are_there() -> bool:
            found = {item.key for item in (await one.get_prefix(b"XLLM:SERVICE:")).items}
            return found == {b"XLLM:SERVICE:10.0.0.1:9", b"XLLM:SERVICE:10.0.0.2:9", LEADER_KEY}

        await until(is_written)
        await until(both_are_there)
        (leader,) = [seat for seat in seats if seat.is_leader]
        other = seats[1 - seats.index(leader)]
        assert await leader.leader() == await other.leader() == f"10.0.0.{1 + seats.index(leader)}:9"
        del loads["b:1"]

        async def b_is_gone() -> bool:
            return await one.get(LOAD + b"b:1") is None

        await until(b_is_gone)
        await leader.close()

        async def the_other_leads() -> bool:
            return other.is_leader and await is_written()

        await until(the_other_leads)
        await other.close()
        assert (await one.get_prefix(b"XLLM:")).items == ()


async def test_a_real_member(shared_etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On the command line of upstream's documentation: nothing else needs to be said on one machine."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("XLLM_CLUSTER_SECRET", raising=False)
    with ServerProcess(tmp_path / "log.txt", f"--etcd_addr={shared_etcd.address}", "--enable_service_routing=true",
                       "--enable_cache_upload=true", "--enable_disagg_pd=false", "--dtype", "float32") as server:
        name = server.url.removeprefix("http://")
        assert re.search(rf"answers the cluster at 127\.0\.0\.1:\d+, registered as {name} in etcd", server.log)
        keys = read_cluster_keys(None, is_local=True)  # this user's, which the instance has made
        async with open_etcd(shared_etcd.settings) as store, master_of(store, keys=keys) as master:
            await master.sees(name, MemberState.ACTIVE)
            record = master.member(name).record
            assert (record.http_address, record.model_names, record.max_model_len) == (name, ("demo",), 512)
            first = master.joined[name]
            assert len(await read(first.submit([make_request("a")]))) == 8
            os.kill(server.engine_pid, signal.SIGKILL)
            await master.until(lambda: master.joined.get(name) not in (None, first), 20.0)
            again = master.member(name)
            assert again.record.incarnation_id == again.client.incarnation != first.incarnation
            assert "its engine stopped: the engine process was killed by signal 9" in master.left[0][1]
            # It says that it ends, lets what is open go on, and is gone from the store before its gate closes.
            stream = again.client.submit([make_request("b", 300)])
            await stream.next()
            server.process.send_signal(signal.SIGTERM)
            await master.until(lambda: master.member(name).record.draining)
            assert master.state(name) is MemberState.DRAINING
            assert (await read(stream))[-1].finish_reason == "length"
            await master.until(lambda: len(master.left) == 2)
            assert master.left[1] == (name, "the instance was shut down")
            assert master.state(name) is None
        assert await asyncio.to_thread(server.process.wait, 15) == 0
