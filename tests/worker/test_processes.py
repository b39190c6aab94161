"""Workers in processes of their own, two of them: the same answers, and an end with a reason when one of them fails."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import zmq

from tests.adapters import write_adapter
from xllm import LLM, SamplingParams, StructuredOutput
from xllm.errors import ConfigError, EngineDeadError, ModelError, WorkerError
from xllm.worker.message_codec import encode
from xllm.worker.messages import Settle
from xllm.worker.processes import CLOSE_S

SETTINGS = {"max_model_len": 256, "num_kv_blocks": 96, "block_size": 8, "num_threads": 1}
TWO = {**SETTINGS, "worker": "processes", "worker_ranks": 2}
PROMPTS = ["import os\nimport sys\n\n\ndef read_lines(path):\n", "class Stack:\n    def __init__(self):\n", "x = [1, 2"]
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)


def tokens(llm: LLM, params: SamplingParams = GREEDY, **options) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, params, use_tqdm=False, **options)]


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    with LLM(**SETTINGS) as llm:
        return tokens(llm)


@pytest.fixture
def checked(monkeypatch) -> None:
    monkeypatch.setenv("XLLM_CHECK", "1")


@pytest.mark.usefixtures("checked", "pooled_ranks")
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in-turn"])
def test_two_ranks_answer_as_one(plain, overlap):
    with LLM(**TWO, async_scheduling=overlap) as llm:
        assert tokens(llm) == plain
        assert tokens(llm) == plain  # with a warm cache
        assert llm.stats().prefix_hits_total > 0


@pytest.mark.usefixtures("pooled_ranks")
def test_grammars_and_adapters_reach_every_rank(tmp_path):
    write_adapter(tmp_path / "a", 3)
    form = SamplingParams(temperature=0, max_tokens=24, structured=StructuredOutput(regex="(ab|cd){8}"))
    with LLM(**SETTINGS, enable_lora=True) as alone:
        alone.load_adapter("a", tmp_path / "a")
        expected = tokens(alone, form), tokens(alone, lora="a")
    with LLM(**TWO, enable_lora=True) as llm:
        llm.load_adapter("a", tmp_path / "a")
        assert (tokens(llm, form), tokens(llm, lora="a")) == expected
        with pytest.raises(ModelError, match="does not exist"):
            llm.load_adapter("b", tmp_path / "none")
        llm.unload_adapter("a")


def test_a_setting_that_no_rank_can_work_with_is_named():
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(**{**TWO, "num_kv_blocks": 2})
    with pytest.raises(ConfigError, match="worker_ranks 2 needs worker processes"):
        LLM(**SETTINGS, worker_ranks=2)


@pytest.mark.usefixtures("pooled_ranks")
@pytest.mark.parametrize(("signum", "reason"), [
    (signal.SIGKILL, "worker rank 1 was killed by signal 9"),
    (signal.SIGSTOP, "worker rank 1 has (said nothing|not finished step)"),
])
def test_a_rank_that_dies_or_stops_ends_the_engine(signum, reason):
    with LLM(**TWO) as llm:
        pid = llm._core.link.pids[1]
        os.kill(pid, signum)
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match=reason):
            tokens(llm, replace(GREEDY, max_tokens=180))
        assert time.monotonic() - began < 10
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.usefixtures("checked", "pooled_ranks")
@pytest.mark.parametrize(("fault", "reason"), [
    ("block.other:1", r"step \d+: rank 1 has other contents in KV block \d+ than rank 0"),
    ("step.hang:1", r"worker rank 1 has not finished step \d+"),
    ("step.raise:1", "MemoryError: rank 1: no room"),
    ("step.raise:0", "MemoryError: rank 0: no room"),
])
def test_a_rank_that_goes_wrong_is_named(faults, fault, reason):
    with LLM(**TWO) as llm:
        faults.arm(fault)
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match=reason):
            tokens(llm)
        assert time.monotonic() - began < 10


def test_ranks_end_with_an_engine_that_is_killed():
    code = ("from xllm import LLM; import sys, time; llm = LLM(max_model_len=64, num_kv_blocks=8, num_threads=1, "
            "worker='processes', worker_ranks=2); link = llm._core.link; "
            "print(link._folder, *link.pids, flush=True); time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as engine:
        folder, *words = engine.stdout.readline().split()
        pids = [int(word) for word in words]
        assert len(pids) == 2 and os.path.isdir(folder)
        engine.kill()
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))
    assert not os.path.exists(folder)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.usefixtures("pooled_ranks")
@pytest.mark.parametrize("frames", [[b"cos\nsystem\n(S'false'\ntR."], [b"", b"\x00"], [b"\x09", encode(Settle())],
                                    [b"\x01", b"\x0e\xc1"]], ids=["pickle", "nobody", "no such rank", "no message"])
def test_what_is_no_message_ends_the_engine_and_does_nothing_else(frames):
    with LLM(**TWO) as llm, zmq.Context() as context, context.socket(zmq.PUSH) as push:
        folder = llm._core.link._folder
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        push.connect(f"ipc://{folder / 'reports'}")
        push.send_multipart(frames)
        time.sleep(0.2)
        with pytest.raises(EngineDeadError, match="what a worker sent cannot be read"):
            tokens(llm)


def test_ranks_that_are_gone_do_not_hold_up_the_end():
    llm = LLM(**TWO)
    for pid in llm._core.link.pids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    began = time.monotonic()
    llm.shutdown()
    assert time.monotonic() - began < CLOSE_S / 2


@pytest.mark.usefixtures("pooled_ranks")
def test_a_command_to_a_rank_that_is_gone_does_not_wait_for_ever():
    with LLM(**TWO) as llm:
        link = llm._core.link
        os.kill(link.pids[1], signal.SIGKILL)
        time.sleep(0.5)  # so that its socket is known to be closed
        with pytest.raises(WorkerError, match="worker rank 1 was killed by signal 9"):
            link.send(Settle())
