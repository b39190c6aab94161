"""Ranks that die, hang or differ in any phase: what the clients of a real server see, and that it goes on.

`make nightly` (FAULTS_ALL=1) makes every fault in every phase; here are those that differ most.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import httpx
import pytest

from tests.serving.server_process import ROOT, ServerProcess, wait_for
from tests.worker.faults import FAULT_SITE, VARIABLE, Faults, leavings
from tests.worker.test_processes import SETTINGS, tokens
from xllm import LLM, bundled
from xllm.errors import EngineDeadError, ModelError, WorkerError

ALL = os.environ.get("FAULTS_ALL") == "1"
TO_THE_ERROR_S = 10.0
ADMIN = "an-admin-key-of-some-length"
SHORT = {"prompt": "def f(", "max_tokens": 8, "temperature": 0}
LONG = {"prompt": "def main():", "max_tokens": 480, "ignore_eos": True, "n": 4}
GRAMMAR = {"prompt": "x", "max_tokens": 300, "structured_outputs": {"regex": "(ab|cd){200}"}}
EVERY_REASON = {
    "kill": "worker rank 1 was killed by signal 9", "raise": "rank 1: (MemoryError: )?no room",
    "stop": "worker rank 1 has said nothing for 6 s",
    "hang": r"worker rank 1 has not (begun step|finished|come to an exchange|voted on graph)",
    "spin": r"worker rank 1 has not (begun step|finished|come to an exchange)",
}
DIFFERENCES = {
    "plan_of.another": "worker rank 1 has begun step \\d+ where rank 0 has begun step \\d+",
    # Where a row's prompt or blocks were in the plan, the rank itself finds that the next one does not fit. On a busy
    # machine gloo may end it before its announcement has left the process.
    "plan_of.lost": "worker rank 1 has begun step \\d+ where rank 0 has begun step|"
                    "rank 1: (the plan samples|a row lacks blocks)|worker rank 1 was killed by signal 6",
    "plan_of.less": "worker rank 1 has begun step \\d+ with other num_rows \\(7\\) than rank 0 \\(8\\)",
    "inputs.other": "worker rank 1 has begun step \\d+ with other token ids or positions than rank 0",
    "tokens.other": "worker rank 1 has drawn other tokens in step \\d+ than rank 0",
    "size.other": "worker rank [01] was killed by signal 6",  # of gloo: nothing announces the size of an exchange
}
STEP_POINTS = ("plan", "step", "exchange", "inside", "draw", "report")


class FaultyServer:
    """A server whose ranks can go wrong. rows: what came of each fault."""

    def __init__(self, folder: Path, *flags: str):
        self.faults, self.rows = Faults(folder / "fault"), []
        self.server = ServerProcess(folder / "log.txt", "--tensor-parallel-size", "2", "--engine-restarts", "1000",
                                    "--engine-restart-window", "1", "--admin-api-key", ADMIN, *flags)
        self.expected = self.answer()

    def be_up(self) -> None:
        """Wait for it, if the test before has failed."""
        wait_for(lambda: self.server.health().status_code == 200, 60.0, "a restart")

    def answer(self) -> str:
        response = self.server.http.post("/v1/completions", json=SHORT)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def control(self, path: str, **body: object) -> httpx.Response:
        return self.server.http.post(path, json=body, headers={"Authorization": f"Bearer {ADMIN}"})


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a server with some flags, once."""
    found: dict[tuple[str, ...], FaultyServer] = {}
    patch = pytest.MonkeyPatch()

    def started(*flags: str) -> FaultyServer:
        if flags not in found:
            folder = tmp_path_factory.mktemp("server")
            (folder / "tmp").mkdir()
            patch.setenv("TMPDIR", str(folder / "tmp"))
            patch.setenv("PYTHONPATH", os.pathsep.join((str(FAULT_SITE), str(ROOT))))
            patch.setenv(VARIABLE, str(folder / "fault"))
            found[flags] = FaultyServer(folder, *flags)
        return found[flags]

    yield started
    patch.undo()
    for server in found.values():
        for row in server.rows:
            print(" | ".join(row))
        with server.server:
            if ALL:  # a rank that is stopped does not hold up the end
                server.faults.arm("stop.stop:1")
            assert server.server.stop() == 0
        wait_for(lambda server=server: not server.faults.processes(), 5.0, "the end of the ranks")
        assert not [name for name in leavings(server.faults.path.parent / "tmp") if name.startswith("xllm-")]


def stream(server: ServerProcess, body: dict, errors: list[tuple[float, str]]) -> None:
    """Reads a stream to its end; notes its errors and when they came."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60) as response:
        if response.status_code != 200:
            errors.append((time.time(), response.read().decode()))
            return
        for line in response.iter_lines():
            if '"error"' in line:
                errors.append((time.time(), json.loads(line.removeprefix("data: "))["error"]["message"]))


def whole(server: ServerProcess, body: dict, errors: list[tuple[float, str]]) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    errors.append((time.time(), f"{response.status_code} {response.text}"))


def check_fault(faulty: FaultyServer, fault: str, reason: str, *, body: dict = LONG) -> None:
    """Two calls are open, one of them a stream; both end once with the reason, and the server goes on."""
    server, folder = faulty.server, faulty.faults.path.parent / "tmp"
    faulty.be_up()
    engine, ranks, before = server.engine_pid, {p.pid for p in faulty.faults.processes()}, leavings(folder)
    assert len(ranks) == 2
    seen: list[list[tuple[float, str]]] = [[], []]
    threads = [threading.Thread(target=call, args=(server, body, errors))
               for call, errors in zip((stream, whole), seen)]
    faulty.faults.arm(fault) if body is not LONG else None
    for thread in threads:
        thread.start()
    if body is LONG:
        wait_for(lambda: server.gauge("xllm:num_requests_running") == 8, what="running requests")
        faulty.faults.arm(fault)
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive(), "a call got no answer"
    at_s = faulty.faults.at_s
    assert [len(errors) for errors in seen] == [1, 1], seen
    for _, text in (errors[0] for errors in seen):
        assert re.search(reason, text), text
    took_s = max(errors[0][0] for errors in seen) - at_s
    wait_for(lambda: server.health().status_code == 200, 60.0, "a restart")
    back_s = time.time() - at_s
    assert faulty.answer() == faulty.expected
    assert server.engine_pid != engine
    assert ranks.isdisjoint(p.pid for p in faulty.faults.processes()), "a rank was left behind"
    # Other programs of this user have shared memory for a moment, too.
    wait_for(lambda: len(leavings(folder)) == len(before), 5.0, f"as few leavings as {sorted(before)}")
    faulty.rows.append((fault, seen[0][0][1], f"{took_s:.1f} s", f"{back_s:.1f} s"))
    assert took_s < TO_THE_ERROR_S


FEW = ["inside.kill"]
MANY = [f"{point}.{action}" for point in STEP_POINTS for action in EVERY_REASON
        if (point, action) not in (("inside", "raise"), ("inside", "hang"), ("inside", "spin"))]


@pytest.mark.parametrize("fault", MANY if ALL else FEW)
def test_a_rank_that_goes_wrong_in_a_step(start, fault):
    check_fault(start(), f"{fault}:1", EVERY_REASON[fault.partition(".")[2]])


@pytest.mark.parametrize("fault", DIFFERENCES if ALL else ["plan_of.less"])
def test_a_rank_that_differs_in_a_step(start, fault):
    check_fault(start(), f"{fault}:1", DIFFERENCES[fault])


@pytest.mark.usefixtures("pooled_ranks")
@pytest.mark.parametrize("fault", ["plan_of.lost", "plan_of.another", "inputs.other", "tokens.other", "exchange.spin",
                                   "exchange.raise"])
def test_a_rank_that_goes_wrong_is_named(faults, fault):
    """The same without a server, from a pool of ranks."""
    with LLM(**SETTINGS, tensor_parallel_size=2) as llm:
        tokens(llm)
        faults.arm(f"{fault}:1")
        reason = DIFFERENCES.get(fault) or EVERY_REASON[fault.partition(".")[2]]
        with pytest.raises(EngineDeadError, match=reason):
            tokens(llm)
        assert time.time() - faults.at_s < TO_THE_ERROR_S


nightly = pytest.mark.skipif(not ALL, reason="in `make nightly` (FAULTS_ALL=1)")


@nightly
@pytest.mark.parametrize("fault", ["grammar.kill", "grammar.raise", "grammar.stop", "grammar.hang", "grammar.spin"])
def test_a_rank_that_goes_wrong_with_a_grammar(start, fault):
    check_fault(start(), f"{fault}:1", EVERY_REASON[fault.partition(".")[2]], body=GRAMMAR)


@nightly
@pytest.mark.parametrize("fault", ["key.other", "capture.kill", "capture.stop", "capture.hang"])
def test_a_rank_that_goes_wrong_with_its_graphs(start, fault):
    reason = EVERY_REASON.get(fault.partition(".")[2], "worker rank 1 has begun step \\d+ with other graph")
    check_fault(start("--graph-mode", "checked"), f"{fault}:1", reason)


@nightly
@pytest.mark.parametrize("action", EVERY_REASON)
def test_a_rank_that_goes_wrong_while_it_copies_kv(start, action):
    check_fault(start("--host-cache-size", "64MiB", "--num-kv-blocks", "96"), f"move.{action}:1", EVERY_REASON[action],
                body=dict(LONG))


@nightly
@pytest.mark.parametrize("point", ["sleep", "wake"])
@pytest.mark.parametrize("action", EVERY_REASON)
def test_a_rank_that_goes_wrong_while_it_falls_asleep_or_wakes(start, point, action):
    """No request is open; the call that asked for it is told."""
    faulty = start()
    faulty.be_up()
    if point == "wake":
        assert faulty.control("/sleep", level=2).status_code == 200
    ranks = {p.pid for p in faulty.faults.processes()}
    faulty.faults.arm(f"{point}.{action}:1")
    response = faulty.control("/sleep?level=2" if point == "sleep" else "/wake_up")
    took_s = time.time() - faulty.faults.at_s
    assert response.status_code == 503, response.text
    wait_for(lambda: faulty.server.health().status_code == 200, 60.0, "a restart")
    faulty.rows.append((f"{point}.{action}", response.text[:150], f"{took_s:.1f} s",
                        f"{time.time() - faulty.faults.at_s:.1f} s"))
    assert faulty.answer() == faulty.expected and took_s < TO_THE_ERROR_S
    assert ranks.isdisjoint(p.pid for p in faulty.faults.processes())


@nightly
@pytest.mark.parametrize("action", EVERY_REASON)
def test_a_rank_that_goes_wrong_at_the_end(tmp_path, faults, action):
    """It does not hold up the end, and nothing of it stays."""
    llm = LLM(**SETTINGS, tensor_parallel_size=2)
    folder = llm._core.link._folder
    faults.arm(f"stop.{action}:1")
    began_s = time.monotonic()
    llm.shutdown()
    assert time.monotonic() - began_s < 5
    assert not faults.processes() and not folder.exists()


@pytest.mark.usefixtures("pooled_ranks")
def test_a_rank_that_could_not_wake_wakes_with_the_others(faults, tmp_path):
    """After one whose files changed under it: all sleep on, and the next call wakes them together."""
    model = copied_model(tmp_path)
    with LLM(str(model), **SETTINGS, tensor_parallel_size=2) as llm:
        llm._core.control.sleep(2)
        faults.arm("files.change:1")
        with pytest.raises(ModelError, match=r"the files in .* changed while they were read"):
            llm._core.control.wake_up()
        llm._core.control.wake_up()
        assert all(len(found) == 48 for found in tokens(llm))


# --- starts


def copied_model(folder: Path) -> Path:
    """A copy of the bundled model that may be changed."""
    model = folder / "model"
    model.mkdir()
    for file in Path(bundled.__file__).parent.iterdir():
        if file.is_file():
            (model / file.name).write_bytes(file.read_bytes())
    return model


@pytest.mark.usefixtures("pooled_ranks")
def test_a_rank_that_does_not_finish_loading_ends_all(faults, monkeypatch):
    monkeypatch.setattr("xllm.worker.processes.LATE_PATIENT_S", 2.0)
    faults.arm("warm_up.stop:1")
    with pytest.raises(WorkerError, match="worker rank 1 has not finished loading"):
        LLM(**SETTINGS, tensor_parallel_size=2)
    assert not active_children()


STARTS = {
    "start.kill": "worker rank 1 was killed by signal 9", "start.exit": "worker rank 1 exited with code 3",
    "meet.kill": "worker rank 1 was killed by signal 9", "meet.raise": "rank 1: no room",
    "weights.kill": "worker rank 1 was killed by signal 9", "weights.raise": "rank 1: no room",
    "warm_up.kill": "worker rank 1 was killed by signal 9", "warm_up.raise": "rank 1: no room",
}


@pytest.mark.parametrize("fault", STARTS if ALL else ["start.exit"])
def test_a_rank_that_cannot_start_ends_all(faults, fault):
    faults.arm(f"{fault}:1")
    with pytest.raises(Exception, match=STARTS[fault]):
        LLM(**SETTINGS, tensor_parallel_size=2)
    assert not faults.processes()


@pytest.mark.usefixtures("pooled_ranks")
@pytest.mark.parametrize(("fault", "reason"), [
    ("weights.raise:1", "rank 1: no room"),
    ("files.other:1", "worker rank 1 finds another checkpoint in .* than rank 0"),
    ("files.change:1", "the files in .* changed while they were read"),
])
def test_ranks_without_memory_or_with_another_checkpoint_than_the_others(faults, tmp_path, fault, reason):
    model = copied_model(tmp_path)
    faults.arm(fault)
    with pytest.raises((ModelError, MemoryError), match=reason):
        LLM(str(model), **SETTINGS, tensor_parallel_size=2)
    assert not active_children()
