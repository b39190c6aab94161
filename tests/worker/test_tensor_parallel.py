"""Two ranks that share the bundled model: the answers of one rank, each with its own part of weights and KV, and bad
starts and lost ranks that are named. Every pair of features on them: `tests/engine/test_feature_matrix.py`."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from backends.cpu.cpu import CpuBackend
from tests.models.harness import PagedRunner
from tests.worker.faults import VARIABLE, Faults
from tests.worker.test_processes import GREEDY, PROMPTS, SETTINGS, is_running, tokens
from xllm import LLM, SamplingParams, bundled
from xllm.errors import ConfigError, EngineDeadError
from xllm.models.loader import load_model
from xllm.parallel.groups import Group
from xllm.parallel.parallel_context import ParallelContext
from xllm.worker.processes import HEARTBEAT_S

TWO = {**SETTINGS, "tensor_parallel_size": 2}
FOLDER = Path(bundled.__file__).parent
NEAR = 1e-3  # two logits that are closer may change places: sums of parts are rounded otherwise than whole ones


TEXTS = [*PROMPTS, "def f(a, b):\n    return a + b\n\ndef g(", "for i in range(10):\n    print(", "class Node:\n    "]


def outputs(llm: LLM) -> list:
    """540 tokens."""
    params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    return llm.generate(TEXTS, params, use_tqdm=False)


def num_first_differences(found: list, expected: list) -> int:
    """Answers that leave those of one rank. They may do so only where its own two best are near each other; what comes
    after is another text. Up to there every logprob is near, and those of the prompts are."""
    count = 0
    for mine, whole in zip(found, expected, strict=True):
        for ours, theirs in zip(mine.prompt_logprobs[1:], whole.prompt_logprobs[1:], strict=True):
            assert {k: v.logprob for k, v in ours.items()} == pytest.approx({k: v.logprob for k, v in theirs.items()},
                                                                            abs=NEAR)
        ours, theirs = mine.outputs[0], whole.outputs[0]
        for place, (a, b) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
            best, second = sorted((entry.logprob for entry in theirs.logprobs[place].values()), reverse=True)[:2]
            if a != b:
                assert best - second < NEAR
                count += 1
                break
            assert ours.logprobs[place][a].logprob == pytest.approx(theirs.logprobs[place][a].logprob, abs=NEAR)
    return count


@pytest.mark.usefixtures("pooled_ranks")
def test_ranks_answer_as_one(monkeypatch):
    """Two, and four, which hold a kv head of the two in pairs: at most one token in 500 is another. XLLM_CHECK: all
    ranks drew the same tokens in every step."""
    monkeypatch.setenv("XLLM_CHECK", "1")
    with LLM(**SETTINGS) as llm:
        expected = outputs(llm)
    for size in (2, 4):
        with LLM(**SETTINGS, tensor_parallel_size=size) as llm:
            assert len(llm._core.link.pids) == size
            assert num_first_differences(outputs(llm), expected) <= 1


@pytest.mark.usefixtures("pooled_ranks")
def test_weights_that_were_dropped_are_read_again_together():
    with LLM(**{**SETTINGS, "quantization": "w8a8"}) as llm:
        rounded = tokens(llm)
    with LLM(**TWO, quantization="w8a8", enable_prefix_caching=False) as llm:
        before = tokens(llm)
        assert sum(a != b for a, b in zip(before, rounded)) <= 1  # a number may be rounded to the next code
        llm._core.control.sleep(2)
        llm._core.control.wake_up()
        assert tokens(llm) == before


@pytest.mark.usefixtures("pooled_ranks")
@pytest.mark.parametrize(("settings", "most"), [({"quantization": "fp8"}, 1e-3), ({"kv_cache_dtype": "fp8"}, 1e-3),
                                                ({"dtype": "bfloat16"}, 5e-3)], ids=str)
def test_formats_and_embeddings(settings, most):
    found, few = [], replace(GREEDY, max_tokens=12)
    for ranks in (SETTINGS, TWO):
        with LLM(**ranks, **settings) as llm:
            found.append((tokens(llm, few), [output.embedding for output in llm.embed(PROMPTS, use_tqdm=False)]))
    assert sum(a != b for a, b in zip(found[1][0], found[0][0], strict=True)) <= 1
    for mine, whole in zip(found[1][1], found[0][1], strict=True):
        assert mine == pytest.approx(whole, abs=most)


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


class CountedFile:
    """An open safetensors file. read: the bytes that were asked of it, by tensor."""

    read: dict[str, int]

    def __init__(self, path: str, **options):
        self._file = safe_open(path, **options)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        self._file.__exit__(*error)

    def keys(self):
        return self._file.keys()

    def get_tensor(self, name):
        return self._note(name, self._file.get_tensor(name))

    def get_slice(self, name):
        found = self._file.get_slice(name)
        return CountedSlice(found, lambda tensor: self._note(name, tensor))

    def _note(self, name, tensor):
        self.read[name] = self.read.get(name, 0) + tensor.nbytes
        return tensor


class CountedSlice:
    def __init__(self, found, note):
        self.get_shape, self.get_dtype, self._found, self._note = found.get_shape, found.get_dtype, found, note

    def __getitem__(self, index):
        return self._note(self._found[index])


def test_each_rank_reads_only_its_own_bytes_of_the_checkpoint(monkeypatch):
    """All that is asked of the file, counted: half of each matrix on each of two ranks, and every norm on both."""
    monkeypatch.setattr("xllm.models.weights.safe_open", CountedFile)

    def load(rank: int, size: int) -> dict[str, int]:
        CountedFile.read = {}
        load_model(FOLDER, backend=CpuBackend(compiled=False), dtype=torch.float32, max_model_len=16,
                   parallel=ParallelContext(tp=Group(rank, size, None)))
        return CountedFile.read

    whole, halves = load(0, 1), [load(rank, 2) for rank in range(2)]
    norms = {name for name in whole if "norm" in name}
    assert norms and all(half[name] == whole[name] for half in halves for name in norms)
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
])
def test_what_ranks_cannot_share_is_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        LLM(**{**TWO, **settings})


def test_a_capture_that_fails_on_one_rank_is_eager_on_all(monkeypatch, tmp_path):
    """Exchanges would be those of different steps otherwise. The other graphs are kept."""
    with LLM(**SETTINGS) as llm:
        expected = tokens(llm)
    monkeypatch.setattr("xllm.worker.processes.RANK_MODULE", "tests.worker.faulty_rank")
    faults = Faults(tmp_path / "fault")
    monkeypatch.setenv(VARIABLE, str(faults.path))
    faults.arm("capture.raise:1")
    with LLM(**TWO, graph_mode="checked", max_num_seqs=2) as llm:
        assert tokens(llm) == expected
        time.sleep(2 * HEARTBEAT_S)
        llm._core.tick()
        graphs = llm.stats().graphs  # of rank 0, where every capture went well
    assert graphs.fallbacks_total["capture_failed"] > 10
    assert sum(graphs.replays_total.values()) > 10 and graphs.num_graphs < graphs.captures_total


@pytest.mark.usefixtures("pooled_ranks")
def test_a_rank_that_is_killed_is_the_reason():
    """And not that another one lost its connection, which it says first."""
    with LLM(**TWO) as llm:
        pids = llm._core.link.pids
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="worker rank 1 was killed by signal 9"):
            tokens(llm, GREEDY)
    assert not any(map(is_running, pids))
