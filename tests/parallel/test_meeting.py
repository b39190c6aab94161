"""The meeting of an engine's nodes over a real store: who comes, what must be equal, and bad starts that are named."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from xllm import bundled
from xllm.config import EngineConfig
from xllm.errors import ConfigError, WorkerError
from xllm.node_settings import NodeSettings, resolve_nodes
from xllm.parallel import meeting
from xllm.parallel.interfaces import interface_to
from xllm.parallel.meeting import Arrival, Door, Gathering, Taken, arrive, find_store, open_store
from xllm.worker.node_facts import node_facts

FACTS = {"the version of torch": "2.13.0", "dtype": "auto", "file config.json": "1f"}


def free_port(family: int = socket.AF_INET, address: str = "127.0.0.1") -> int:
    with socket.socket(family) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def nodes_at(nnodes: int, address: str = "127.0.0.1") -> NodeSettings:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return NodeSettings(nnodes=nnodes, node_rank=0, master_addr=address, master_port=free_port(family, address))


def node(number: int, nnodes: int = 2, **facts: str | None) -> Arrival:
    found = {name: value for name, value in (FACTS | facts).items() if value is not None}
    return Arrival(number, nnodes, f"host-{number}", found)


def never() -> bool:
    return False


def meet(nodes: NodeSettings, *others: Arrival, patience_s: float = 5.0) -> list[object]:
    """What each party of a meeting ends with, node 0 first: a door, None or the error. The others arrive in turn."""
    ends: list[object] = [None] * (len(others) + 1)
    store, address = open_store(nodes)
    assert address == nodes.master_addr
    gathering = Gathering(store, node(0, nodes.nnodes), place=nodes.place)

    def party(index: int, act: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                ends[index] = act()
            except Exception as error:
                ends[index] = error

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def host() -> None:
        gathering.gather(patience_s)
        gathering.admit({number: Door(1000 + number, "key") for number in range(1, nodes.nnodes)})

    threads = []
    for index, other in enumerate(others, 1):
        threads.append(party(index, lambda other=other: arrive(find_store(nodes, 5.0, never), other, never)))
        deadline = time.monotonic() + 5.0
        while store.add("node/arrivals", 0) < index and time.monotonic() < deadline:
            time.sleep(0.01)
    threads.append(party(0, host))
    for thread in threads:
        thread.join(20)
    return ends


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_nodes_meet_in_any_order(address):
    assert meet(nodes_at(3, address), node(2, 3), node(1, 3)) == [None, Door(1002, "key"), Door(1001, "key")]


@pytest.mark.parametrize(("others", "words"), [
    ([node(1, dtype="float32")], r"node 1 \(host-1\) does not go with node 0 \(host-0\): dtype is float32, and auto"),
    ([node(1, **{"the version of torch": "2.12.0"})], "the version of torch is 2.12.0, and 2.13.0 on node 0"),
    ([node(1, **{"file config.json": "20"})], "node 1 .*: it has another config.json in its checkpoint"),
    ([node(1, **{"file config.json": None})], "node 1 .*: it has no config.json in its checkpoint"),
    ([node(1, **{"file b.safetensors": "1"})], "node 1 .*: it has a b.safetensors in its checkpoint"),
    ([node(1, 3)], r"node 1 \(host-1\) was started with nnodes 3, node 0 \(host-0\) with 2"),
    ([node(2)], r"node 2 \(host-2\) is outside of 2 nodes"),
], ids=["setting", "version", "checkpoint", "file-missing", "file-more", "nnodes", "outside"])
def test_nodes_that_do_not_go_together_all_end_with_the_reason(others, words):
    began = time.monotonic()
    for error in meet(nodes_at(2), *others):
        assert isinstance(error, ConfigError)
        with pytest.raises(ConfigError, match=words):
            raise error
    assert time.monotonic() - began < 5


def test_a_number_that_is_given_twice_ends_all():
    for error in meet(nodes_at(3), node(1, 3), node(1, 3)):
        assert isinstance(error, ConfigError) and "node_rank 1 was given twice, on host-1 and on host-1" in str(error)


def test_one_that_comes_late_is_told_that_its_place_is_taken():
    nodes = nodes_at(2)
    store, _ = open_store(nodes)
    gathering = Gathering(store, node(0), place=nodes.place)
    first = threading.Thread(target=lambda: arrive(find_store(nodes, 5.0, never), node(1), never))
    first.start()
    gathering.gather(5.0)
    gathering.admit({1: Door(1001, "key")})
    first.join()
    with pytest.raises(Taken, match="node_rank 1 is taken"):
        arrive(find_store(nodes, 5.0, never), node(1), never)


def test_one_that_does_not_come_is_named():
    nodes = nodes_at(3)
    ends = meet(nodes, node(1, 3), patience_s=0.3)
    words = f"node 2 of 3 did not come to {nodes.place} within 0.3 s"
    assert isinstance(ends[0], WorkerError) and str(ends[0]) == words
    assert isinstance(ends[1], ConfigError) and str(ends[1]) == words


def test_a_taken_port_and_an_address_of_another_machine_are_named():
    nodes = nodes_at(2)
    with (socket.create_server(("127.0.0.1", nodes.master_port)),
          pytest.raises(ConfigError, match=f"cannot listen at {nodes.place} .*[Aa]ddress already in use")):
        open_store(nodes)
    with pytest.raises(ConfigError, match=r"cannot listen at 192\.0\.2\.1:.*assign requested address"):
        open_store(replace(nodes, master_addr="192.0.2.1"))


def test_a_master_that_is_not_there_is_named_with_its_address():
    nodes = nodes_at(2)
    with pytest.raises(WorkerError, match=f"node 0 was not reached at {nodes.place} .* within 0.2 s: .*refused"):
        find_store(nodes, 0.2, never)


def test_a_node_that_waits_hears_that_node_0_has_ended():
    nodes = nodes_at(3)
    store, _ = open_store(nodes)
    ended: list[Exception] = []

    def wait() -> None:
        try:
            arrive(find_store(nodes, 5.0, never), node(1, 3), never)
        except WorkerError as error:
            ended.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while store.add("node/arrivals", 0) < 1:
        time.sleep(0.01)
    del store
    waiting.join(10)
    assert len(ended) == 1 and isinstance(ended[0], meeting.Gone)


def test_facts_of_two_folders(tmp_path):
    """Where files are may differ, what is in them not; of weights sizes, names and shapes are compared."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        shutil.copytree(Path(bundled.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))

    def differing(**settings: object) -> set[str]:
        one, two = (node_facts(EngineConfig.from_flat(model=str(folder), **more))
                    for folder, more in zip(folders, ({}, settings), strict=True))
        return {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}

    assert differing(num_threads=1, node_rank=1) == set()
    assert differing(quantization="int8", max_model_len=64) == {"quantization", "max_model_len"}
    config, weights = folders[1] / "config.json", next(folders[1].glob("*.safetensors"))
    config.write_text(config.read_text() + " ")
    header = bytearray(weights.read_bytes())
    header[20] ^= 1
    weights.write_bytes(header)
    assert differing() == {"file config.json", f"file {weights.name}"}
    weights.unlink()
    assert differing() == {"file config.json", f"file {weights.name}"}


def test_the_interface_of_an_address():
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    assert interface_to("store://127.0.0.1:29501") == loopback
    assert interface_to("store://[::1]:29501") == loopback
    assert interface_to("store://no-such-host.invalid:1") is None


TORCHRUN = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1",
            "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(("given", "variables", "size", "expected"), [
    ({}, {}, 1, (1, 0, None, 29501)),
    ({}, TORCHRUN, 4, (2, 1, "10.0.0.1", 29500)),
    ({}, TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, 4, (2, 1, "10.0.0.1", 29501)),
    ({}, TORCHRUN, 1, (1, 0, None, 29501)),  # nothing is shared: another program's variables
    ({}, {"NNODES": "2"}, 4, (1, 0, None, 29501)),  # of a batch system, without a master
    ({"nnodes": 2, "master_addr": "a"}, {"NODE_RANK": "1"}, 2, (2, 1, "a", 29501)),
    ({"nnodes": 2, "node_rank": 1, "master_port": 7}, TORCHRUN, 2, (2, 1, "10.0.0.1", 7)),
    ({"nnodes": 2, "master_addr": "a:19888"}, {}, 2, (2, 0, "a", 19888)),
    ({"nnodes": 2, "master_addr": "[fd00::1]:19888"}, {}, 2, (2, 0, "fd00::1", 19888)),
    ({"nnodes": 2, "master_addr": "fd00::1"}, {}, 2, (2, 0, "fd00::1", 29501)),
    ({"nnodes": 1, "node_rank": 0, "master_addr": "127.0.0.1:9748"}, {}, 1, (1, 0, "127.0.0.1", 9748)),
])
def test_settings_and_torchruns_variables(given, variables, size, expected):
    found = resolve_nodes(NodeSettings(**given), variables, size)
    assert (found.nnodes, found.node_rank, found.master_addr, found.master_port) == expected
    assert resolve_nodes(found, variables, size) == found


@pytest.mark.parametrize(("given", "variables", "size", "words"), [
    ({"nnodes": 0}, {}, 1, "nnodes must be at least 1, got 0"),
    ({"nnodes": 2, "node_rank": 2, "master_addr": "a"}, {}, 2, "node_rank 2 is outside of 2 nodes, which are 0 to 1"),
    ({"node_rank": 1}, {}, 2, "node_rank 1 is outside of 1 nodes"),
    ({"nnodes": 3, "master_addr": "a"}, {}, 4, "nnodes 3 does not divide tensor_parallel_size 4"),
    ({"nnodes": 2, "master_addr": "a"}, {}, 1, "nnodes 2 does not divide tensor_parallel_size 1"),
    ({"nnodes": 2}, {}, 2, "nnodes 2 needs master_addr"),
    ({"nnodes": 2, "master_addr": "a", "master_port": 70000}, {}, 2, "master_port must be in 1 to 65535, got 70000"),
    ({"nnodes": 2, "master_addr": "a:1", "master_port": 2}, {}, 2, "master_addr says port 1, and master_port is 2"),
    ({"nnodes": 2, "master_addr": "a:x"}, {}, 2, "master_addr 'a:x' is neither HOST nor HOST:PORT"),
    ({"nnodes": 2, "master_addr": "[::1"}, {}, 2, "is neither HOST nor HOST:PORT"),
    ({"headless": True}, {}, 1, "headless is for nodes with node_rank above 0"),
    ({"nnodes": 3}, TORCHRUN, 3, "nnodes is 3, and the environment variable GROUP_WORLD_SIZE says 2"),
    ({"node_rank": 0}, TORCHRUN, 2, "node_rank is 0, and the environment variable GROUP_RANK says 1"),
    ({"master_addr": "b"}, TORCHRUN, 2, "master_addr is b, and the environment variable MASTER_ADDR says 10.0.0.1"),
    ({}, TORCHRUN | {"NNODES": "3"}, 2, "nnodes is 2, and the environment variable NNODES says 3"),
    ({}, TORCHRUN | {"GROUP_RANK": "one"}, 2, "the environment variable GROUP_RANK must be a number, got 'one'"),
    ({}, TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, 16, "LOCAL_WORLD_SIZE is 8: start one process a node"),
])
def test_settings_and_variables_that_cannot_be(given, variables, size, words):
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        resolve_nodes(NodeSettings(**given), variables, size)
