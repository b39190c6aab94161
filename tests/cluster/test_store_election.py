"""One leads at a time, a standby takes over in time, and a leader that was stopped does no harm."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.cluster import key_value_store
from serving.cluster.election import LEASE_S, Election
from serving.cluster.etcd_link import open_etcd
from serving.cluster.key_value import Write
from serving.cluster.key_value_store import KeyValueStore
from tests.cluster.sites import StoreSite

ROOT = Path(__file__).resolve().parents[2]
TAKEOVER_S = 2.0  # beyond the lease


async def test_one_leads_and_the_next_takes_over_when_it_resigns_or_dies(site):
    async with site.open() as a, site.open() as b, site.open() as c:
        await _elect(site, [a, b, c])


async def _elect(site: StoreSite, stores: list[KeyValueStore]) -> None:
    candidates = [Election(store, b"MASTER", b"%d" % n, lease_s=site.lease_s) for n, store in enumerate(stores)]
    assert await candidates[0].leader() is None
    campaigns = {asyncio.create_task(candidate.campaign()): n for n, candidate in enumerate(candidates)}
    tokens, last = [], None
    for way in ("it resigns", "its process dies", "the last one's key is deleted"):
        done, _ = await asyncio.wait(campaigns, timeout=site.lease_s + TAKEOVER_S,
                                     return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1, way
        task = done.pop()
        number, won = campaigns.pop(task), task.result()
        tokens.append(won.token)
        assert won.is_current and await candidates[number].leader() == b"%d" % number
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in campaigns)
        assert (await stores[number].commit([won.guard], [Write(b"led", b"%d" % won.token)])).succeeded
        if last is not None:
            deposed, its_store = last
            assert not deposed.is_current
            assert not (await its_store.commit([deposed.guard], [Write(b"led", b"late")])).succeeded
        last = (won, stores[number])
        if way == "it resigns":
            await won.resign()
            assert await won.wait_lost() == "it resigned"
        elif way == "its process dies":
            await stores[number].close()
            assert not won.is_current and "the store was closed" in await asyncio.wait_for(won.wait_lost(), 1)
            last = None
        else:
            await stores[number].delete(b"MASTER")
            assert "was deleted" in await asyncio.wait_for(won.wait_lost(), 2)
    assert tokens == sorted(set(tokens))


async def test_a_standby_takes_over_from_a_stopped_leader_which_then_knows_it(shared_etcd):
    """Three processes: etcd, a leader that is stopped by SIGSTOP, and this one."""
    lease_s = 1
    command = [sys.executable, "-m", "tests.cluster.candidate", shared_etcd.url, "stopped", str(lease_s)]
    leader = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        def asked() -> str:
            leader.stdin.write("\n")
            leader.stdin.flush()
            return leader.stdout.readline()

        token = int((await asyncio.to_thread(leader.stdout.readline)).removeprefix("won "))
        assert await asyncio.to_thread(asked) == "True True\n"
        async with open_etcd(shared_etcd.settings) as store:
            standby = Election(store, b"stopped", b"standby", lease_s=lease_s)
            campaign = asyncio.create_task(standby.campaign())
            await asyncio.sleep(0.2)
            began_s = time.monotonic()
            leader.send_signal(signal.SIGSTOP)
            won = await asyncio.wait_for(campaign, 20)
            assert time.monotonic() - began_s < lease_s + TAKEOVER_S and won.token > token
            leader.send_signal(signal.SIGCONT)
            assert await asyncio.to_thread(asked) == "False False\n"
            assert won.is_current and (await store.commit([won.guard], [Write(b"by-leader", b"y")])).succeeded
            await won.resign()
    finally:
        leader.kill()
        leader.communicate()


async def test_a_campaign_that_won_without_an_answer_leads(shared_etcd, monkeypatch):
    """The commit is done, and the answer lost: it must not wait for itself."""
    async with open_etcd(shared_etcd.settings, namespace=b"unanswered/") as store:
        commit = store._link.commit

        async def unanswered(*args):
            await commit(*args)
            monkeypatch.setattr(store._link, "commit", commit)
            await asyncio.sleep(3600)

        monkeypatch.setattr(key_value_store, "REQUEST_S", 0.3)
        monkeypatch.setattr(store._link, "commit", unanswered)
        won = await asyncio.wait_for(Election(store, b"MASTER", b"me").campaign(), LEASE_S)
        assert won.is_current and won.token == (await store.get(b"MASTER")).create_revision
        await won.resign()
        assert await store.get(b"MASTER") is None


async def test_an_outage_is_waited_out(etcd):
    etcd.start()
    async with open_etcd(etcd.settings) as store:
        etcd.kill()
        campaign = asyncio.create_task(Election(store, b"MASTER", b"me").campaign())
        await asyncio.sleep(0.5)
        assert not campaign.done() and not store.state.is_up
        etcd.start()
        won = await asyncio.wait_for(campaign, 10)
        assert won.is_current
        await won.resign()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(won._store.interruption, 0.01)
