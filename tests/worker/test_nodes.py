"""Two nodes of one engine on the loopback interface, each a process tree with a checkpoint folder of its own: the
answers of one node, and faults that end all and are named. What is compared when nodes meet:
`tests/parallel/test_meeting.py`. NODES_ALL=1 (`make nightly`) adds servers that come back, and more bad starts."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.parallel.test_meeting import free_port
from tests.serving.server_process import ServerProcess, wait_for
from tests.worker.test_processes import PROMPTS, SETTINGS, tokens
from xllm import LLM, bundled
from xllm.errors import ConfigError, EngineDeadError, WorkerError
from xllm.worker.processes import SILENT_S

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
heavy = pytest.mark.skipif(os.environ.get("NODES_ALL") != "1", reason="in `make nightly` (NODES_ALL=1)")


class OtherNode:
    """`xllm serve --node-rank 1` with a copy of the bundled checkpoint."""

    def __init__(self, folder: Path, port: int, *flags: str):
        self.copy, self._log = folder / "copy", folder / "node1.log"
        if not self.copy.exists():
            shutil.copytree(Path(bundled.__file__).parent, self.copy)
        self._command = [sys.executable, "-m", "serving.commands.cli", "serve", str(self.copy), *FLAGS,
                         *nodes_flags(port), "--node-rank", "1", *flags]
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(self._command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ranks(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children()
        return []

    def code(self, timeout_s: float = 20.0) -> int:
        return self.process.wait(timeout_s)

    def stop(self) -> None:
        left = self.ranks()
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(left, 10)
        assert not any(rank.is_running() for rank in left)


def nodes_flags(port: int) -> list[str]:
    return ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]


def node_0(port: int) -> LLM:
    return LLM(**SETTINGS, tensor_parallel_size=2, nnodes=2, master_addr="127.0.0.1", master_port=port)


@contextmanager
def other_node(folder: Path, port: int, *flags: str) -> Iterator[OtherNode]:
    node = OtherNode(folder, port, *flags)
    try:
        yield node
    finally:
        node.stop()


@pytest.mark.usefixtures("pooled_ranks")
def test_two_nodes_answer_as_one_and_meet_again_after_a_fault(tmp_path):
    with LLM(**SETTINGS) as llm:
        expected = tokens(llm)
    port = free_port()
    with other_node(tmp_path, port) as node:
        with node_0(port) as llm:
            assert len(llm._core.link.pids) == 1 and len(node.ranks()) == 1
            assert tokens(llm) == expected
            node.ranks()[0].kill()
            began = time.monotonic()
            with pytest.raises(EngineDeadError, match="node 1: worker rank 1 was killed by signal 9"):
                tokens(llm)
            assert time.monotonic() - began < 10
        with node_0(port) as llm:
            assert tokens(llm) == expected
        assert node.code() == 0
        assert "the engine failed: worker rank 1 was killed by signal 9" in node.log
        assert "the engine has ended" in node.log


@heavy
def test_another_checkpoint_on_a_node_ends_both(tmp_path):
    """And no rank is started."""
    port = free_port()
    with other_node(tmp_path, port, "--dtype", "bfloat16") as node:
        config = json.loads((node.copy / "config.json").read_text())
        (node.copy / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
        words = "does not go with node 0 .*dtype is bfloat16, and auto on node 0; it has another config.json in its"
        with pytest.raises(ConfigError, match=words):
            node_0(port)
        assert node.code() == 1 and "another config.json in its checkpoint" in node.log


def test_the_engine_runs_on_node_0_only():
    with pytest.raises(ConfigError, match="node_rank 1: the engine runs on node 0"):
        LLM(**SETTINGS, tensor_parallel_size=2, nnodes=2, node_rank=1, master_addr="127.0.0.1")


# --- what is heavy


@heavy
@pytest.mark.parametrize("whom", ["the rank there", "the rank here", "the node", "the engine"])
def test_a_server_comes_back_without_anybody_at_the_other_node(tmp_path, whom):
    port = free_port()
    with other_node(tmp_path, port, "--num-kv-blocks", "1024", "--max-model-len", "512") as node:
        with ServerProcess(tmp_path / "log", *FLAGS[2:], "--num-kv-blocks", "1024", "--max-model-len", "512",
                           *nodes_flags(port)) as server:
            ask = {"model": "demo", "prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0}
            first = server.http.post("/v1/completions", json=ask).json()["choices"][0]["text"]
            engine = psutil.Process(server.engine_pid)
            victims = {"the rank there": node.ranks(), "the rank here": engine.children(), "the engine": [engine],
                       "the node": [psutil.Process(node.process.pid)]}[whom]
            victims[0].kill()
            if whom == "the node":
                node.process.wait()
                node.start()

            def answers() -> bool:
                found = server.http.post("/v1/completions", json=ask)
                return found.status_code == 200 and found.json()["choices"][0]["text"] == first

            time.sleep(1.0)
            wait_for(answers, 60.0, "an answer")
            assert server.engine_pid != engine.pid
        assert node.code() == 0


@heavy
def test_a_node_that_hangs_or_goes_is_named(tmp_path):
    port = free_port()
    with other_node(tmp_path, port) as node, node_0(port) as llm:
        tokens(llm)
        node.process.send_signal(signal.SIGSTOP)
        time.sleep(SILENT_S + 1)
        with pytest.raises(WorkerError, match="node 1 has said nothing for"):
            llm._core.tick()
        node.process.send_signal(signal.SIGCONT)
    with other_node(tmp_path, port) as node, node_0(port) as llm:
        node.process.send_signal(signal.SIGTERM)
        time.sleep(2)
        with pytest.raises(WorkerError, match="node 1: it was stopped"):
            llm._core.tick()
        assert node.code() == 0


@heavy
def test_a_rank_without_memory_ends_all(tmp_path):
    port = free_port()
    with other_node(tmp_path, port) as node:
        wait_for(lambda: "nothing answers HTTP" in node.log, 30.0)
        limit = psutil.Process(node.process.pid).memory_info().vms + 2**26
        resource.prlimit(node.process.pid, resource.RLIMIT_AS, (limit, limit))  # its ranks have it from it
        with pytest.raises((ConfigError, WorkerError, MemoryError), match="rank 1"):
            node_0(port)
        assert node.code() == 1 and "rank 1" in node.log.splitlines()[-1]


@heavy
def test_two_processes_for_one_node(tmp_path):
    port = free_port()
    with other_node(tmp_path, port) as first, node_0(port) as llm:
        with other_node(tmp_path / "copy", port) as second:
            assert second.code(60) == 1 and "node_rank 1 is taken" in second.log
        assert tokens(llm)
        assert first.process.poll() is None


@heavy
def test_a_port_that_is_taken_ends_the_server(tmp_path):
    port = free_port()
    with other_node(tmp_path, port), node_0(port):
        done = subprocess.run([sys.executable, "-m", "serving.commands.cli", "serve", "--port", "0", *FLAGS,
                               *nodes_flags(port)], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert f"node 0 cannot listen at 127.0.0.1:{port} (master_addr, master_port)" in done.stdout + done.stderr
