"""How instances join a cluster and leave it, on a real etcd and on the embedded store."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time

import pytest

from serving.cluster import registration as registration_module
from serving.cluster.instance_link import MemberState
from serving.cluster.instance_record import BadRecordError, read_record
from serving.cluster.registration import NameTakenError
from tests.cluster.members import Instances, master_of
from tests.llm.test_clients import make_request, read
from xllm.client.cluster_keys import cluster_keys
from xllm.client.gate_wire import PROTOCOL
from xllm.errors import EngineDeadError

ACTIVE, LEASE_LOST, SUSPECT, REFUSED = (MemberState.ACTIVE, MemberState.LEASE_LOST, MemberState.SUSPECT,
                                        MemberState.REFUSED)
on_both = pytest.mark.parametrize("site", ["etcd", "embedded"], indirect=True)


@on_both
async def test_join_and_leave(store, instances: Instances):
    async with master_of(store) as master:
        a = await instances(store, "a:1")
        await master.sees("a:1", ACTIVE)
        assert len(await read(master.joined["a:1"].submit([make_request("r")]))) == 8
        stored = json.loads((await store.get(b"XLLM:DEFAULT:a:1")).value)
        assert (stored["name"], stored["type"], stored["rpc_address"], stored["draining"]) == (
            "a:1", 0, a.gate.address, False)
        b = await instances(store, "b:1", type=3)
        await master.sees("b:1", ACTIVE)
        assert master.member("b:1").role == "MIX" and list(master.registry.loads()) == ["a:1", "b:1"]
        async with master_of(store) as other:  # a second master finds both
            await other.until(lambda: len(other.joined) == 2)
        # The order of an end: first it says so, and what is open goes on; then its key goes, then its gate.
        stream = master.joined["a:1"].submit([make_request("long", 300)])
        await stream.next()
        a.gate.drain()
        a.registration.drain()
        await master.sees("a:1", MemberState.DRAINING)
        await master.until(lambda: master.member("a:1").record.draining)
        assert (await read(stream))[-1].finish_reason == "length"
        await a.registration.close()
        await master.sees("a:1", MemberState.DRAINING)  # connected still, its record's last words
        assert await store.get(b"XLLM:DEFAULT:a:1") is None
        a.gate.close()
        await master.sees("a:1", None)
        assert master.left == [("a:1", "the instance was shut down")]
        await b.die()
        await master.until(lambda: len(master.left) == 2)
        await master.sees("b:1", None)  # once its lease has ended
    assert master.left[1][0] == "b:1"


@pytest.mark.parametrize("site", ["etcd"], indirect=True)
async def test_a_name_is_given_once(store, site, instances: Instances, monkeypatch):
    async with master_of(store) as master, site.open() as second:
        first = await instances(store, "a:1")
        await master.sees("a:1", ACTIVE)
        monkeypatch.setattr(registration_module, "TAKEN_S", -0.5)
        for type_ in (0, 3):
            with pytest.raises(NameTakenError, match=rf"'a:1' is taken: XLLM:DEFAULT:a:1 is incarnation "
                                                     rf"{first.gate.incarnation} at {first.gate.address}: end it"):
                await instances(second, "a:1", type=type_)
        monkeypatch.undo()
        # One that was killed leaves its record for the time of its lease: the next one waits.
        await first.die()
        started_s = time.monotonic()
        again = await instances(second, "a:1")
        assert 0.3 < time.monotonic() - started_s < 3.0
        await master.until(lambda: master.joined.get("a:1") is not None)
        assert master.joined["a:1"].incarnation == again.gate.incarnation


@on_both
async def test_a_new_incarnation_takes_the_place_of_the_old_one(store, instances: Instances):
    async with master_of(store) as master:
        a = await instances(store, "a:1")
        await master.sees("a:1", ACTIVE)
        old = master.joined["a:1"]
        stream = old.submit([make_request("r", 450)])
        await stream.next()
        item = await store.get(b"XLLM:DEFAULT:a:1")
        # As when the engine is started again while this master has not heard of the old one's end.
        sessions, a.gate._incarnation = a.gate._sessions, "0" * 16
        with pytest.raises(EngineDeadError, match="another incarnation has taken its place: 0000000000000000"):
            await asyncio.wait_for(read(stream), 3)
        await master.until(lambda: master.joined.get("a:1") not in (None, old))
        assert master.joined["a:1"].incarnation == "0" * 16 and len(sessions) >= 1
        record = read_record(item.key, (await store.get(item.key)).value)
        assert record.incarnation_id == "0" * 16 and record.register_ts_ms > json.loads(item.value)["register_ts_ms"]


@on_both
async def test_a_lost_lease_with_a_living_connection(store, instances: Instances):
    async with master_of(store) as master:
        a = await instances(store, "a:1")
        await master.sees("a:1", ACTIVE)
        a.registration._keeper.cancel()  # it does not look after its record
        await store.delete(b"XLLM:DEFAULT:a:1")
        await master.sees("a:1", LEASE_LOST)
        assert len(await read(master.joined["a:1"].submit([make_request("r")]))) == 8
        await a.registration.start()
        await master.sees("a:1", ACTIVE)
        assert not master.left
        # A lease that is revoked is replaced, too.
        revoked = a.registration._lease
        await store._link.revoke(revoked.id)
        await master.until(lambda: a.registration._lease not in (None, revoked) and a.registration.is_registered)
        await master.sees("a:1", ACTIVE)
        assert not master.left


@on_both
async def test_a_lost_connection_is_made_again_while_there_is_a_record(store, instances: Instances):
    async with master_of(store) as master:
        a = await instances(store, "a:1")
        await master.sees("a:1", ACTIVE)
        first = master.joined["a:1"]
        a.gate._drop_all("of this test")
        await master.until(lambda: master.joined.get("a:1") not in (None, first))
        assert master.left == [("a:1", "of this test")] and master.state("a:1") is ACTIVE
        a.gate.close()
        await master.sees("a:1", SUSPECT, "connection refused")
        await a.registration.close()
        await master.sees("a:1", None)


@on_both
async def test_another_fingerprint_waits_until_the_old_one_is_gone(store, instances: Instances):
    async with master_of(store) as master:
        a, b = await instances(store, "a:1"), await instances(store, "b:1")
        await master.until(lambda: len(master.joined) == 2)
        await instances(store, "c:1", fingerprint="f2")
        await master.sees("c:1", REFUSED)
        assert master.member("c:1").reason in {
            f"its model 'demo' has fingerprint f2, and {old} serves it with f1" for old in ("a:1", "b:1")}
        async with master_of(store) as other:  # whichever answers it first, the oldest counts
            await other.until(lambda: {"a:1", "b:1"} <= {*other.joined})
            await asyncio.sleep(0.2)
            assert other.state("c:1") is REFUSED
        await a.close()
        await master.sees("a:1", None)
        assert master.state("c:1") is REFUSED
        await b.close()
        await master.sees("c:1", ACTIVE)
        assert {*master.joined} == {"c:1"}


@on_both
async def test_who_lies_or_cannot_be_understood_is_refused(store, instances: Instances):
    a = await instances(store, "a:1")
    record = read_record(b"XLLM:DEFAULT:a:1", (await store.get(b"XLLM:DEFAULT:a:1")).value)
    async with master_of(store, keys=cluster_keys(b"another secret of a cluster")) as stranger:
        await stranger.sees("a:1", REFUSED)
        assert stranger.member("a:1").reason.startswith("wrong cluster secret")
    async with master_of(store) as master:
        await master.sees("a:1", ACTIVE)
        for name, changed, reason in (("p:1", {"protocol": 99}, f"it speaks protocol 99, this speaks {PROTOCOL}"),
                                      ("n:1", {"model_names": ("x",)}, "its model's names: ('demo',) as it says"),
                                      ("x:1", {"incarnation_id": "9"}, "another incarnation answers")):
            other = dataclasses.replace(record, name=name, **changed)
            await store.put(other.key, other.encode())
            await master.sees(name, SUSPECT if name == "x:1" else REFUSED, reason)
        await store.put(b"XLLM:DEFAULT:y:1", b"{]")
        await master.sees("y:1", REFUSED)
        assert master.member("y:1").record is None and "its record cannot be read: " in master.member("y:1").reason
        # What is malformed later on does not end a living connection.
        a.registration._keeper.cancel()
        await store.put(b"XLLM:DEFAULT:a:1", b"1")
        await master.until(lambda: "cannot be read" in master.member("a:1").reason)
        assert master.state("a:1") is LEASE_LOST and "a:1" in master.joined
        for key in (b"p:1", b"n:1", b"x:1", b"y:1"):
            await store.delete(b"XLLM:DEFAULT:" + key)
        await master.until(lambda: [member.name for member in master.registry.members()] == ["a:1"])


def test_records():
    good = {"name": "a:1", "rpc_address": "10.0.0.1:9", "incarnation_id": "1", "register_ts_ms": 1, "type": 0,
            "http_address": "", "model_names": ["m"], "fingerprint": "f", "protocol": 1, "version": "9",
            "max_model_len": 8, "block_size": 16}
    key = b"XLLM:DEFAULT:a:1"
    found = read_record(key, json.dumps(good | {"of_a_later_version": [1]}).encode())
    assert (found.role, found.key, found.dp_size) == ("DEFAULT", key, 1)
    assert read_record(key, found.encode()) == found
    for change, reason in ((("name", None), "missing required field `name`"),
                           (("max_model_len", None), "missing required field `max_model_len`"),
                           (("type", 4), "type 4 is none of 0 to 3"), (("type", "MIX"), r"\$.type"),
                           (("type", 3), "of MIX 'a:1', and stands under XLLM:DEFAULT:a:1"),
                           (("name", "b"), "of DEFAULT 'b', and stands under"), (("name", ""), "a name has"),
                           (("rpc_address", "x"), "HOST:PORT"), (("rpc_address", "x:0"), "no port"),
                           (("fingerprint", ""), "must not be empty"), (("model_names", []), "must be names"),
                           (("block_size", 0), "block_size must be at least 1")):
        bad = {name: value for name, value in (good | dict([change])).items() if value is not None}
        with pytest.raises(BadRecordError, match=reason):
            read_record(key, json.dumps(bad).encode())
    for value, reason in ((b"\xff", "malformed"), (b"[]", "Expected `object`"), (b" " * 70000, "70000 bytes")):
        with pytest.raises(BadRecordError, match=reason):
            read_record(key, value)
