"""Which instances a master uses, and which it only names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from serving.cluster.openai_places import is_clear
from serving.commands.master_members import MasterMembers
from serving.commands.master_models import MAX_MODELS, MasterModels
from serving.master_config import POLICY_OF, MasterConfig
from tests.llm.cluster_sites import three_sites
from tests.llm.gated import KEYS
from xllm.client.cluster import ClusterClient
from xllm.client.gate_wire import UNCHECKED, ServedModel
from xllm.client.server_place import KVEventsPlace, ServerPlace
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
        members._join("b", b, "ENCODE")
        assert "there is no role 'ENCODE'" in members._refused["b"].reason
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


async def test_a_model_that_is_known_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes with whichever is called so, before and behind an instance that has a fingerprint, but not with another
    length; what the others began goes on there."""
    async with three_sites() as sites:
        a, b, c = (site.client for site in sites.sites.values())
        for client, model in ((a, served("m", UNCHECKED)), (b, served("m n", "2")), (c, served("m", "3"))):
            monkeypatch.setattr(client, "model", model)
        models = MasterModels(ClusterClient)
        said: list[bool] = []
        members = MasterMembers(models, None, lambda model, is_new: said.append(is_new))
        for name, client in (("a", a), ("b", b), ("c", c)):
            members._join(name, client)
        (model,) = models.all
        assert set(model.cluster.members.all) == {"a", "b"}
        assert model.fingerprint == "2" and list(model.names) == ["m", "n"]
        assert members._refused["c"].reason == "it serves m (fingerprint 3), and this master m, n (2)"
        assert said == [True, False]
        known = model.cluster.members
        assert known.model == "2" and known.able("2", ()) == {"a", "b"} == known.able(UNCHECKED, ())
        members._leave("b", "it is upgraded")
        assert known.model == UNCHECKED and known.able("2", ()) == {"a"}
        members._leave("a", "it is upgraded, too")
        assert model.fingerprint == "3", "which was refused before"
        members._join("a", a)
        assert set(known.all) == {"a", "c"} and model.fingerprint == "3"

        members._leave("a", "it is started again")
        assert a.facts is not None
        config = dataclasses.replace(a.facts.config, model=dataclasses.replace(a.facts.config.model, max_model_len=99))
        monkeypatch.setattr(a, "facts", dataclasses.replace(a.facts, config=config))
        members._join("a", a)
        assert members._refused["a"].reason.startswith("its max_model_len is 99, and that of the other instances")
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
    ({}, "needs etcd_addr, where its instances register, or instances, or openai_server"),
    ({"etcd_addr": "e:1", "instances": "a:1"}, "one of the two"),
    *(({"openai_server": (text,)}, reason) for text, reason in (
        ("http://h:1", "is not NAME=URL"), ("a=h:1", "the URL must be"), ("a=http://h:1/v2", "the URL must be"),
        ("a=http://h:x", "the URL must be"), ("a=http://u:secret@h:1", "no password belongs in a URL"),
        ("a=http://h,replay=tcp://h:1", "replay needs events"),
        ("a=http://h,events=h:1", "events must be tcp://HOST:PORT"),
        ("a=http://h,events=tcp://*:1", "name its host and port"),
        ("a=http://h,key=k", "must be one of events, replay"), ("a=http://h,events=", "with a value"),
        ("a=http://h,api-key-file=/nowhere", "api-key-file /nowhere cannot be read"))),
    ({"openai_server": ("a=http://h", "a=http://i")}, "the name a is given twice"),
    ({"openai_server": ("a=http://h", "b=http://h/v1")}, "the URL http://h is given twice"),
    ({"openai_server": ("a:1=http://h",), "instances": "a:1"}, "a:1 is the address of an instance"),
    ({"instances": "a:1,a:1"}, "given twice"),
    ({"instances": "a"}, "HOST:PORT"), ({"instances": "a:1", "target_ttft": 0.0}, "positive number of milliseconds"),
    ({"instances": "a:1", "etcd_user": "u"}, "etcd_user needs etcd_addr"),
    ({"instances": "a:1", "load_balance_policy": "BEST"}, "must be one of RR, CAR, LOAD, SLO_AWARE, RANDOM"),
    ({"instances": "a:1", "step_timeout": -1.0}, "step_timeout")])
def test_settings(flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_tree(MasterConfig, flags)


def test_openai_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    key.write_text("of-a\n")
    key.chmod(0o600)
    monkeypatch.setenv("XLLM_OPENAI_API_KEY", "of-others")
    config = build_tree(MasterConfig, {"tokenizer_path": "/t", "openai_server": (
        f"a=https://h:8000/v1/, events=tcp://h:5557, replay=tcp://h:5558, tokenizer=/u, api-key-file={key}",
        "b=http://[::1]")})
    assert config.openai_places == [
        ServerPlace(name="a", url="https://h:8000", api_key="of-a", tokenizer_path="/u",
                    events=KVEventsPlace("tcp://h:5557", "tcp://h:5558")),
        ServerPlace(name="b", url="http://[::1]", api_key="of-others", tokenizer_path="/t")]
    assert "of-a" not in repr(config.openai_places) and "of-others" not in repr(config)
    assert [is_clear(place) for place in config.openai_places] == [False, False]
    assert is_clear(ServerPlace(name="c", url="http://10.0.0.7:1"))
    for wrong in ("", "two words"):
        monkeypatch.setenv("XLLM_OPENAI_API_KEY", wrong)
        with pytest.raises(ConfigError, match="XLLM_OPENAI_API_KEY must be one key"):
            build_tree(MasterConfig, {"openai_server": ("a=http://h",)})
        key.write_text(wrong)
        with pytest.raises(ConfigError, match="does not hold one key"):
            build_tree(MasterConfig, {"openai_server": (f"a=http://h,api-key-file={key}",)})


def test_policies_are_those_of_the_router() -> None:
    assert set(POLICY_OF.values()) == set(POLICIES)
    assert build_tree(MasterConfig, {"instances": "a:1, b:2"}).addresses == ("a:1", "b:2")
