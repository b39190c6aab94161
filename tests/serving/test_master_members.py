"""Which instances a master uses, and which it only names."""

from __future__ import annotations

from typing import Any

import pytest

from serving.commands.master_members import MasterMembers
from serving.commands.master_models import MAX_MODELS, MasterModels
from serving.master_config import POLICY_OF, MasterConfig
from tests.llm.cluster_sites import three_sites
from tests.llm.gated import KEYS
from xllm.client.cluster import ClusterClient
from xllm.client.gate_wire import ServedModel
from xllm.errors import ConfigError
from xllm.routing.policies import POLICIES
from xllm.setting_tree import build_tree


def served(names: str, fingerprint: str) -> ServedModel:
    return ServedModel(tuple(names.split()), fingerprint)


async def test_each_model_has_a_cluster_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next version takes its place once nobody serves the last one any more; names are never shared."""
    said: list[tuple[list[str], bool]] = []
    async with three_sites() as sites:
        a, b, c = (site.client for site in sites.sites.values())
        for client, model in ((a, served("m", "1")), (b, served("m n", "2")), (c, served("other", "3"))):
            monkeypatch.setattr(client, "model", model)
        models = MasterModels(ClusterClient)
        members = MasterMembers(models, KEYS, lambda model, is_new: said.append((list(model.names), is_new)))
        members._join("b", b, "PREFILL")
        assert "role 'PREFILL' is not built" in members._refused["b"].reason
        for name, client in (("a", a), ("b", b), ("c", c)):
            members._join(name, client)
        assert [set(model.cluster.members.all) for model in models.all] == [{"a"}, {"c"}]
        assert {name: refused.reason for name, refused in members._refused.items()} == \
            {"b": "it serves m, n (fingerprint 2), and this master m (1)"}
        members._leave("a", "it is upgraded")
        assert [set(model.cluster.members.all) for model in models.all] == [{"b"}, {"c"}] and not members._refused
        assert said == [(["m"], True), (["other"], True), (["m", "n"], True)]
        monkeypatch.setattr(a, "model", served("m o", "2"))
        members._join("a", a)
        assert said[-1] == (["m", "n", "o"], False)
        members._leave("a", "it is started again")
        monkeypatch.setattr(a, "model", served("m other", "2"))
        members._join("a", a)
        assert members._refused["a"].reason == "it serves m, other (fingerprint 2), and this master other (3)"

        members.give_up(models.all[1], "its tokenizer is not here")
        assert members._refused["c"].reason == "its tokenizer is not here" and not models.all[1].is_served
        for model in models.all:
            await model.cluster.close()


def test_names_that_are_given_are_those_of_one_model() -> None:
    models = MasterModels(ClusterClient, only_by="served_model_name")
    models.note(models.find(served("m", "1")), served("m", "1"))
    assert models.find(served("n", "1")) is models.all[0]
    with pytest.raises(ValueError, match="one model a master with served_model_name"):
        models.find(served("n", "2"))


def test_there_is_a_limit_to_models() -> None:
    models = MasterModels(ClusterClient)
    for number in range(MAX_MODELS):
        one = served(f"m{number}", str(number))
        assert models.note(models.find(one), one)
    with pytest.raises(ValueError, match="32 other models"):
        models.find(served("m", "-"))


@pytest.mark.parametrize(("flags", "reason"), [
    ({}, "needs etcd_addr, where its instances register, or instances"),
    ({"etcd_addr": "e:1", "instances": "a:1"}, "one of the two"), ({"instances": "a:1,a:1"}, "given twice"),
    ({"instances": "a"}, "HOST:PORT"), ({"instances": "a:1", "target_ttft": 0.0}, "positive number of milliseconds"),
    ({"instances": "a:1", "etcd_user": "u"}, "etcd_user needs etcd_addr"),
    ({"instances": "a:1", "load_balance_policy": "BEST"}, "must be one of RR, CAR, LOAD, SLO_AWARE, RANDOM"),
    ({"instances": "a:1", "step_timeout": -1.0}, "step_timeout")])
def test_settings(flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_tree(MasterConfig, flags)


def test_policies_are_those_of_the_router() -> None:
    assert set(POLICY_OF.values()) == set(POLICIES)
    assert build_tree(MasterConfig, {"instances": "a:1, b:2"}).addresses == ("a:1", "b:2")
