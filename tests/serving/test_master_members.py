"""Which instances a master uses, and which it only names."""

from __future__ import annotations

from typing import Any

import pytest

from serving.commands.master_members import MasterMembers
from serving.master_config import POLICY_OF, MasterConfig
from tests.llm.cluster_sites import three_sites
from tests.llm.gated import KEYS
from xllm.client.cluster import ClusterClient
from xllm.client.gate_wire import ServedModel
from xllm.errors import ConfigError
from xllm.routing.policies import POLICIES
from xllm.setting_tree import build_tree


async def test_one_model_a_master(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next version takes its place once nobody serves the last one any more; another model never does."""
    said: list[tuple[tuple[str, ...], bool]] = []
    async with three_sites() as sites:
        a, b, c = (site.client for site in sites.sites.values())
        for client, model in ((a, ServedModel(("m",), "1")), (b, ServedModel(("m", "n"), "2")),
                              (c, ServedModel(("other",), "3"))):
            monkeypatch.setattr(client, "model", model)
        cluster = ClusterClient()
        members = MasterMembers(cluster, KEYS, lambda names, is_new: said.append((names, is_new)))
        members._join("b", b, "PREFILL")
        assert "role 'PREFILL' is not built" in members._refused["b"].reason
        for name, client in (("a", a), ("b", b), ("c", c)):
            members._join(name, client)
        assert set(cluster.members.all) == {"a"} and set(members._refused) == {"b", "c"}
        assert members._refused["c"].reason == \
            "it serves other (fingerprint 3), and this master m (1): one model a master"
        members._leave("a", "it is upgraded")
        assert set(cluster.members.all) == {"b"} and set(members._refused) == {"c"}
        assert said == [(("m",), True), (("m", "n"), True)]
        monkeypatch.setattr(a, "model", ServedModel(("m", "o"), "2"))
        members._join("a", a)
        assert said[-1] == (("m", "n", "o"), False)
        await cluster.close()


@pytest.mark.parametrize(("flags", "reason"), [
    ({}, "needs etcd_addr, where its instances register, or instances"),
    ({"etcd_addr": "e:1", "instances": "a:1"}, "one of the two"), ({"instances": "a:1,a:1"}, "given twice"),
    ({"instances": "a"}, "HOST:PORT"), ({"instances": "a:1", "target_ttft": 0.0}, "positive number of milliseconds"),
    ({"instances": "a:1", "etcd_user": "u"}, "etcd_user needs etcd_addr"),
    ({"instances": "a:1", "load_balance_policy": "BEST"}, "must be one of RR, CAR, LOAD, SLO_AWARE"),
    ({"instances": "a:1", "step_timeout": -1.0}, "step_timeout")])
def test_settings(flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_tree(MasterConfig, flags)


def test_policies_are_those_of_the_router() -> None:
    assert set(POLICY_OF.values()) == set(POLICIES)
    assert build_tree(MasterConfig, {"instances": "a:1, b:2"}).addresses == ("a:1", "b:2")
