"""No lease, deadline or order of a cluster hangs on the wall clock, which somebody may set at any time."""

from __future__ import annotations

import ast
import time
from pathlib import Path

import pytest

from serving.cluster.embedded import EmbeddedStore
from serving.cluster.instance_link import MemberState
from serving.cluster.key_value_store import KeyValueStore
from tests.cluster.chaos.cluster import ROOT
from tests.cluster.members import Instances, master_of

# Who asks for the wall clock, and may: what they make of it is shown to people, or written down once.
SHOWN = {
    "serving/cluster/engine_gate.py": "since when an incarnation lives",
    "serving/cluster/key_value_store.py": "since when the store answers",
    "serving/cluster/registration.py": "when an incarnation was registered first, once",
    "xllm/client/cluster_members.py": "when an event happened",
    "xllm/client/dispatch.py": "when a decision was made",
    "xllm/client/openai_server.py": "since when a server lives that does not say it",
}


def asks_for_wall_clock(path: Path) -> bool:
    tree = ast.parse(path.read_text())
    read = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named = {f"time.{alias.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             and node.module == "time" for alias in node.names}
    return bool((read | named) & {"time.time", "time.time_ns"}) or any(
        name.endswith((".now", ".utcnow", ".today")) for name in read)


def test_who_asks_for_the_wall_clock() -> None:
    folders = ("serving/cluster", "xllm/client", "xllm/routing")
    found = {str(path.relative_to(ROOT)) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))
             if asks_for_wall_clock(path)}
    assert found == set(SHOWN)


async def test_leases_and_members_outlive_steps(instances: Instances, monkeypatch: pytest.MonkeyPatch) -> None:
    async with KeyValueStore(EmbeddedStore()) as store, master_of(store) as master:
        a = await instances(store, "a:1")
        await master.sees("a:1", MemberState.ACTIVE)
        lease = await store.grant(1)
        client, real_s, real_ns = master.joined["a:1"], time.time, time.time_ns
        for step_s in (3600, -3600):
            monkeypatch.setattr(time, "time", lambda step_s=step_s: real_s() + step_s)
            monkeypatch.setattr(time, "time_ns", lambda step_s=step_s: real_ns() + step_s * 10**9)
            over_s = time.monotonic() + 1.5  # leases of 1 s are refreshed meanwhile, or they end
            await master.until(lambda over_s=over_s: time.monotonic() > over_s)
            assert lease.is_alive and a.has_lease and a.registration.is_registered
            assert master.joined == {"a:1": client} and not master.left and store.state.is_up
        await lease.revoke()
