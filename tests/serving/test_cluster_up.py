"""`xllm cluster up`: real processes, and what is left of them when one, or the one that started them, is killed."""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import threading
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from serving.commands import cli, top
from serving.commands.cluster_plan import cluster_plan
from serving.config import ClusterSettings
from tests.serving.cluster_up_process import COMMAND, SMALL, ClusterUp, instances_of
from tests.serving.server_process import ROOT, START_TIMEOUT_S, wait_for
from xllm import env
from xllm.errors import ConfigError

KEY = "k" * 40


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_an_instance_is_killed_under_a_request(tmp_path: Path) -> None:
    with ClusterUp(tmp_path / "log.txt", 2, "--no-enable-prefix-caching", "--", "--max-num-seqs", "3") as up:
        instances = up.instances
        trees = [process for one in instances.values() for process in (one, *one.children(recursive=True))]
        assert len({os.getpgid(process.pid) for process in instances.values()} | {os.getpgid(up.process.pid)}) == 3
        secret = instances["instance-0"].environ()["XLLM_CLUSTER_SECRET"]
        shown = " ".join(word for process in trees for word in process.cmdline())
        assert "--enable-prefix-caching" not in shown and "--no-enable-prefix-caching --max-num-seqs 3" in shown
        for process in instances.values():
            assert process.environ()["XLLM_CLUSTER_SECRET"] == secret and secret not in shown
            assert process.environ()["XLLM_CLUSTER_STORE"].partition(":")[2] not in shown
        assert not any("XLLM_CLUSTER_STORE" in one.environ() for one in trees if one not in instances.values())

        answers: list[dict] = []
        body = {"prompt": "def f(", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
        asking = threading.Thread(target=lambda: answers.append(up.http.post("/v1/completions", json=body).json()))
        asking.start()
        wait_for(lambda: any(member.get("running") for member in up.cluster()["members"]), what="a request that runs")
        (victim,) = [member["name"] for member in up.cluster()["members"] if member.get("sent")]
        instances[victim].kill()
        asking.join(30)
        assert answers[0]["usage"]["completion_tokens"] == 400
        wait_for(lambda: "is not started again" in up.log, what="that it is said")
        assert re.search(rf"{victim} was killed by signal 9.*; it is not started again, 1 of 2 left; its log: \S+\n",
                         up.log)
        shown = up.cluster()
        events = [(event["event"], event["instance"]) for event in shown["events"]]
        assert events[:2] == [("recovered", victim), ("left", victim)]
        assert sorted(events[2:]) == [("joined", "instance-0"), ("joined", "instance-1")]
        assert shown["events"][0]["reason"] == "1 request goes on elsewhere"
        assert up.http.get("/health").json()["is_master"] is True
        survivor = ({*instances} - {victim}).pop()
        out = io.StringIO()
        flags = argparse.Namespace(url=up.url, api_key=None, interval=0.2, once=True)
        assert top.run(flags, Console(file=out, width=110, height=40)) == 0
        assert re.search(r"cluster  1 of \d active  policy CAR  open 0  went on elsewhere 1 ", out.getvalue())
        assert re.search(rf"{survivor} +active +0 +\d +0 +\S+% +\S+", out.getvalue())
        log = Path(re.search(r"its log: (\S+)", up.log)[1])  # type: ignore[index]
        assert "registered as XLLM:DEFAULT:instance-" in log.read_text()
        assert up.stop() == 1, "one of them did not end as it was told to"
        assert all(map(is_gone, trees))


def test_nothing_outlives_whoever_started_it(tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("wb") as out:
        process = subprocess.Popen([*COMMAND, "--instances", "1", *SMALL], cwd=ROOT, stdout=out,
                                   stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        wait_for(lambda: any(one.children() for one in instances_of(process.pid).values()), START_TIMEOUT_S,
                 "an engine")
        trees = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: all(map(is_gone, trees)), what="that all of them have gone")


@pytest.mark.parametrize(("flags", "said"), [
    (["--instances", "0"], "instances must be in 1 to 64, got 0"),
    (["--", "--port", "8000"], "--port is not for the instances of `xllm cluster up`"),
    (["--", "--instance_name=a"], "--instance-name is not for the instances"),
    (["--rope-scaling", "x"], "rope_scaling is not valid JSON"),
    (["--", "--rope-scaling", "x"], "rope_scaling is not valid JSON"),
])
def test_what_is_refused_before_anything_starts(flags: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["cluster", "up", *flags]) == 1
    assert said in capsys.readouterr().err


def test_a_served_store_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_CLUSTER_SECRET", "a secret of enough bytes")
    monkeypatch.setenv("XLLM_CLUSTER_STORE", f"4711:{KEY}")
    plan = cluster_plan(ClusterSettings(instance_name="a"))
    assert plan is not None and plan.store is not None and plan.etcd is None
    assert (plan.store.port, plan.store.key, plan.listen, plan.name) == (4711, KEY, "127.0.0.1:0", "a")
    assert KEY not in repr(plan) and "XLLM_CLUSTER_STORE" not in env.for_child()
    with pytest.raises(ConfigError, match="etcd_addr and the environment variable XLLM_CLUSTER_STORE both say where"):
        ClusterSettings(etcd_addr="127.0.0.1:2379")
    for wrong in ("", KEY, f"0:{KEY}", f"4711:{KEY}x"):
        monkeypatch.setenv("XLLM_CLUSTER_STORE", wrong)
        with pytest.raises(ConfigError, match="XLLM_CLUSTER_STORE must be PORT:KEY") as caught:
            cluster_plan(ClusterSettings())
        assert KEY not in str(caught.value)
