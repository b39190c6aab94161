"""Two ranks that share the bundled model: the answers of one rank, each with its own part of weights and KV, and bad
starts and lost ranks that are named. Every pair of features on them: `tests/engine/test_feature_matrix.py`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from backends.cpu.cpu import CpuBackend
from graph.buffers import Field, StaticBuffers, StepMemory
from tests.models.harness import PagedRunner
from tests.worker.test_processes import GREEDY, PROMPTS, SETTINGS, is_running, tokens
from xllm import LLM, SamplingParams, bundled
from xllm.errors import ConfigError, EngineDeadError, WorkerError
from xllm.models.loader import load_model
from xllm.models.weights import WeightSource
from xllm.parallel.groups import Group
from xllm.parallel.parallel_context import ParallelContext
from xllm.runner.graphs import SharedCapturer

TWO = {**SETTINGS, "tensor_parallel_size": 2}
FOLDER = Path(bundled.__file__).parent
NEAR = 1e-3  # two logits that are closer may change places: sums of parts are rounded otherwise than whole ones


def outputs(llm: LLM) -> list:
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    return llm.generate(PROMPTS, params, use_tqdm=False)


def assert_same(found, expected) -> None:
    """Token for token, but where one rank's own two best are near each other."""
    ours, theirs = found.outputs[0], expected.outputs[0]
    for place, (a, b) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
        best, second = sorted((entry.logprob for entry in theirs.logprobs[place].values()), reverse=True)[:2]
        if a != b:
            assert best - second < NEAR
            return
        assert ours.logprobs[place][a].logprob == pytest.approx(theirs.logprobs[place][a].logprob, abs=NEAR)
    for mine, whole in zip(found.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert {k: v.logprob for k, v in mine.items()} == pytest.approx({k: v.logprob for k, v in whole.items()},
                                                                       abs=NEAR)


@pytest.mark.usefixtures("pooled_ranks")
def test_two_ranks_answer_as_one(monkeypatch):
    """XLLM_CHECK: both ranks drew the same tokens in every step. Weights that were dropped are read again, together."""
    monkeypatch.setenv("XLLM_CHECK", "1")
    with LLM(**{**SETTINGS, "quantization": "w8a8"}) as llm:
        rounded = tokens(llm)
    with LLM(**SETTINGS) as llm:
        expected = outputs(llm)
    with LLM(**TWO) as llm:
        assert len(llm._core.link.pids) == 2
        for found, whole in zip(outputs(llm), expected, strict=True):
            assert_same(found, whole)
    with LLM(**TWO, quantization="w8a8", enable_prefix_caching=False) as llm:
        before = tokens(llm)
        assert sum(a != b for a, b in zip(before, rounded)) <= 1  # a number may be rounded to the next code
        llm._core.control.sleep(2)
        llm._core.control.wake_up()
        assert tokens(llm) == before


@pytest.mark.usefixtures("pooled_ranks")
@pytest.mark.parametrize("settings", [{"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}], ids=str)
def test_fp8_and_embeddings(settings):
    found = []
    for ranks in (SETTINGS, TWO):
        with LLM(**ranks, **settings) as llm:
            found.append((tokens(llm), [output.embedding for output in llm.embed(PROMPTS, use_tqdm=False)]))
    assert sum(a != b for a, b in zip(found[1][0], found[0][0], strict=True)) <= 1
    for mine, whole in zip(found[1][1], found[0][1], strict=True):
        assert mine == pytest.approx(whole, abs=1e-3)


class CountingGroup(Group):
    """A rank whose peers do nothing: it counts what it would exchange with them."""

    count = 0

    def all_reduce(self, x):
        self.count += 1
        return super().all_reduce(x)

    all_reduce_max = all_reduce

    def all_gather(self, x):
        self.count += 1
        return torch.cat([x] * self.size, dim=-1)


@pytest.mark.parametrize(("quantization", "a_layer"), [(None, 2), ("int8", 2), ("w8a8", 4)])
def test_the_exchanges_of_a_step(quantization, a_layer):
    backend, group = CpuBackend(compiled=False), CountingGroup(0, 2, None)
    model = load_model(FOLDER, backend=backend, dtype=torch.float32, quantization=quantization, max_model_len=16,
                       parallel=ParallelContext(tp=group))
    group.count = 0
    PagedRunner(model, backend).step({"a": [1, 2, 3]})
    assert group.count == a_layer * len(model.kv_specs) + 2


@pytest.mark.usefixtures("pooled_ranks")
def test_each_rank_has_the_kv_of_its_own_heads():
    """The same bytes on each of two ranks hold twice the tokens."""
    given = {"kv_cache_memory_bytes": 2**21, "num_kv_blocks": None}
    with LLM(**{**SETTINGS, **given}) as one, LLM(**{**TWO, **given}) as two:
        assert two.stats().num_blocks // 2 == one.stats().num_blocks


def test_each_rank_reads_its_own_part_of_the_checkpoint(monkeypatch):
    """Every number of a matrix on one rank, but for a kv head that several have; every norm on all."""
    read, backend = {}, CpuBackend(compiled=False)

    def load(rank: int, size: int) -> dict[str, int]:
        read.clear()
        load_model(FOLDER, backend=backend, dtype=torch.float32, max_model_len=16,
                   parallel=ParallelContext(tp=Group(rank, size, None)))
        return dict(read)

    take = WeightSource.take

    def counted(self, name, shape, shard=None):
        tensor = take(self, name, shape, shard)
        read[name] = tensor.numel()
        return tensor

    monkeypatch.setattr(WeightSource, "take", counted)
    whole, halves = load(0, 1), [load(rank, 2) for rank in range(2)]
    norms = {name for name in whole if "norm" in name}
    assert all(half[name] == whole[name] for half in halves for name in norms)
    assert all(half[name] * 2 == whole[name] for half in halves for name in whole if name not in norms)
    share = sum(halves[0].values()) / sum(whole.values())
    assert 0.5 < share < 0.505, share


@pytest.mark.parametrize(("settings", "words"), [
    ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
    ({"tensor_parallel_size": 10**6}, "tensor_parallel_size must be at most 128"),
    ({"tensor_parallel_size": 2, "worker": "thread"}, "tensor_parallel_size 2 needs a process a rank, .*is thread"),
    ({"tensor_parallel_size": 2, "worker": "processes", "worker_ranks": 2}, "2: ranks share a model or compute"),
])
def test_settings_that_cannot_be_are_refused_before_a_process_starts(monkeypatch, settings, words):
    monkeypatch.setattr("xllm.worker.processes.start_rank", None)
    with pytest.raises(ConfigError, match=words):
        LLM(**SETTINGS, **settings)


@pytest.mark.usefixtures("pooled_ranks")
@pytest.mark.parametrize(("settings", "words"), [
    ({"tensor_parallel_size": 3}, "tensor_parallel_size 3 is no multiple of the number of kv heads"),
    ({"tensor_parallel_size": 8}, "tensor_parallel_size 8 does not divide the number of query heads"),
    ({"graph_mode": "checked", "kv_layout": "xtensor"}, "do not go together yet"),
])
def test_what_ranks_cannot_share_is_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        LLM(**{**TWO, **settings})


def test_a_capture_that_fails_on_one_rank_is_no_step_without_graphs():
    """The others replay theirs: exchanges would be those of different layers."""
    def fail() -> None:
        raise MemoryError("no room")

    capturer = SharedCapturer()
    buffers = StaticBuffers([Field("x", torch.int32, ("T",))], [], {"T": 1}, device=torch.device("cpu"),
                            allocate_host=lambda size: torch.zeros(size, dtype=torch.uint8))
    memory = StepMemory(buffers, ["x"], [], {"T": 1})
    with pytest.raises(WorkerError, match="the other ranks have theirs: no room"):
        capturer.capture(fail, pool=capturer.make_pool(), memory=memory)


@pytest.mark.usefixtures("pooled_ranks")
def test_a_rank_that_is_killed_is_the_reason():
    """And not that another one lost its connection, which it says first."""
    with LLM(**TWO) as llm:
        pids = llm._core.link.pids
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="worker rank 1 was killed by signal 9"):
            tokens(llm, GREEDY)
    assert not any(map(is_running, pids))
